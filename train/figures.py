"""What all pictures have in common."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from train.errors import UsageError
from train.log import written

KINDS = (".png", ".svg", ".pdf", ".jpg")


def check(figure: Path | None, *others: Path | None) -> None:
    """Refuse files that cannot be written, before anything is computed.

    Args:
      figure: picture to be; None is skipped.
      others: files to be, the same.

    Raises:
      UsageError: a folder is missing or stands in a file's place, or a picture's kind is unknown.
    """
    for path in filter(None, (figure, *others)):
        if not path.parent.is_dir():
            raise UsageError(f"{path} cannot be written: there is no folder {path.parent}; make it, or choose another")
        if path.is_dir():
            raise UsageError(f"{path} cannot be written: it is a folder; name a file in it")
        try:
            if path.exists():
                path.open("ab").close()
            else:
                tempfile.TemporaryFile(dir=path.parent).close()
        except OSError as error:
            raise UsageError(f"{path} cannot be written ({error.strerror}): choose another") from error
    if figure is not None and figure.suffix not in KINDS:
        raise UsageError(f"{figure} is no picture's name: end it in one of {', '.join(KINDS)}")


@contextlib.contextmanager
def canvas(panels: int, path: Path, height: float = 4.4) -> Iterator[list[Any]]:
    """Open axes side by side, and save them at the end.

    Args:
      panels: their number.
      path: of the picture.
      height: in inches.

    Yields:
      The axes.

    Raises:
      UsageError: the disk is full.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    style: dict[Any, Any] = {"axes.spines.top": False, "axes.spines.right": False, "axes.titleweight": "bold"}
    with plt.rc_context(style):
        figure, axes = plt.subplots(1, panels, figsize=(5.2 * panels, height), layout="constrained", squeeze=False)
        yield list(axes[0])
        for axis in axes[0]:
            axis.grid(alpha=0.25)
        with written(path):
            figure.savefig(path, dpi=130)
        plt.close(figure)
