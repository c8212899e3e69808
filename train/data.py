"""Data sets behind one interface, in an order that is a pure function of (seed, epoch, step)."""

from __future__ import annotations

import contextlib
import io
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from train.config import EMBEDDED
from train.errors import UsageError

WINDOW = 64  # bytes that a language model sees at once
EVALUATED = 2048  # windows of text in an evaluation


class Dataset(NamedTuple):
    """Examples to train on and to test on."""

    inputs: tuple[int, ...]  # shape of one input
    classes: int
    train: Split
    test: Split


class Split(NamedTuple):
    """A split: random access by example number."""

    size: int
    read: Callable[[np.ndarray], dict[str, np.ndarray]]  # int64[B] -> input [B, ...], label int32[B, ...]


def load(name: str, data_dir: Path | None) -> Dataset:
    """Prepare an embedded data set, or open a prepared one of tfds.

    Args:
      name: digits, stdlib, or a name that tfds knows.
      data_dir: where it lies; None for tfds' own folder.

    Returns:
      Dataset.

    Raises:
      UsageError: the data set is unknown, is not prepared, or has no fixed-size images with labels.
    """
    with _quiet():
        return _text(data_dir) if name == "stdlib" else _images(name, data_dir)


def batches(split: Split, size: int, seed: int, start: int) -> Iterator[dict[str, np.ndarray]]:
    """Go through a split again and again, in another order each epoch.

    Args:
      split: to read from.
      size: of a batch; what is left of an epoch is left out.
      seed: of the order.
      start: step to begin with.

    Yields:
      Batches, without end.

    Raises:
      UsageError: the batch is larger than the split.
    """
    rounds = split.size // size
    if not rounds:
        raise UsageError(f"--batch {size} is more than the {split.size} training examples: use a smaller one")
    step = start
    while True:
        epoch, place = divmod(step, rounds)
        order = np.random.default_rng((seed, epoch)).permutation(split.size)
        for at in range(place, rounds):
            yield split.read(order[at * size : (at + 1) * size])
            step += 1


def _images(name: str, data_dir: Path | None) -> Dataset:
    import tensorflow_datasets as tfds

    from train.datasets.digits import GradpartDigits

    where = {"data_dir": str(data_dir)} if data_dir else {}
    try:
        builder = (
            GradpartDigits(**where, file_format="array_record") if name == "digits" else tfds.builder(name, **where)
        )
    except (tfds.core.DatasetNotFoundError, ValueError) as error:
        raise UsageError(
            f"--data {name} is unknown to tfds: {', '.join(EMBEDDED)} are embedded, "
            "and tensorflow.org/datasets lists the others"
        ) from error
    if name == "digits":
        builder.download_and_prepare(file_format="array_record")
    keys = builder.info.supervised_keys
    if not keys or len(keys) != 2 or not isinstance(keys[0], str):
        raise UsageError(f"--data {name} has no single input with a label: choose an image classification set")
    try:
        sources = [builder.as_data_source(split=split) for split in ("train", "test")]
    except (NotImplementedError, ValueError, AssertionError, OSError) as error:
        prepare = f"tfds build {name} --file_format=array_record" + (f" --data_dir={data_dir}" if data_dir else "")
        raise UsageError(
            f"--data {name} is not prepared as array_record: run `pip install -e '.[tfds]' && {prepare}` once, "
            f"or use an embedded set ({', '.join(EMBEDDED)})"
        ) from error
    shape = tuple(builder.info.features[keys[0]].shape)
    if len(shape) != 3 or None in shape:
        raise UsageError(f"--data {name} has inputs of shape {shape}: choose a set of images of one fixed size")
    if name == "digits":
        classes, peak = builder.info.metadata["classes"], float(builder.info.metadata["peak"])
    else:
        classes, peak = builder.info.features[keys[1]].num_classes, 255.0
    train, test = (_image_split(source, keys, peak) for source in sources)
    return Dataset(shape, classes, train, test)


def _image_split(source: Any, keys: tuple[str, str], peak: float) -> Split:
    def read(numbers: np.ndarray) -> dict[str, np.ndarray]:
        examples = [source[int(n)] for n in numbers]
        images = np.stack([example[keys[0]] for example in examples])
        labels = np.asarray([example[keys[1]] for example in examples], np.int32)
        return {"input": images.astype(np.float32) / peak - 0.5, "label": labels}

    if len(source) * np.prod(np.shape(source[0][keys[0]])) > 2**26:
        return Split(len(source), read)
    # A small set is decoded once, and then sliced.
    kept = read(np.arange(len(source)))
    return Split(len(source), lambda numbers: {key: value[numbers] for key, value in kept.items()})


def _text(data_dir: Path | None) -> Dataset:
    from train.datasets.stdlib import GradpartStdlib

    where = {"data_dir": str(data_dir)} if data_dir else {}
    builder = GradpartStdlib(**where, file_format="array_record")
    builder.download_and_prepare(file_format="array_record")
    train, test = (builder.as_data_source(split=split) for split in ("train", "test"))
    return Dataset((WINDOW,), 256, _windows(train, None), _windows(test, EVALUATED))


def _windows(source: Any, most: int | None) -> Split:
    text = np.concatenate([source[i]["text"] for i in range(len(source))])
    count = (text.size - 1) // WINDOW
    stride = max(1, count // most) if most else 1

    def read(numbers: np.ndarray) -> dict[str, np.ndarray]:
        places = numbers[:, None] * (stride * WINDOW) + np.arange(WINDOW + 1)[None, :]
        window = text[places].astype(np.int32)
        return {"input": window[:, :-1], "label": window[:, 1:]}

    return Split(min(count // stride, most or count), read)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    # tfds draws progress bars, prints and logs what tells a user of this program nothing.
    import tensorflow_datasets as tfds

    tfds.disable_progress_bar()
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    loggers = [logging.getLogger(), logging.getLogger("absl")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
