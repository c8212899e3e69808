"""The training program on hosts joined by slow links: where a step's time goes, and what the kernel counts.

Real processes in network namespaces on a bridge, behind token-bucket filters; JAX's own collectives over gloo.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from train import methods
from train.bench import figures, links
from train.errors import HostError, Interrupted, UsageError
from train.log import amount, read

SKIPPED = 2  # first steps, which are not counted: the first compiles, the second finds cold connections
UNITS = {"kbit": 1e3, "mbit": 1e6, "gbit": 1e9}
MODEL = [
    "--data", "stdlib", "--model", "transformer", "--width", "256", "--layers", "4", "--heads", "8", "--window", "16",
    "--eval-every", "1000000", "--local-steps", "1",
]  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Args:
    """Train over real, slow links between hosts that are network namespaces. Wants Linux, root and iproute2."""

    hosts: int = 4
    """Number of hosts."""
    rate: str = "20mbit"
    """Rates of each host's link, both ways, separated by commas, such as 5mbit,20mbit,100mbit."""
    methods: str = "dense,partition:exchange=all_gather,partition:exchange=reduce_scatter,powersgd"
    """Methods, separated by commas, as of train.compare."""
    ratio: float = 100.0
    """Payload ratio asked of the methods that have one."""
    steps: int = 12
    """Steps of each training."""
    dense_steps: int = 5
    """Steps of the uncompressed training, which takes long on a slow link."""
    json: Path | None = None
    """File to write the figures to."""
    figure: Path = Path("network.png")
    """Picture to draw."""
    timeout: float = 1800.0
    """Seconds that one training may take."""
    clean: bool = False
    """Remove what a killed benchmark left behind, and do nothing else."""


def main(args: Args) -> None:
    """Print the table and draw the picture.

    Args:
      args: of the command line.

    Raises:
      UsageError: the machine lacks something, or an option is wrong.
      HostError: a training did not end.
    """
    problem = links.missing()
    if problem:
        raise UsageError(problem)
    console = Console()
    if args.clean:
        console.print(f"{links.clean()} namespaces removed")
        return
    figures.check(args.figure, args.json)
    if not 2 <= args.hosts <= 100:
        raise UsageError(f"--hosts {args.hosts} is out of range: give 2 to 100")
    if args.steps < SKIPPED + 2 or args.dense_steps < SKIPPED + 2:
        raise UsageError(f"--steps and --dense-steps have to be {SKIPPED + 2} or more: the first are not counted")
    rates = {text: bits(text) for text in args.rate.split(",")}
    labels = methods.parse_many(args.methods)

    def end(number: int, frame: FrameType | None) -> None:
        raise Interrupted(number)

    before = signal.signal(signal.SIGTERM, end)
    rows: list[dict[str, Any]] = []
    try:
        for text, rate in rates.items():
            with links.Links(args.hosts, text) as net, tempfile.TemporaryDirectory() as folder:
                for label in labels:
                    console.print(f"{label.text} at {text} ...")
                    rows.append({"method": label.text, "rate": rate} | train(args, net, label, Path(folder)))
                    if args.json:
                        args.json.write_text(json.dumps({"hosts": args.hosts, "rows": rows}, indent=1) + "\n")
    finally:
        signal.signal(signal.SIGTERM, before)
    console.print(table(rows))
    draw(rows, args.figure)
    console.print(f"picture: {args.figure}")


def bits(rate: str) -> float:
    """Read a rate as tc writes it.

    >>> bits("20mbit")
    20000000.0
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)(kbit|mbit|gbit)", rate.strip())
    if not found or not float(found[1]):
        raise UsageError(f"--rate {rate} is no rate: give one such as 20mbit (kbit, mbit or gbit)")
    return float(found[1]) * UNITS[found[2]]


def train(args: Args, net: links.Links, label: methods.Label, folder: Path) -> dict[str, Any]:
    """Run one training on all hosts, and take its figures.

    Args:
      args: of the command line.
      net: the hosts.
      label: of the method.
      folder: to leave runs in.

    Returns:
      A row: seconds a step and of its pieces, bytes a step that leave one host, by `gp.stats` and by the kernel.

    Raises:
      HostError: it did not end well.
    """
    steps = args.dense_steps if label.kind == "dense" else args.steps
    given = [
        *MODEL, "--devices", str(args.hosts), "--batch", str(args.hosts), "--steps", str(steps), "--check-every", "0",
        "--checkpoint-every", "0", "--no-dense-reference", "--method", label.text, "--ratio", str(args.ratio),
        "--workdir", str(folder), "--name", label.folder, "--heartbeat", "300", "--timeout", str(args.timeout),
    ]  # fmt: skip
    named = ["--coordinator", f"{net.address(0)}:7000", "--processes", str(args.hosts), "--process"]
    logs = [folder / f"{label.folder}-{host}.log" for host in range(args.hosts)]
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(path.open("w")) for path in logs]
        running = [
            subprocess.Popen(
                [*net.command(host), sys.executable, "-m", "train.main", *given, *named, str(host)],
                stdout=files[host],
                stderr=subprocess.STDOUT,
                text=True,
            )
            for host in range(args.hosts)
        ]
        stack.enter_context(links.ended(running))
        run = folder / label.folder / label.folder
        counted = _follow(run / "metrics.jsonl", steps, net, running, args.timeout)
        for process in running:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(args.timeout)
        if any(process.returncode for process in running) or steps - 1 not in counted:
            said = "\n".join(path.read_text()[-600:] for path in logs)
            raise HostError(f"{label.text} did not train to its end:\n{said}")
    lines, phases = read(run / "metrics.jsonl"), json.loads((run / "phases.json").read_text())
    each = np.diff([line["seconds"] for line in lines])[SKIPPED - 1 :]
    spans = steps - 1 - SKIPPED
    link = (lines[steps - 2]["link_bytes"] - lines[SKIPPED - 1]["link_bytes"]) / spans
    kernel = float(np.mean(np.subtract(counted[steps - 1], counted[SKIPPED]))) / spans
    return {
        "step_time_s": float(np.median(each)),
        "compute_s": phases["forward_backward"] + phases["optimizer"],
        "encode_s": phases["encode"],
        "wire_s": phases["wire"],
        "decode_s": phases["decode"],
        "link_bytes": link,
        "kernel_bytes": kernel,
        "overhead": kernel / link - 1,
        "loss": lines[-1]["loss"],
        "steps": steps,
        "parameters": json.loads((run / "run.json").read_text())["parameters"],
    }


def _follow(
    path: Path, steps: int, net: links.Links, running: list[subprocess.Popen[str]], timeout: float
) -> dict[int, list[int]]:
    """Read the kernel's counters after each step but the last, which an evaluation follows."""
    counted: dict[int, list[int]] = {}
    last = time.monotonic() + timeout
    while len(counted) < steps - 1:
        done = path.read_bytes().count(b"\n") if path.exists() else 0
        if done and done not in counted:
            counted[done] = net.sent()
        if done >= steps or time.monotonic() > last or any(process.poll() for process in running):
            break
        time.sleep(0.002)
    return counted


def table(rows: list[dict[str, Any]]) -> Table:
    """Draw the rows.

    Args:
      rows: of `train`.

    Returns:
      A table to print.
    """
    made = Table(
        title="medians; pieces are timed apart, all hosts at once on this machine's cores; over is what "
        "the kernel counts above link_bits: headers and acknowledgements"
    )
    for name in (
        "method",
        "rate",
        "step, s",
        "faster",
        "compute",
        "encode",
        "wire",
        "decode",
        "link",
        "kernel",
        "over",
    ):
        made.add_column(name, justify="left" if name == "method" else "right", no_wrap=True)
    dense = {row["rate"]: row["step_time_s"] for row in rows if row["method"] == "dense"}
    for row in rows:
        times = [f"{row[key]:.3f}" for key in ("compute_s", "encode_s", "wire_s", "decode_s")]
        faster = f"{dense[row['rate']] / row['step_time_s']:.1f} x" if row["rate"] in dense else "-"
        made.add_row(
            row["method"], f"{row['rate'] / 1e6:g} Mbit/s", f"{row['step_time_s']:.3f}", faster, *times,
            amount(row["link_bytes"]), amount(row["kernel_bytes"]), f"{row['overhead']:.1%}",
        )  # fmt: skip
    return made


def model(row: dict[str, Any], rate: np.ndarray | float) -> Any:
    """Predict a step's time on another link: what the hosts compute, and what their links carry.

    Args:
      row: of `train`.
      rate: bits a second.

    Returns:
      Seconds.
    """
    return row["compute_s"] + row["encode_s"] + row["decode_s"] + 8 * row["kernel_bytes"] / rate


def pays_below(row: dict[str, Any], dense: dict[str, Any]) -> float:
    """Find the rate below which a method's step is shorter than the dense one, by the model.

    Args:
      row: of the method.
      dense: of the uncompressed training.

    Returns:
      Bits a second; infinite where it is always shorter.

    >>> slow = {"compute_s": 1.0, "encode_s": 0.5, "decode_s": 0.0, "kernel_bytes": 1e6}
    >>> pays_below(slow, slow | {"encode_s": 0.0, "kernel_bytes": 1.1e7})
    160000000.0
    """
    extra = sum(row[key] - dense[key] for key in ("encode_s", "decode_s"))
    return 8 * (dense["kernel_bytes"] - row["kernel_bytes"]) / extra if extra > 0 else float("inf")


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw step time against link rate: points as measured, lines by the model.

    Args:
      rows: of `train`.
      path: of the picture.
    """
    grid = np.logspace(6, 9, 100)
    names = list(dict.fromkeys(row["method"] for row in rows))
    with figures.canvas(1, path) as axes:
        for number, name in enumerate(names):
            own = [row for row in rows if row["method"] == name]
            colour = f"C{number}"
            axes[0].plot(
                [row["rate"] / 1e6 for row in own], [row["step_time_s"] for row in own], "o", color=colour, label=name
            )
            axes[0].plot(grid / 1e6, model(own[-1], grid), "-", color=colour, lw=1, alpha=0.7)
            dense = next((row for row in rows if row["method"] == "dense" and row["rate"] == own[-1]["rate"]), None)
            if dense is not None and name != "dense" and 1e6 < (below := pays_below(own[-1], dense)) < 1e9:
                axes[0].axvline(below / 1e6, color=colour, lw=0.8, ls=":")
        axes[0].set(
            xscale="log", yscale="log", xlabel="link rate, Mbit/s", ylabel="seconds a step",
            title="Step time; lines: model; dotted: pays to the left",
        )  # fmt: skip
        axes[0].legend(frameon=False)
