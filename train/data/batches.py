"""Going through a split: the order, each process's share, augmentation."""

from __future__ import annotations

from collections.abc import Generator, Iterator

import numpy as np

from train.data.augment import AUGMENTATIONS
from train.data.prefetch import prefetched
from train.data.sets import Batch, Split
from train.errors import UsageError


def batches(
    split: Split,
    size: int,
    seed: int,
    start: int,
    *,
    process: int = 0,
    processes: int = 1,
    augment: str | None = None,
    prefetch: int = 2,
) -> Generator[Batch, None, None]:
    """Go through a split again and again, in another order each epoch.

    What a step sees is a function of the seed and the step alone: neither where one starts, nor the number of
    processes, nor the prefetch changes it. Each process gets its own contiguous share of every batch.

    Args:
      split: to read from.
      size: of a batch over all processes; what is left of an epoch is left out.
      seed: of the order and the augmentation.
      start: step to begin with.
      process: number of this process.
      processes: their number.
      augment: a name of AUGMENTATIONS, for images; None for none.
      prefetch: batches to read ahead in a background thread; 0 reads when asked.

    Returns:
      Batches, without end; `close()` ends the background thread.

    Raises:
      UsageError: the batch is larger than the split or cannot be shared, or the augmentation is unknown.
    """
    if size > split.size:
        raise UsageError(f"--batch {size} is more than the {split.size} training examples: use a smaller one")
    if size % processes:
        near = max(1, round(size / processes)) * processes
        raise UsageError(f"--batch {size} does not divide among {processes} processes: use --batch {near}")
    if augment is not None and augment not in AUGMENTATIONS:
        raise UsageError(f"--augment {augment} is unknown: choose one of {', '.join(AUGMENTATIONS)}")
    share = size // processes
    return prefetched(_read(split, size, seed, start, process * share, share, augment), prefetch)


def _read(
    split: Split, size: int, seed: int, start: int, first: int, share: int, augment: str | None
) -> Iterator[Batch]:
    rounds = split.size // size
    step = start
    while True:
        epoch, place = divmod(step, rounds)
        order = np.random.default_rng((seed, epoch)).permutation(split.size)
        for at in range(place, rounds):
            batch = split.read(order[at * size + first : at * size + first + share])
            if augment is not None:
                batch["input"] = AUGMENTATIONS[augment](batch["input"], seed, step, first, size)
            yield batch
            step += 1
