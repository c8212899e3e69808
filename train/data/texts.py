"""Text as bytes, cut into windows for a language model."""

from __future__ import annotations

from typing import Any

import numpy as np

from train.data.sets import Batch, Dataset, Split
from train.errors import UsageError

WINDOW = 64  # bytes that a language model sees at once
EVALUATED = 2048  # windows of text in an evaluation, at most
KEPT = 2**26  # bytes of text that are read of a split


def key_of(info: Any) -> str | None:
    """Find the feature that is text.

    Args:
      info: of the data set's builder.

    Returns:
      Its name; None where there is none, or where it is one of several.
    """
    import tensorflow_datasets as tfds

    features = info.features
    if "text" in features:
        return "text"
    texts = [key for key in features if isinstance(features[key], tfds.features.Text)]
    return texts[0] if len(texts) == 1 and len(features) == 1 else None


def dataset(name: str, key: str, train: Any, test: Any, window: int) -> Dataset:
    """Make a data set of two sources of text.

    Args:
      name: of the data set.
      key: of `key_of`.
      train: sequence of examples; of a very large one, the first 64 MiB are read.
      test: another one.
      window: bytes of text that an example has.

    Returns:
      Dataset: each label is the byte after.

    Raises:
      UsageError: there is less text than a window, or too little for any.
    """
    splits = _windows(name, key, train, window, None), _windows(name, key, test, window, EVALUATED)
    return Dataset((window,), 256, "text", *splits)


def _windows(name: str, key: str, source: Any, window: int, most: int | None) -> Split:
    text = _text(source, key)
    if text.size < 3:
        raise UsageError(f"--data {name} has too little text to learn from or to test on: choose another set")
    if not 2 <= window < text.size:
        raise UsageError(
            f"--window {window} is out of range for --data {name}, which has a split of {text.size} bytes: "
            f"give 2 to {text.size - 1}"
        )
    count = (text.size - 1) // window
    stride = max(1, count // most) if most else 1

    def read(numbers: np.ndarray) -> Batch:
        places = numbers[:, None] * (stride * window) + np.arange(window + 1)[None, :]
        found = text[places].astype(np.int32)
        return {"input": found[:, :-1], "label": found[:, 1:]}

    return Split(min(count // stride, most or count), read)


def _text(source: Any, key: str) -> np.ndarray:
    parts, size = [], 0
    for number in range(len(source)):
        content = source[number][key]
        if not isinstance(content, np.ndarray):
            # What was an example of its own ends in a line of its own.
            content = content.encode() if isinstance(content, str) else content
            content = np.frombuffer(content.removesuffix(b"\n") + b"\n", np.uint8)
        parts.append(content)
        size += content.size
        if size >= KEPT:
            break
    return np.concatenate(parts)[:KEPT]
