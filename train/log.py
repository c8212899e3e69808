"""What a run says: a live line in the terminal, and one JSON object a line on disk."""

from __future__ import annotations

import json
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table


class Log:
    """Write metrics to a file and show progress, for the length of a with-block.

    Args:
      path: of the JSON-lines file; the method's lines after `start` are dropped, so that it has each step once.
      console: to draw on.
      method: what the lines are of.
      start: steps already done.
      steps: in all.
    """

    def __init__(self, path: Path, console: Console, method: str, start: int, steps: int) -> None:
        kept = [line for line in read(path) if line["method"] != method or line["step"] <= start]
        self._method = method
        self._file = path.open("w")
        for line in kept:
            self._file.write(json.dumps(line) + "\n")
        self._progress = Progress(
            TextColumn(f"[bold]{method}"),
            BarColumn(bar_width=12 if console.width < 100 else 32),
            MofNCompleteColumn(),
            TextColumn("{task.fields[says]}"),
            TimeRemainingColumn(),
            console=console,
        )
        self._task = self._progress.add_task("", total=steps, completed=start, says="compiling ...")

    def __enter__(self) -> Log:
        """Start drawing."""
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop drawing and close the file."""
        self._progress.stop()
        self._file.close()

    def write(self, metrics: dict[str, Any]) -> None:
        """Append one line of metrics; flushed, so that a killed run keeps it."""
        self._file.write(json.dumps({"method": self._method, **metrics}) + "\n")
        self._file.flush()

    def show(self, step: int, says: str) -> None:
        """Move the bar."""
        self._progress.update(self._task, completed=step, says=says)


def read(path: Path, method: str | None = None) -> list[dict[str, Any]]:
    """Read a metrics file, of one method or all; a last line cut short by a kill is left out."""
    lines: list[dict[str, Any]] = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return [line for line in lines if method in (None, line["method"])]


def table(summaries: list[dict[str, Any]]) -> Table:
    """Set the runs of one training side by side.

    Args:
      summaries: of `loop.train`.

    Returns:
      A table to print.
    """
    rows = (
        ("test accuracy", lambda s: f"{100 * s['test_accuracy']:.2f} %"),
        ("test loss", lambda s: f"{s['test_loss']:.4f} nats"),
        ("payload a step", lambda s: amount(s["payload_bytes"] / s["steps"])),
        ("payload in all", lambda s: amount(s["payload_bytes"])),
        ("payload ratio", lambda s: f"{s['payload_ratio']:.1f} x"),
        ("  after warm-up", lambda s: f"{s['steady_payload_ratio']:.1f} x"),
        ("link a step", lambda s: amount(s["link_bytes"] / s["steps"])),
        ("link in all", lambda s: amount(s["link_bytes"])),
        ("link ratio", lambda s: f"{s['link_ratio']:.1f} x"),
        ("  after warm-up", lambda s: f"{s['steady_link_ratio']:.1f} x"),
        ("forecast error", lambda s: f"{100 * s['forecast_error']:.1f} %" if s["method"] != "dense" else "-"),
        ("training time", lambda s: f"{s['seconds']:.1f} s"),
    )
    made = Table(title="bytes are one device's; forecast error is the median of |exact / forecast threshold - 1|")
    made.add_column("")
    for summary in summaries:
        made.add_column(summary["method"], justify="right")
    for name, value in rows:
        made.add_row(name, *[value(s) for s in summaries])
    return made


def amount(size: float) -> str:
    """Write a number of bytes for people.

    >>> amount(2_500_000)
    '2.50 MB'
    """
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000 or unit == "GB":
            break
        size /= 1000
    return f"{size:.0f} B" if unit == "B" else f"{size:.2f} {unit}"
