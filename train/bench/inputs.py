"""How many examples a second the input gives, on pictures of CIFAR's shape: decoded, kept, augmented, read ahead."""

from __future__ import annotations

import dataclasses
import itertools
import tempfile
import time
from pathlib import Path

from rich.table import Table

from train import data
from train.limits import within
from train.screen import paper


@dataclasses.dataclass(frozen=True)
class Args:
    """Time the input of training: examples a second, with and without augmentation and reading ahead."""

    batch: int = 128
    """Examples of a batch."""
    seconds: float = 2.0
    """How long each row is timed."""


def main(args: Args) -> None:
    """Time every row, and print the table.

    Args:
      args: of the command line.

    Raises:
      UsageError: an option is out of range.
    """
    from train.data.load import quiet
    from train.datasets.noise import EXAMPLES, GradpartNoise

    within(("--batch", args.batch, 1, EXAMPLES["train"]), ("--seconds", args.seconds, 0.01, 600))
    console = paper()
    table = Table("input", "augmentation", "read ahead", "examples/s", "ms a batch")
    with tempfile.TemporaryDirectory() as folder:
        with quiet():
            GradpartNoise(data_dir=folder, file_format="array_record").download_and_prepare(file_format="array_record")
        for augment, ahead in ((None, 0), ("flip-crop", 2)):
            split = data.load(GradpartNoise.name, Path(folder)).train
            rounds = split.size // args.batch
            # One epoch is all that there is to decode.
            rate = rate_of(split, args.batch, augment, ahead, most=max(1, rounds // 2))
            table.add_row("first epoch, decoded", *row(augment, ahead, rate, args.batch))
        rate_of(split, args.batch, None, 0, most=2 * rounds)  # the rest is decoded here
        for augment, ahead in itertools.product((None, "flip-crop"), (0, 2)):
            rate = rate_of(split, args.batch, augment, ahead, seconds=args.seconds)
            table.add_row("later epochs, kept", *row(augment, ahead, rate, args.batch))
    console.print(table)


def rate_of(
    split: data.Split,
    size: int,
    augment: str | None,
    ahead: int,
    *,
    most: int | None = None,
    seconds: float = float("inf"),
) -> float:
    """Time batches as training takes them.

    Args:
      split: to read.
      size: of a batch.
      augment: as in `data.batches`.
      ahead: batches to read ahead.
      most: batches to take; None for as many as the time allows.
      seconds: to take them for.

    Returns:
      Examples a second.
    """
    source = data.batches(split, size, 0, 0, augment=augment, prefetch=ahead)
    began, taken = time.perf_counter(), 0
    while taken != most and time.perf_counter() - began < seconds:
        next(source)
        taken += 1
    rate = taken * size / (time.perf_counter() - began)
    source.close()
    return rate


def row(augment: str | None, ahead: int, rate: float, size: int) -> tuple[str, str, str, str]:
    """Write a row's cells."""
    return augment or "none", str(ahead or "no"), f"{rate:,.0f}", f"{1e3 * size / rate:.2f}"
