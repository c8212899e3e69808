"""The training program on hosts joined by slow links: where a step's time goes, and what the kernel counts.

Real processes in network namespaces on a bridge, behind token-bucket filters; JAX's own collectives over gloo. A method
trains once: its links change their rate while it does.
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
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console

from train import methods
from train.bench import figures, links
from train.bench.network_picture import draw, table
from train.config import settle
from train.errors import HostError, Interrupted, UsageError
from train.log import read
from train.main import parse

COLD = 2  # first periods, which are not counted: the first compiles, the second finds cold connections
MEANT = 20  # steps whose mean loss is compared with --loss
UNSHAPED = "none"
UNITS = {"kbit": 1e3, "mbit": 1e6, "gbit": 1e9}
MODEL = [
    "--data", "stdlib", "--model", "transformer", "--width", "512", "--layers", "1", "--heads", "8", "--window", "16",
    "--eval-every", "1000000", "--local-steps", "1", "--schedule", "constant", "--check-every", "0",
    "--checkpoint-every", "0", "--no-dense-reference",
]  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Args:
    """Train over real, slow links between hosts that are network namespaces. Wants Linux, root and iproute2.

    Each method trains once, first on links without a shaper, then on those of each rate. Step times are medians; where
    hosts meet only each few steps, of means over whole periods.
    """

    hosts: int = 4
    """Number of hosts."""
    rate: str = "20mbit"
    """Rates of each host's link, both ways, separated by commas, such as 5mbit,20mbit,100mbit; none: not shaped."""
    methods: str = "dense,partition:exchange=all_gather,partition:exchange=reduce_scatter,powersgd"
    """Methods, separated by commas, as of train.compare."""
    ratio: float = 100.0
    """Payload ratio asked of the methods that have one."""
    steps: int = 12
    """Steps counted at each rate."""
    dense_steps: int = 3
    """Steps of the uncompressed training, which take long on a slow link, counted at each rate."""
    loss: float | None = None
    """Training loss to reach, as a mean of 20 steps: its time is the steps to it, which do not go by the link, times
    the step time at each rate."""
    loss_steps: int = 300
    """With --loss: steps to try, without a shaper."""
    json: Path | None = None
    """File to write the figures to."""
    figure: Path = Path("network.png")
    """Picture to draw."""
    timeout: float = 1800.0
    """Seconds that one training may take."""
    clean: bool = False
    """Remove what a killed benchmark left behind, and do nothing else."""


class Stretch(NamedTuple):
    """Steps of a training at one rate."""

    rate: str  # as tc writes it, or UNSHAPED
    start: int  # steps done before the first that is counted
    stop: int


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
    for option, steps in (("--steps", args.steps), ("--dense-steps", args.dense_steps)):
        if steps < 2:
            raise UsageError(f"{option} {steps} is out of range: give 2 or more")
    for text in args.rate.split(","):
        bits(text)
    labels = methods.parse_many(args.methods)

    def end(number: int, frame: FrameType | None) -> None:
        raise Interrupted(number)

    before = signal.signal(signal.SIGTERM, end)
    rows: list[dict[str, Any]] = []
    try:
        with links.Links(args.hosts, None) as net, tempfile.TemporaryDirectory() as folder:
            for label in labels:
                console.print(f"{label.text} ...")
                rows += train(args, net, label, Path(folder), console)
                if args.json:
                    args.json.write_text(json.dumps({"hosts": args.hosts, "rows": rows}, indent=1) + "\n")
    finally:
        signal.signal(signal.SIGTERM, before)
    console.print(table(rows))
    draw(rows, args.figure)
    console.print(f"picture: {args.figure}")


def bits(rate: str) -> float | None:
    """Read a rate as tc writes it.

    >>> bits("20mbit")
    20000000.0
    """
    if rate.strip() == UNSHAPED:
        return None
    found = re.fullmatch(r"(\d+(?:\.\d+)?)(kbit|mbit|gbit)", rate.strip())
    if not found or not float(found[1]):
        raise UsageError(f"--rate {rate} is no rate: give one such as 20mbit (kbit, mbit or gbit), or none")
    return float(found[1]) * UNITS[found[2]]


def plan(rates: Sequence[str], steps: int, period: int) -> list[Stretch]:
    """Lay out a training: a period in which the rate changes is not counted.

    Args:
      rates: asked for.
      steps: to count at each, rounded up to periods, of which there are two at least.
      period: steps to an exchange.

    Returns:
      Stretches, the first without a shaper.

    >>> plan(["20mbit", "none"], 3, 1)
    [Stretch(rate='none', start=2, stop=5), Stretch(rate='20mbit', start=6, stop=9)]
    """
    found, done, counted = [], COLD * period, max(2, -(-steps // period)) * period
    for rate in dict.fromkeys([UNSHAPED, *(rate.strip() for rate in rates)]):
        found.append(Stretch(rate, done, done + counted))
        done += counted + period
    return found


def train(args: Args, net: links.Links, label: methods.Label, folder: Path, console: Console) -> list[dict[str, Any]]:
    """Run one training on all hosts, and take its figures.

    Args:
      args: of the command line.
      net: the hosts, not shaped.
      label: of the method.
      folder: to leave runs in.
      console: to say on how far it is.

    Returns:
      A row for each rate asked for: seconds a step and of its pieces, bytes a step that leave one host, by `gp.stats`
      and by the kernel.

    Raises:
      HostError: it did not end well.
    """
    given = [
        *MODEL, "--devices", str(args.hosts), "--batch", str(args.hosts), "--method", label.text,
        "--ratio", str(args.ratio), "--workdir", str(folder), "--name", label.folder, "--heartbeat", "300",
        "--timeout", str(args.timeout),
    ]  # fmt: skip
    period = methods.tuned(settle(parse(given)), label).local_steps
    stretches = plan(args.rate.split(","), args.dense_steps if label.kind == "dense" else args.steps, period)
    # An evaluation follows the last step
    given += ["--steps", str(max(stretches[-1].stop + period, args.loss_steps if args.loss is not None else 0))]
    given += ["--coordinator", f"{net.address(0)}:7000", "--processes", str(args.hosts), "--process"]
    logs = [folder / f"{label.folder}-{host}.log" for host in range(args.hosts)]
    run = folder / label.folder / label.folder
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(path.open("w")) for path in logs]
        running = [
            subprocess.Popen(
                [*net.command(host), sys.executable, "-m", "train.main", *given, str(host)],
                stdout=files[host],
                stderr=subprocess.STDOUT,
                text=True,
            )
            for host in range(args.hosts)
        ]
        stack.enter_context(links.ended(running))
        stack.callback(net.shape, None)
        follower = _Follower(run / "metrics.jsonl", net, running, time.monotonic() + args.timeout)
        counted = [follower.count(stretch, console) for stretch in stretches]
        net.shape(None)
        for process in running:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, follower.last - time.monotonic()))
        if any(process.returncode != 0 for process in running):
            said = "\n".join(path.read_text()[-600:] for path in logs)
            raise HostError(f"{label.text} did not train to its end:\n{said}")
    rows = _rows(read(run / "metrics.jsonl"), json.loads((run / "phases.json").read_text()), stretches, counted, period)
    steps = None if args.loss is None else _reached(read(run / "metrics.jsonl"), args.loss)
    asked = [bits(text) for text in args.rate.split(",")]
    common = {"parameters": json.loads((run / "run.json").read_text())["parameters"], "steps_to_loss": steps}
    return [
        {"method": label.text} | row | common | {"to_loss_s": None if steps is None else steps * row["step_time_s"]}
        for row in rows
        if row["rate"] in asked
    ]


class _Follower:
    """Follows a training by its metrics, and sets its links.

    Args:
      path: of the metrics.
      net: the hosts.
      running: their processes.
      last: when to give up, by the monotonic clock.
    """

    def __init__(self, path: Path, net: links.Links, running: list[subprocess.Popen[str]], last: float) -> None:
        self._path, self._net, self._running, self.last = path, net, running, last

    def count(self, stretch: Stretch, console: Console) -> list[tuple[int, list[int]]]:
        """Read the kernel's counters at both ends of a stretch; gives them with the steps done by then."""
        self._net.shape(None if stretch.rate == UNSHAPED else stretch.rate)
        found = [self._wait(stretch.start), self._wait(stretch.stop)]
        console.print(f"  {stretch.rate}: {found[1][0]} steps")
        return found

    def _wait(self, steps: int) -> tuple[int, list[int]]:
        done = 0
        while done < steps and time.monotonic() < self.last and all(one.poll() is None for one in self._running):
            time.sleep(0.003)
            done = self._path.read_bytes().count(b"\n") if self._path.exists() else 0
        return done, self._net.sent()


def _rows(
    lines: list[dict[str, Any]],
    phases: dict[str, Any],
    stretches: list[Stretch],
    counted: list[list[tuple[int, list[int]]]],
    period: int,
) -> list[dict[str, Any]]:
    seconds, sent = (np.array([0.0, *(line[key] for line in lines)]) for key in ("seconds", "link_bytes"))
    rows: list[dict[str, Any]] = []
    for (rate, start, stop), ((first, before), (last, after)) in zip(stretches, counted, strict=True):
        step = float(np.median(np.diff(seconds[start : stop + 1 : period]))) / period
        link = float(sent[stop] - sent[start]) / (stop - start)
        # A counter may have been read a step late
        overhead = float(np.mean(np.subtract(after, before)) / (sent[last] - sent[first])) - 1
        unshaped = rows[0]["step_time_s"] if rows else step
        rows.append(
            {
                "rate": bits(rate),
                "step_time_s": step,
                "unshaped_s": unshaped,
                "compute_s": phases["forward_backward"] + phases["optimizer"],
                "encode_s": phases["encode"],
                "wire_s": max(0.0, phases["wire"] + step - unshaped),
                "decode_s": phases["decode"],
                "link_bytes": link,
                "kernel_bytes": link * (1 + overhead),
                "overhead": overhead,
                "steps": stop - start,
            }
        )
    return rows


def _reached(lines: list[dict[str, Any]], loss: float) -> int | None:
    """Find the steps after which the mean of the last losses is as low as asked for."""
    totals = np.cumsum([0.0, *(line["loss"] for line in lines)])
    low = np.flatnonzero(totals[MEANT:] - totals[:-MEANT] <= MEANT * loss)
    return int(low[0]) + MEANT if low.size else None
