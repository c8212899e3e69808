"""Augmentation of images: a pure function of (seed, step, example)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

PART = 8  # of a side that is padded on each side: 4 pixels of 32, as is usual


def flip_crop(images: np.ndarray, seed: int, step: int, first: int, size: int) -> np.ndarray:
    """Mirror every other image at random, pad all, and cut the old size out at random.

    Args:
      images: float32[B, H, W, C], normalised: what is padded is 0, the mean.
      seed: of the run.
      step: that the batch is for.
      first: place of the first image in the global batch.
      size: of the global batch.

    Returns:
      float32[B, H, W, C].
    """
    count, height, width, channels = images.shape
    # Drawn for the whole batch, so that an image's luck does not depend on the process that reads it.
    random = np.random.default_rng((seed, step, 1))
    pad = max(1, min(height, width) // PART)
    top, left = random.integers(0, 2 * pad + 1, (2, size))[:, first : first + count]
    mirrored = random.integers(0, 2, size)[first : first + count] == 1
    padded = np.zeros((count, height + 2 * pad, width + 2 * pad, channels), images.dtype)
    inner = padded[:, pad : pad + height, pad : pad + width]
    inner[~mirrored] = images[~mirrored]
    inner[mirrored] = images[mirrored, :, ::-1]
    # Pixels and channels as one axis: whole rows are copied at once.
    rows = padded.reshape(count, height + 2 * pad, -1)
    views = sliding_window_view(rows, (height, width * channels), axis=(1, 2))[:, :, ::channels]
    return views[np.arange(count), top, left].reshape(images.shape)


AUGMENTATIONS: Mapping[str, Callable[[np.ndarray, int, int, int, int], np.ndarray]] = MappingProxyType(
    {"flip-crop": flip_crop}
)
