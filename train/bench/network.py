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

from train import figures, methods
from train.bench import links, network_torch
from train.bench.links import UNSHAPED, bits
from train.bench.network_follower import Follower, Training
from train.bench.network_picture import draw, tables
from train.bench.network_rows import plan, reached, rows_of
from train.config import settle
from train.errors import HostError, Interrupted, UsageError
from train.labels import Label, parse_label, split_labels
from train.launch import NOISE
from train.limits import MANY, within
from train.log import read, write_text
from train.main import parse
from train.screen import paper, say

MODEL = [
    "--data", "stdlib", "--model", "transformer", "--width", "512", "--layers", "1", "--heads", "8", "--window", "16",
    "--eval-every", "1000000", "--local-steps", "1", "--schedule", "constant", "--check-every", "0",
    "--checkpoint-every", "0", "--no-dense-reference",
]  # fmt: skip
SHOWN = 8  # lines of each host's log, where a training fails


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
    """Methods, separated by commas, as of train.compare; where PyTorch is installed also torch:dense and
    torch:powersgd or torch:powersgd:rank=1, its DistributedDataParallel over gloo on a model of the same size."""
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
    labels = labels_of(args.methods)
    problem = links.missing()
    if problem:
        raise UsageError(problem)
    console = paper()
    if args.clean:
        console.print(f"{links.clean()} namespaces removed")
        return
    figures.check(args.figure, args.json)
    within(
        ("--hosts", args.hosts, 2, 100),
        ("--ratio", args.ratio, 1, 1e5),
        ("--steps", args.steps, 2, MANY),
        ("--dense-steps", args.dense_steps, 2, MANY),
        ("--loss-steps", args.loss_steps, 1, MANY),
        ("--timeout", args.timeout, 1, 1e9),
    )
    for text in args.rate.split(","):
        bits(text)

    def end(number: int, frame: FrameType | None) -> None:
        raise Interrupted(number)

    before = signal.signal(signal.SIGTERM, end)
    rows: list[dict[str, Any]] = []
    failures: list[str] = []
    try:
        with links.Links(args.hosts) as net, tempfile.TemporaryDirectory() as folder:
            for label in labels:
                console.print(f"{label.text} ...")
                try:
                    rows += train(args, net, label, Path(folder), console)
                except HostError as error:  # the other methods' figures are worth having
                    failures.append(str(error))
                    console.print(f"  {label.text} failed")
                if args.json:
                    write_text(json.dumps({"hosts": args.hosts, "rows": rows}, indent=1) + "\n", args.json)
    finally:
        signal.signal(signal.SIGTERM, before)
    if rows:
        for table in tables(rows):
            console.print(table)
        draw(rows, args.figure)
        say(console, f"picture: {args.figure}")
    if failures:
        raise HostError("\n".join(failures))


def labels_of(text: str) -> list[Label | network_torch.Label]:
    """Read --methods.

    Args:
      text: labels, separated by commas.

    Returns:
      Labels, of this package's methods and of PyTorch's.

    Raises:
      UsageError: one is unknown or given twice, or PyTorch is named and not installed.
    """
    pieces = split_labels(text)
    torch = network_torch.PREFIX
    return [network_torch.parse(x) if x.startswith(torch) else parse_label(x, "--methods") for x in pieces]


def train(
    args: Args, net: links.Links, label: Label | network_torch.Label, folder: Path, console: Console
) -> list[dict[str, Any]]:
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
    training = prepare(args, net, label, folder)
    logs = [folder / f"{label.folder}-{host}.log" for host in range(args.hosts)]
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(path.open("w")) for path in logs]
        running = [
            subprocess.Popen([*net.command(host), *command], stdout=files[host], stderr=subprocess.STDOUT, text=True)
            for host, command in enumerate(training.commands)
        ]
        stack.enter_context(links.ended(running))
        stack.callback(net.shape, UNSHAPED)
        follower = Follower(training.metrics, net, running, time.monotonic() + args.timeout)
        counted = [follower.count(stretch, console) for stretch in training.stretches]
        net.shape(UNSHAPED)
        if not follower.finish():
            said = "\n".join(_ending(path) for path in logs)
            raise HostError(f"{label.text} did not train to its end:\n{said}")
    lines, facts = training.results()
    rows = rows_of(lines, facts, training.stretches, counted, training.period)
    steps = None if args.loss is None else reached(lines, args.loss)
    asked = [bits(text) for text in args.rate.split(",")]
    common = {"parameters": facts["parameters"], "steps_to_loss": steps}
    return [
        {"method": label.text} | row | common | {"to_loss_s": None if steps is None else steps * row["step_time_s"]}
        for row in rows
        if row["rate"] in asked
    ]


def _ending(log: Path) -> str:
    """Give the last lines that a host has said of its own accord."""
    lines = [line for line in log.read_text().splitlines() if line.strip() and not line.startswith(NOISE)]
    return "\n".join(lines[-SHOWN:])


def prepare(args: Args, net: links.Links, label: Label | network_torch.Label, folder: Path) -> Training:
    """Lay out one training, by JAX or by PyTorch.

    Args:
      args: of the command line.
      net: the hosts.
      label: of the method.
      folder: to leave runs in.

    Returns:
      How to start it, and to follow it.
    """
    given = [
        *MODEL, "--devices", str(args.hosts), "--batch", str(args.hosts), "--ratio", str(args.ratio),
        "--workdir", str(folder), "--name", label.folder, "--heartbeat", "300", "--timeout", str(args.timeout),
    ]  # fmt: skip
    rates, least = args.rate.split(","), args.loss_steps if args.loss is not None else 0
    counted = args.dense_steps if label.kind in ("dense", f"{network_torch.PREFIX}dense") else args.steps
    config = settle(parse(given))
    if isinstance(label, network_torch.Label):
        return network_torch.prepare(label, config, plan(rates, counted, 1, network_torch.START), least, net)
    period = methods.tuned(config, label).exchange.local_steps
    stretches = plan(rates, counted, period)
    # An evaluation follows the last step
    given += ["--method", label.text, "--steps", str(max(stretches[-1].stop + period, least))]
    given += ["--coordinator", f"{net.address(0)}:7000", "--processes", str(args.hosts), "--process"]
    run = folder / label.folder / label.folder

    def results() -> tuple[list[dict[str, Any]], dict[str, Any]]:
        phases, header = (json.loads((run / name).read_text()) for name in ("phases.json", "run.json"))
        return read(run / "metrics.jsonl"), phases | {"parameters": header["parameters"]}

    commands = [[sys.executable, "-m", "train.main", *given, str(host)] for host in range(args.hosts)]
    return Training(commands, run / "metrics.jsonl", stretches, period, results)
