"""What a data set is to the rest of the program."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import numpy as np

Kind = Literal["image", "text"]
Batch = dict[str, np.ndarray]  # input [B, ...], label int32[B, ...]


class Dataset(NamedTuple):
    """Examples to train on and to test on."""

    inputs: tuple[int, ...]  # shape of one input
    classes: int
    kind: Kind
    train: Split
    test: Split


class Split(NamedTuple):
    """A split: random access by example number."""

    size: int
    read: Callable[[np.ndarray], Batch]  # of int64[B]; may be called by several threads at once
