"""The training program on hosts joined by slow links: where a step's time goes, and what the kernel counts.

Real processes in network namespaces on a bridge, behind token-bucket filters; JAX's own collectives over gloo. A method
trains once: its links change their rate while it does.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console

from train import methods
from train.bench import figures, links
from train.bench.links import UNSHAPED, bits
from train.bench.network_picture import draw, tables
from train.bench.network_rows import Stretch, plan, reached, rows_of
from train.config import settle
from train.errors import HostError, Interrupted, UsageError
from train.log import read
from train.main import parse

GRACE = 15.0  # seconds that processes have to end by themselves, once one has failed
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
        with links.Links(args.hosts) as net, tempfile.TemporaryDirectory() as folder:
            for label in labels:
                console.print(f"{label.text} ...")
                rows += train(args, net, label, Path(folder), console)
                if args.json:
                    args.json.write_text(json.dumps({"hosts": args.hosts, "rows": rows}, indent=1) + "\n")
    finally:
        signal.signal(signal.SIGTERM, before)
    for table in tables(rows):
        console.print(table)
    draw(rows, args.figure)
    console.print(f"picture: {args.figure}")


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
    period = methods.tuned(settle(parse(given)), label).exchange.local_steps
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
        stack.callback(net.shape, UNSHAPED)
        follower = _Follower(run / "metrics.jsonl", net, running, time.monotonic() + args.timeout)
        counted = [follower.count(stretch, console) for stretch in stretches]
        net.shape(UNSHAPED)
        if not follower.finish():
            said = "\n".join(path.read_text()[-600:] for path in logs)
            raise HostError(f"{label.text} did not train to its end:\n{said}")
    lines = read(run / "metrics.jsonl")
    rows = rows_of(lines, json.loads((run / "phases.json").read_text()), stretches, counted, period)
    steps = None if args.loss is None else reached(lines, args.loss)
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
        self._path, self._net, self._running, self._last = path, net, running, last

    def count(self, stretch: Stretch, console: Console) -> list[tuple[int, list[int]]]:
        """Read the kernel's counters at both ends of a stretch; gives them with the steps done by then."""
        self._net.shape(stretch.rate)
        found = [self._wait(stretch.start), self._wait(stretch.stop)]
        if found[1][0] >= stretch.stop:
            console.print(f"  {stretch.rate}: step {found[1][0]}")
        return found

    def finish(self) -> bool:
        """Wait for the end, where a process has failed for GRACE seconds, and say whether all have ended well."""
        while any(one.poll() is None for one in self._running) and time.monotonic() < self._last:
            if any(one.returncode for one in self._running):
                self._last = min(self._last, time.monotonic() + GRACE)
            time.sleep(0.05)
        return all(one.returncode == 0 for one in self._running)

    def _wait(self, steps: int) -> tuple[int, list[int]]:
        done = 0
        while done < steps and time.monotonic() < self._last and all(one.poll() is None for one in self._running):
            time.sleep(0.003)
            done = self._path.read_bytes().count(b"\n") if self._path.exists() else 0
        return done, self._net.sent()
