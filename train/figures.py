"""What all pictures have in common."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from train.errors import UsageError


def check(*paths: Path | None) -> None:
    """Refuse files that cannot be written, before anything is computed.

    Args:
      paths: of files to be; None is skipped.

    Raises:
      UsageError: a folder is missing.
    """
    for path in paths:
        if path is not None and not path.parent.is_dir():
            raise UsageError(f"{path} cannot be written: there is no folder {path.parent}; make it, or choose another")


@contextlib.contextmanager
def canvas(panels: int, path: Path, height: float = 4.4) -> Iterator[list[Any]]:
    """Open axes side by side, and save them at the end.

    Args:
      panels: their number.
      path: of the picture.
      height: in inches.

    Yields:
      The axes.
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
        figure.savefig(path, dpi=130)
        plt.close(figure)
