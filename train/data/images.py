"""Images with labels: brought to one size, kept as bytes once decoded, and normalised by channel."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import DTypeLike

from train.data.sets import Batch, Dataset, Split
from train.errors import UsageError
from train.limits import within

SIZE = 64  # of images that come in many sizes, where nothing is asked for
SIZES = {"imagenette": 128, "imagewoof": 128, "imagenet2012": 224}  # what is usual for some of them
SAMPLE = 512  # training images that the normalisation is computed of
KEPT = 2**30  # bytes of decoded images that a split may keep in memory


class Scale(NamedTuple):
    """What turns values into inputs around zero: (value - mean) * factor, per channel."""

    mean: np.ndarray  # float32[C]
    factor: np.ndarray  # float32[C]


def keys_of(info: Any) -> tuple[str, str] | None:
    """Find the features that are an image and its label.

    Args:
      info: of the data set's builder.

    Returns:
      Their names; None where there are none.
    """
    keys = info.supervised_keys or ("image", "label")
    if len(keys) != 2 or not all(isinstance(key, str) and key in info.features for key in keys):
        return None
    image, label = (info.features[key] for key in keys)
    return keys if len(image.shape) == 3 and label.shape == () and _classes(info, keys[1]) else None


def dataset(name: str, info: Any, keys: tuple[str, str], train: Any, test: Any, size: int | None) -> Dataset:
    """Make a data set of two sources of images.

    Args:
      name: of the data set.
      info: of its builder.
      keys: of `keys_of`.
      train: sequence of examples.
      test: another one.
      size: side that images are brought to; None leaves those of one fixed size as they are.

    Returns:
      Dataset. A set that declares the `peak` of its values has inputs from -0.5 to 0.5; others are normalised to mean 0
      and deviation 1 per channel, as found in a sample of the training images.

    Raises:
      UsageError: the size is out of range, the images have no fixed number of channels, or there is one class alone.
    """
    *sides, channels = info.features[keys[0]].shape
    if channels is None:
        raise UsageError(f"--data {name} has images of any number of channels: choose another set")
    classes = _classes(info, keys[1])
    if classes < 2:
        raise UsageError(f"--data {name} has one class alone, so that nothing is to be learned: choose another set")
    within(("--image-size", size, 4, 1024))
    if size is None and None in sides:
        size = SIZES.get(name.partition("/")[0].partition(":")[0], SIZE)
    shape = (size, size, channels) if size else (*sides, channels)
    # Decoding leaves Python's lock; all around it does not, so that threads would hold each other up on small images.
    workers = (os.cpu_count() or 1) if None in sides or max(sides) > SIZE else 1
    pixels = [Pixels(source, keys, shape, info.features[keys[0]].np_dtype, workers) for source in (train, test)]
    peak = (info.metadata or {}).get("peak")
    if peak:
        scale = Scale(np.full(channels, peak / 2, np.float32), np.full(channels, 1 / peak, np.float32))
    else:
        scale = _scale_of(pixels[0])
    splits = [Split(len(each.source), _reader(each, scale, name, classes)) for each in pixels]
    return Dataset(shape, classes, "image", *splits)


class Pixels:
    """Images of one size and their labels, decoded when first asked for and kept where memory allows."""

    def __init__(
        self, source: Any, keys: tuple[str, str], shape: tuple[int, ...], dtype: DTypeLike, workers: int
    ) -> None:
        self.source, self.keys, self.shape, self.dtype, self.workers = source, keys, shape, dtype, workers
        size = len(source)
        self.keeps = size * np.prod(shape) * np.dtype(dtype).itemsize <= KEPT
        # Pages of an empty array cost nothing before they are written to.
        self.images = np.empty((size if self.keeps else 0, *shape), dtype)
        self.labels = np.empty(size if self.keeps else 0, np.int32)
        self.known = np.zeros(size, bool)

    def read(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Read examples.

        Args:
          numbers: int64[B].

        Returns:
          Images [B, ...] and labels int32[B].
        """
        if not self.keeps:
            return self._decode(numbers)
        missing = np.unique(numbers[~self.known[numbers]])
        if missing.size:
            # Two threads that miss the same example write the same bytes; it is known only once they are there.
            self.images[missing], self.labels[missing] = self._decode(missing)
            self.known[missing] = True
        return self.images[numbers], self.labels[numbers]

    def _decode(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        images = np.empty((len(numbers), *self.shape), self.dtype)
        labels = np.empty(len(numbers), np.int32)

        def decode(part: np.ndarray) -> None:
            for at in part:
                example = self.source[int(numbers[at])]
                images[at] = fit(example[self.keys[0]], self.shape)
                labels[at] = example[self.keys[1]]

        parts = np.array_split(np.arange(len(numbers)), min(self.workers, 1 + len(numbers) // 16))
        if len(parts) == 1:
            decode(parts[0])
        else:
            with ThreadPoolExecutor(len(parts)) as pool:
                list(pool.map(decode, parts))
        return images, labels


def fit(image: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Bring an image to a shape: the largest central part of its proportions, resized with smoothing.

    Args:
      image: of any height and width.
      shape: height, width and channels.

    Returns:
      The image, of that shape.
    """
    if image.shape == shape:
        return image
    from PIL import Image

    height, width = image.shape[:2]
    share = min(height / shape[0], width / shape[1])
    tall, wide = share * shape[0], share * shape[1]
    top, left = (height - tall) / 2, (width - wide) / 2
    box = (left, top, left + wide, top + tall)

    def resized(plane: np.ndarray) -> np.ndarray:
        picture = Image.fromarray(np.ascontiguousarray(plane))
        return np.asarray(picture.resize((shape[1], shape[0]), Image.Resampling.BILINEAR, box=box))

    if image.dtype == np.uint8 and shape[2] == 3:
        return resized(image)
    return np.stack([resized(image[..., c]) for c in range(shape[2])], -1)


def _classes(info: Any, label: str) -> int:
    declared = (info.metadata or {}).get("classes")
    return int(declared or getattr(info.features[label], "num_classes", None) or 0)


def _scale_of(pixels: Pixels) -> Scale:
    size = len(pixels.source)
    sample = pixels.read(np.linspace(0, size - 1, min(size, SAMPLE)).astype(np.int64))[0].astype(np.float64)
    mean, deviation = sample.mean(axis=(0, 1, 2)), sample.std(axis=(0, 1, 2))
    factor = 1 / np.where(deviation > 0, deviation, 1.0)
    return Scale(mean.astype(np.float32), factor.astype(np.float32))


def _reader(pixels: Pixels, scale: Scale, name: str, classes: int) -> Callable[[np.ndarray], Batch]:
    def read(numbers: np.ndarray) -> Batch:
        images, labels = pixels.read(numbers)
        wrong = np.flatnonzero((labels < 0) | (labels >= classes))
        if wrong.size:  # -1 stands for none, and would be taken for the last class
            raise UsageError(
                f"--data {name}: its example {numbers[wrong[0]]} has the label {labels[wrong[0]]}, which is none of "
                f"its {classes} classes: choose another set, or prepare it without such examples"
            )
        # Whole rows at once: numpy is slow over a last axis of three.
        mean, factor = (np.tile(x, images.shape[2]) for x in scale)
        rows = images.reshape(*images.shape[:2], -1).astype(np.float32)
        rows -= mean
        rows *= factor
        return {"input": rows.reshape(images.shape), "label": labels}

    return read
