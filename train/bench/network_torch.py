"""The network benchmark's rows of PyTorch: DistributedDataParallel over gloo, plain or with PyTorch's PowerSGD hook.

The JAX benchmark's model, data, batches, optimizer and links; gradients are exchanged before the optimizer. PyTorch is
never needed but for these rows.
"""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from typing import Any, NamedTuple

import numpy as np

from train import data, optimizer
from train.bench.links import Links
from train.bench.network_follower import Training
from train.bench.network_rows import Stretch
from train.config import Config, change
from train.errors import UsageError
from train.log import read

PREFIX = "torch:"
START = 2  # uncompressed steps, which DistributedDataParallel lays out its buckets in: the fewest that the hook allows
PORT = 7001
METRICS = "metrics-{}.jsonl"  # of each host


class Label(NamedTuple):
    """A method as users name it: `torch:dense`, `torch:powersgd` or `torch:powersgd:rank=2`."""

    text: str
    compressed: bool
    rank: int | None  # None takes the highest within the ratio

    @property
    def kind(self) -> str:
        """The method's name."""
        return PREFIX + ("powersgd" if self.compressed else "dense")

    @property
    def folder(self) -> str:
        """The label as part of a folder's name."""
        return self.text.replace(":", "-").replace(",", "-")


def parse(text: str) -> Label:
    """Read a label.

    Args:
      text: that begins with PREFIX.

    Returns:
      Label.

    Raises:
      UsageError: the method or its option is unknown, or PyTorch is not installed.
    """
    kind, _, rest = text.removeprefix(PREFIX).replace(",", ":").partition(":")
    if kind not in ("dense", "powersgd"):
        raise UsageError(f"--methods {text} is unknown: choose {PREFIX}dense or {PREFIX}powersgd")
    offered = "it has rank=..., a whole number from 1 on" if kind == "powersgd" else "it has none"
    found = re.fullmatch(r"rank=([1-9]\d{0,3})", rest) if kind == "powersgd" else None
    if rest and not found:
        raise UsageError(f"--methods {text}: {rest!r} is no option of {PREFIX}{kind}: {offered}")
    if importlib.util.find_spec("torch") is None:
        raise UsageError(f"--methods {text} needs PyTorch, which is not installed: pip install torch")
    return Label(text, kind == "powersgd", int(found[1]) if found else None)


def prepare(label: Label, config: Config, stretches: list[Stretch], least: int, net: Links) -> Training:
    """Write down a training.

    Args:
      label: of the method.
      config: settled: of the JAX benchmark's training.
      stretches: whose steps are counted.
      least: steps to train at least.
      net: the hosts.

    Returns:
      How to start it, and to follow it.
    """
    config = change(config, steps=max(stretches[-1].stop + 1, least))
    task, training, folder = config.task, config.training, config.folder
    folder.mkdir()
    source = data.load(task.data, task.data_dir, window=task.window or data.WINDOW)
    rates = optimizer.schedule(config)
    job = {
        "coordinator": f"{net.address(0)}:{PORT}",
        "hosts": net.hosts,
        "timeout": config.hosts.timeout,
        "compressed": label.compressed,
        "rank": label.rank,
        "ratio": config.exchange.ratio,
        "start": START,
        "seed": training.seed,
        "rates": [float(rates(step)) for step in range(training.steps)],
        "b1": training.b1,
        "b2": training.b2,
        "clip": training.clip,
        "model": {
            "classes": source.classes,
            "width": task.width,
            "layers": task.layers,
            "heads": task.heads,
            "window": source.inputs[0],
        },
    }
    (folder / "job.json").write_text(json.dumps(job))
    batches = data.batches(source.train, net.hosts, training.seed, 0, prefetch=0)
    taken = [next(batches) for _ in range(training.steps)]
    tokens, labels = (np.stack([batch[key] for batch in taken]) for key in ("input", "label"))
    np.savez(folder / "batches.npz", input=tokens, label=labels)

    def results() -> tuple[list[dict[str, Any]], dict[str, Any]]:
        each = [read(folder / METRICS.format(host)) for host in range(net.hosts)]
        lines = [
            step[0] | {"loss": float(np.mean([line["loss"] for line in step]))} for step in zip(*each, strict=True)
        ]
        return lines, json.loads((folder / "phases.json").read_text())

    worker = [sys.executable, "-m", "train.bench.torch_worker", str(folder)]
    commands = [[*worker, str(host), net.interface(host)] for host in range(net.hosts)]
    return Training(commands, folder / METRICS.format(0), stretches, 1, results)
