"""Write the report of runs: `python -m train.report RUN [RUN ...] [--out report.html]`."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import tyro

from train.errors import status_of
from train.report.page import write


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Write one HTML page, which needs no network, about every run at or below the given folders."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Run folders, or folders that hold some at any depth."""
    out: Path = Path("report.html")
    """Page to write."""


def main() -> int:
    """Parse, write, and say where the page lies.

    Returns:
      The exit status.
    """

    def work() -> None:
        arguments = tyro.cli(Arguments, prog="python -m train.report")
        print(f"report: {write(arguments.runs, arguments.out)}")

    return status_of(work)


if __name__ == "__main__":
    sys.exit(main())
