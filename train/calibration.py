"""The file of `python -m train.bench calibrate`, as an option."""

from __future__ import annotations

from pathlib import Path

from gradpart_jax.costs import MEASURED, Calibration
from train.errors import UsageError


def calibration_of(path: Path | None) -> Calibration:
    """Read what coding takes.

    Args:
      path: of the file; None takes what was measured on two cores.

    Returns:
      Calibration.

    Raises:
      UsageError: it cannot be read, or holds something else.
    """
    try:
        return MEASURED if path is None else Calibration.read(path)
    except (OSError, ValueError) as error:
        what = error.strerror if isinstance(error, OSError) else "it holds something else"
        raise UsageError(
            f"--calibration {path} cannot be read ({what}): give a file of python -m train.bench calibrate"
        ) from error
