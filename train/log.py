"""What a run writes: files in one go and, while it goes, one JSON object a line, each step once."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from train.errors import UsageError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


class Journal:
    """A JSON-lines file of steps, for the length of a with-block.

    Args:
      path: of the file; lines after `start` are dropped, so that a resumed run has each step once.
      start: steps already done.
    """

    def __init__(self, path: Path, start: int) -> None:
        kept = [line for line in read(path) if line["step"] <= start]
        write_whole("".join(json.dumps(line) + "\n" for line in kept).encode(), path)
        self._path, self._file = path, path.open("a")

    def __enter__(self) -> Journal:
        """Begin."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the file."""
        with written(self._path):
            self._file.close()

    def write(self, values: dict[str, Any]) -> None:
        """Append one line; flushed, so that a killed run keeps it.

        Args:
          values: of the line.

        Raises:
          UsageError: the disk is full.
        """
        with written(self._path):
            self._file.write(json.dumps(plain(values), allow_nan=False) + "\n")
            self._file.flush()


def write_whole(data: bytes, path: Path) -> None:
    """Write a file in one go: a kill leaves the old one or the new one.

    Args:
      data: of the file.
      path: of the file.

    Raises:
      UsageError: the disk is full.
    """
    part = path.with_name(path.name + ".part")
    with written(path):
        try:
            part.write_bytes(data)
        except OSError:
            with contextlib.suppress(OSError):
                part.unlink()
            raise
        os.replace(part, path)


def write_text(text: str, path: Path) -> None:
    """Write into what a path names, a pipe or a device too, in whose place `write_whole` would put a file.

    Args:
      text: all of it.
      path: of the file.

    Raises:
      UsageError: the disk is full.
    """
    with written(path):
        path.write_text(text)


@contextlib.contextmanager
def written(path: Path) -> Iterator[None]:
    """Say in one line that a disk has no room for a file, or takes none, from this user or from anyone.

    Args:
      path: of the file.

    Raises:
      UsageError: names it and the remedy.
    """
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            remedy = "free some space and start again, a training with --resume"
        elif isinstance(error, PermissionError):
            remedy = "choose another folder, or have its owner let you write there"
        else:
            raise
        raise UsageError(f"{path} could not be written ({error.strerror}): {remedy}") from error


def read(path: Path) -> list[dict[str, Any]]:
    """Read a JSON-lines file up to a line that is damaged, as the last one by a kill."""
    lines: list[dict[str, Any]] = []
    for line in path.read_text(errors="replace").splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return lines


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON object; an empty one where there is none, or a damaged one, as a power cut may leave."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def plain(value: Any) -> Any:
    """Make JSON's types of nested numbers, with null for what is not finite.

    >>> plain({"a": [1.5, float("nan")]})
    {'a': [1.5, None]}
    """
    if isinstance(value, dict):
        return {key: plain(x) for key, x in value.items()}
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    if isinstance(value, list | tuple):
        return [plain(x) for x in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def nats(loss: float, digits: int = 4) -> str:
    """Write a loss for people, also that of a training that runs away.

    >>> nats(1.25), nats(1.5261e16)
    ('1.2500', '1.53e+16')
    """
    return f"{loss:.{digits}f}" if abs(loss) < 1e6 else f"{loss:.3g}"


def amount(size: float) -> str:
    """Write a number of bytes for people.

    >>> amount(2_500_000), amount(40.0)
    ('2.5 MB', '40 B')
    """
    if not math.isfinite(size):
        return "\u2013"
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if size < 1000 or unit == "TB":
            break
        size /= 1000
    return f"{size:.0f} B" if unit == "B" else f"{size:.3g} {unit}".replace("e+03", "000")


def times(ratio: float) -> str:
    """Write a ratio.

    >>> times(50.72), times(1.0), times(999.8), times(1234.5)
    ('50.7', '1', '1,000', '1,234')
    """
    if not math.isfinite(ratio):
        return "\u2013"
    return f"{ratio:,.0f}" if ratio >= 999.5 else f"{ratio:.3g}"
