"""One program at a time in a folder."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from train.errors import UsageError


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """Keep other programs out of a folder; the system lets go of it where this one is killed.

    Nobody is kept out by systems and file systems that have no such locks.

    Args:
      folder: that exists.

    Raises:
      UsageError: another program is in it.
    """
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(ImportError, OSError):
            import fcntl  # which Windows lacks

            handle = os.open(folder, os.O_RDONLY)
            stack.callback(os.close, handle)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UsageError(f"a training goes on in {folder}: wait for its end, or stop it first") from None
        yield
