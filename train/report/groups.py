"""Runs that differ in their seed alone, taken together, with a colour and a line of their own."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from train.report.runs import Run

# Told apart with every common kind of colour blindness, on white and on near black
COLOURS = ("#2b7bba", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#a3508f", "#8a8f2e")
GREY = "#8b929a"
DASHES: tuple[tuple[int, ...], ...] = ((), (7, 4), (2, 3), (9, 3, 2, 3), (14, 4), (4, 8))
MARKERS = ("circle", "square", "triangle", "diamond", "inverted_triangle", "hex", "star", "plus")


@dataclasses.dataclass(frozen=True)
class Group:
    """Runs of one method at one budget."""

    key: str
    method: str
    budget: float | None
    runs: tuple[Run, ...]
    colour: str
    dash: tuple[int, ...]
    marker: str

    @property
    def label(self) -> str:
        """Its name in legends."""
        return self.method if self.budget is None else f"{self.method} {self.budget:g}\u00d7"

    @property
    def dense(self) -> bool:
        """Whether its runs are uncompressed."""
        return self.runs[0].dense

    @property
    def counted(self) -> tuple[Run, ...]:
        """Runs that its figures are of: those that have finished, where some have."""
        return tuple(run for run in self.runs if run.finished) or self.runs

    def spread(self, key: str) -> tuple[float, float]:
        """Summarise a figure over seeds.

        Args:
          key: of `Run.last`, or payload_ratio or link_ratio.

        Returns:
          Mean and standard deviation; not numbers where a run diverged, or no run has the figure yet.
        """
        take = {"payload_ratio": lambda r: r.ratio("payload"), "link_ratio": lambda r: r.ratio("link")}
        values = [take.get(key, lambda r: r.last(key))(run) for run in self.counted]
        if not self.counted[0].finished:
            values = [value for value in values if np.isfinite(value)]
        return mean_and_deviation(values)


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float]:
    """Average over seeds.

    Args:
      values: one a seed.

    Returns:
      Mean, and standard deviation, which one seed alone does not have: 0 there. Not numbers where one of the values is
      none, and where there are no values.

    >>> mean_and_deviation([1.0, 3.0, 2.0])
    (2.0, 1.0)
    """
    if not len(values) or not np.isfinite(values).all():
        return float("nan"), float("nan")
    # Equal values have a mean that is off by rounding, and no spread
    return float(np.mean(values)), float(np.std(values, ddof=1)) if np.ptp(values) else 0.0


def gather(runs: Sequence[Run], prefix: str) -> list[Group]:
    """Put runs into groups: compressed ones first, by method and budget, uncompressed ones last.

    Args:
      runs: of one task.
      prefix: of the groups' keys, which are unique in a page.

    Returns:
      The groups.
    """
    found: dict[tuple[str, float | None], list[Run]] = {}
    for run in runs:
        found.setdefault((run.method, None if run.dense else run.budget), []).append(run)
    compressed = [method for (method, _), held in found.items() if not held[0].dense]
    # `partition` stands first, whatever else was compared with it
    methods = sorted(dict.fromkeys(compressed), key=lambda m: not m.startswith("partition"))
    budgets = sorted({budget for _, budget in found if budget is not None})
    groups = []
    order = sorted(found, key=lambda k: (k[0] not in methods, _place(methods, k[0]), k[1] or 0.0))
    for at, (method, budget) in enumerate(order):
        held = found[method, budget]
        place = _place(methods, method)
        groups.append(
            Group(
                key=f"{prefix}-{at}",
                method=method,
                budget=budget,
                runs=tuple(held),
                colour=GREY if held[0].dense else COLOURS[place % len(COLOURS)],
                dash=(5, 3) if held[0].dense else DASHES[_place(budgets, budget) % len(DASHES)],
                marker="cross" if held[0].dense else MARKERS[place % len(MARKERS)],
            )
        )
    return groups


def _place(items: list, item: object) -> int:
    return items.index(item) if item in items else 0
