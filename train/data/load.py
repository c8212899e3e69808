"""Opening a data set of tfds by name, without TensorFlow."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from train.config import EMBEDDED
from train.data import images, texts
from train.data.sets import Dataset
from train.errors import UsageError

TESTED_ON = ("test", "validation")  # splits that can serve to test on, the better one first
HELD_OUT = 10  # percent of the training examples to test on where there is no such split


@dataclasses.dataclass(frozen=True)
class Source:
    """A split of tfds, whose damage is said in one line."""

    examples: Any
    name: str  # of the data set

    def __len__(self) -> int:
        """Count the examples."""
        return len(self.examples)

    def __getitem__(self, number: Any) -> Any:
        """Read an example.

        Raises:
          UsageError: the files are damaged, or hold what cannot be decoded here.
        """
        try:
            return self.examples[number]
        except RuntimeError as error:  # of array_record, of whatever kind
            raise _damaged(self.name, error) from error
        except Exception as error:  # whatever decoders raise, as of 16 bits without OpenCV
            raise UsageError(
                f"--data {self.name}: its example {number} cannot be decoded ({_reason(error)}): "
                "mend that, or choose another set"
            ) from error


def load(name: str, data_dir: Path | None, *, image_size: int | None = None, window: int = texts.WINDOW) -> Dataset:
    """Prepare an embedded data set, or open a prepared one of tfds.

    Tested on is the split `test`, else, also where that has no labels, `validation`, else the last tenth of `train`.

    Args:
      name: digits, stdlib, or a name that tfds knows: of images with labels, or of text.
      data_dir: where it lies; None for tfds' own folder.
      image_size: side that images are brought to; None leaves those of one fixed size as they are.
      window: bytes of text that an example has.

    Returns:
      Dataset.

    Raises:
      UsageError: the data set is unknown, not prepared or damaged, or has neither images with labels nor text.
    """
    with quiet():
        try:
            builder = _builder(name, data_dir)
        except (UsageError, ImportError):
            raise
        except Exception as error:  # whatever tfds raises of a description that it cannot read
            raise _damaged(name, error) from error
        keys, text = images.keys_of(builder.info), texts.key_of(builder.info)
        if keys:
            return images.dataset(name, builder.info, keys, *_sources(name, builder, data_dir, keys[1]), image_size)
        if text:
            return texts.dataset(name, text, *_sources(name, builder, data_dir, None), window)
    found = ", ".join(f"{key} ({_kind(feature)})" for key, feature in builder.info.features.items())
    raise UsageError(
        f"--data {name} has neither text nor images (height, width, channels) with a ClassLabel each, as supervised "
        f"keys or named image and label, but {found}: choose another set, or prepare it so"
    )


def _builder(name: str, data_dir: Path | None) -> Any:
    import tensorflow_datasets as tfds

    where = {"data_dir": str(data_dir)} if data_dir else {}
    if name not in EMBEDDED:
        try:
            return tfds.builder(name, **where)
        except (tfds.core.DatasetNotFoundError, ValueError, AttributeError) as error:
            raise UsageError(
                f"--data {name} is unknown to tfds: {', '.join(EMBEDDED)} are embedded, "
                "and tensorflow.org/datasets lists the others"
            ) from error
        except ImportError as error:
            reason = " ".join(str(error).split())
            raise UsageError(f"--data {name} needs a package that is not there ({reason}): install it") from error
    from train.datasets.digits import GradpartDigits
    from train.datasets.stdlib import GradpartStdlib

    make = GradpartDigits if name == "digits" else GradpartStdlib
    builder = make(**where, file_format="array_record")
    try:
        builder.download_and_prepare(file_format="array_record")
    except OSError as error:
        # Where several processes prepare it at once, one of them is the first to put it in place.
        builder = make(**where, file_format="array_record")
        if not builder.is_prepared():
            raise UsageError(
                f"--data {name} cannot be written to {builder.data_dir} ({error.strerror or error}): "
                "choose another --data-dir"
            ) from error
    return builder


def _sources(name: str, builder: Any, data_dir: Path | None, label: str | None) -> tuple[Source, Source]:
    splits = tuple(builder.info.splits) or ("train", "test")
    if "train" not in splits:
        raise UsageError(f"--data {name} has no training split, but {', '.join(splits)}: choose another set")

    def source(split: str) -> Source:
        return Source(builder.as_data_source(split=split), name)

    try:
        train = source("train")
        for split in TESTED_ON:
            if split in splits:
                test = source(split)
                # Some contests keep the test labels to themselves, and say -1.
                if len(test) and (label is None or test[0][label] >= 0):
                    return train, test
    except (NotImplementedError, ValueError, AssertionError, OSError) as error:
        prepare = f"tfds build {name} --file_format=array_record" + (f" --data_dir={data_dir}" if data_dir else "")
        raise UsageError(
            f"--data {name} is not prepared as array_record: run `pip install -e '.[tfds]' && {prepare}` once, "
            f"or use an embedded set ({', '.join(EMBEDDED)})"
        ) from error
    kept = 100 - HELD_OUT
    # Of a part without examples tfds makes no source
    with contextlib.suppress(ValueError):
        return source(f"train[:{kept}%]"), source(f"train[{kept}%:]")
    raise UsageError(f"--data {name} has too few examples to learn from and to test on: choose another set")


def _damaged(name: str, error: Exception) -> UsageError:
    again = "" if name in EMBEDDED else ", and prepare it again with `tfds build`"
    return UsageError(f"--data {name} is damaged ({_reason(error)}): remove the folder of its version{again}")


def _kind(feature: Any) -> str:
    shape = getattr(feature, "shape", ())
    return type(feature).__name__ + (f" of {' x '.join(map(str, shape))}" if shape and isinstance(shape, tuple) else "")


def _reason(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep tfds from drawing progress bars, printing and logging what tells a user of this program nothing."""
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
