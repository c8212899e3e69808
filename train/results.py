"""What came of a comparison: averages over seeds, the table, what the picture shows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich import box
from rich.markup import escape
from rich.table import Table

from train.labels import Label
from train.log import amount, nats, read
from train.picture import Ended
from train.report.groups import mean_and_deviation


class Entry(NamedTuple):
    """One training of a comparison."""

    label: Label
    budget: float | None  # link ratio; None where the method has none
    ratio: float  # payload ratio that meets it
    seed: int

    @property
    def key(self) -> tuple[str, float | None]:
        """What is the same for all seeds."""
        return self.label.text, self.budget

    @property
    def folder(self) -> str:
        """The name of its run folder."""
        budget = repr(float(self.budget or 1)).removesuffix(".0")  # all digits: no two share a folder
        return f"{self.label.folder}-{budget}x-seed{self.seed}"


def tabulate(entries: Sequence[Entry], summaries: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Average over seeds.

    Args:
      entries: of `compare.plan`.
      summaries: one an entry.

    Returns:
      A row a method and budget: mean and spread (standard deviation) of each figure.
    """
    rows: list[dict[str, Any]] = []
    for key in dict.fromkeys(entry.key for entry in entries):
        own = [summary for _, summary in _of(key, entries, summaries)]
        row: dict[str, Any] = {"method": key[0], "budget": key[1], "seeds": [s["seed"] for s in own]}
        for figure in ("test_accuracy", "test_loss", "link_ratio", "payload_ratio", "link_bytes", "seconds"):
            mean, deviation = mean_and_deviation([np.nan if s[figure] is None else s[figure] for s in own])
            row[figure] = {"mean": mean, "spread": deviation if len(own) > 1 else None}
        rows.append(row)
    return rows


def table(rows: Sequence[dict[str, Any]], kind: str) -> Table:
    """Draw the rows.

    Args:
      rows: of `tabulate`.
      kind: of the data; of text no accuracy is shown.

    Returns:
      A table to print.
    """
    seeds = max(len(row["seeds"]) for row in rows)
    of = f"mean and standard deviation over {seeds} seeds" if seeds > 1 else "one seed"
    made = Table(title=f"{of}; bytes are what leaves one device", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    made.add_column("method", overflow="fold")
    shown: list[tuple[str, str, Callable[[float], str]]] = [("loss", "test_loss", lambda v: nats(v, 3))]
    if kind == "image":
        shown.insert(0, ("accuracy, %", "test_accuracy", lambda v: f"{100 * v:.2f}"))
    for name in ("budget", *[name for name, _, _ in shown], "link ratio", "link bytes"):
        made.add_column(name, justify="right", overflow="fold")
    for row in rows:
        budget = "-" if row["budget"] is None else f"{row['budget']:g} x"
        figures = [_figure(row[key], write) for _, key, write in shown]
        ratio = row["link_ratio"]["mean"]  # which seeds hardly change
        link = [f"{ratio:.1f}" if np.isfinite(ratio) else "-", amount(row["link_bytes"]["mean"])]
        made.add_row(escape(row["method"]), budget, *figures, *link)
    return made


def endings(
    folder: Path,
    rows: Sequence[dict[str, Any]],
    entries: Sequence[Entry],
    summaries: Sequence[dict[str, Any]],
    kind: str,
) -> Iterator[Ended]:
    """Gather what the picture shows.

    Args:
      folder: of the comparison.
      rows: of `tabulate`.
      entries: of `compare.plan`.
      summaries: one an entry.
      kind: of the data.

    Yields:
      One a row.
    """
    score = "test_loss" if kind == "text" else "test_accuracy"
    for row in rows:
        own = _of((row["method"], row["budget"]), entries, summaries)
        lines = [read(folder / entry.folder / "metrics.jsonl") for entry, _ in own]
        yield Ended(
            row["method"],
            row["budget"],
            row["link_ratio"]["mean"],
            [np.nan if summary[score] is None else summary[score] for _, summary in own],
            [{line["step"]: line[score] for line in each if line.get(score) is not None} for each in lines],
        )


def _of(
    key: tuple[str, float | None], entries: Sequence[Entry], summaries: Sequence[dict[str, Any]]
) -> list[tuple[Entry, dict[str, Any]]]:
    """Take the trainings of one method and budget, one a seed."""
    return [(entry, summary) for entry, summary in zip(entries, summaries, strict=True) if entry.key == key]


def _figure(value: dict[str, float | None], write: Callable[[float], str]) -> str:
    mean, spread = value["mean"], value["spread"]
    if mean is None or not np.isfinite(mean):
        return "diverged"
    return write(mean) if spread is None else f"{write(mean)} ± {write(spread)}"
