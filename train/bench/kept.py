"""Rows of figures that an earlier run of a benchmark left in a file."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from train.errors import UsageError

Row = dict[str, Any]


def rows_in(path: Path | None, key: str, needed: Iterable[str], settings: dict[str, Any] | None = None) -> list[Row]:
    """Read what was measured before, so that it need not be measured again.

    Args:
      path: of the file; None, and a file that does not exist, hold nothing.
      key: of its rows.
      needed: what each row must have.
      settings: that the file's own must equal; None where rows say theirs.

    Returns:
      Its rows.

    Raises:
      UsageError: it holds something else, or figures of other settings, which would be lost.
    """
    if path is None or not path.exists():
        return []
    try:
        found = json.loads(path.read_text())
        rows = list(found[key])
        whole = all(name in row for row in rows for name in needed)
        same = settings is None or found["settings"] == settings
    except (OSError, ValueError, KeyError, TypeError):
        whole = same = False
        rows = []
    if not whole:
        raise UsageError(f"--json {path} holds something else: name another file")
    if not same:
        raise UsageError(f"--json {path} holds figures of other settings: name another file")
    return rows
