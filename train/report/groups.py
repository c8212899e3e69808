"""Runs that differ in their seed alone, taken together, with a name, a colour and a line of their own."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from train.config import Exchange, Output
from train.report.runs import Run, number

# Told apart with every common kind of colour blindness, on white and on near black
COLOURS = ("#2b7bba", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#a3508f", "#8a8f2e")
GREY = "#8b929a"
DASHES: tuple[tuple[int, ...], ...] = ((), (7, 4), (2, 3), (9, 3, 2, 3), (14, 4), (4, 8))
PLAIN = ((5, 3), *DASHES[2:])  # of uncompressed training
MARKERS = ("circle", "square", "triangle", "diamond", "inverted_triangle", "hex", "star", "plus")
NAMED = 3  # settings that differ, up to which all are named

EXCHANGE = {field.name for field in dataclasses.fields(Exchange)}
# Settings that make no other experiment, and those that a way names apart
APART = {"preset", "data_dir", "seed", "method", "ratio", "dense_reference"}
APART |= {field.name for field in dataclasses.fields(Output)}

Settings = tuple[tuple[str, str], ...]
Line = tuple[str, Settings]


class Way(NamedTuple):
    """What runs share that differ in their seed alone."""

    method: str
    settings: Settings  # of the training, and of the exchange where there is one
    budget: float | None
    ratio: float | None  # where no budget was given, which says what the ratio is

    @property
    def line(self) -> Line:
        """What is the same at all budgets and ratios."""
        return self.method, self.settings

    @property
    def training(self) -> dict[str, str]:
        """Its settings without those of the exchange."""
        return {key: value for key, value in self.settings if key not in EXCHANGE}

    @property
    def options(self) -> dict[str, str]:
        """All that can tell it from others of its method and budget."""
        return ({} if self.ratio is None else {"ratio": _said(self.ratio)}) | dict(self.settings)


@dataclasses.dataclass(frozen=True)
class Group:
    """Runs of one method at one budget, with the same settings."""

    key: str
    way: Way
    differs: tuple[str, ...]  # settings that tell it from groups of its method and budget
    runs: tuple[Run, ...]
    colour: str
    dash: tuple[int, ...]
    marker: str

    @property
    def method(self) -> str:
        """Label of its method."""
        return self.way.method

    @property
    def budget(self) -> float | None:
        """Link ratio asked for, where one was."""
        return self.way.budget

    @property
    def label(self) -> str:
        """Its name in legends, which no other group has."""
        name = self.method if self.budget is None else f"{self.method} {self.budget:g}\u00d7"
        return ", ".join((name, *self.differs))

    @property
    def dense(self) -> bool:
        """Whether its runs are uncompressed."""
        return self.runs[0].dense

    @property
    def foretells(self) -> bool:
        """Whether its method forecasts magnitudes, as far as its runs' headers say."""
        return self.runs[0].header.get("kind") in (None, "partition")

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
    """Put runs into groups: compressed ones first, by method, settings and budget, uncompressed ones last.

    Of runs of one way and one seed the one begun last counts, of those that have finished if there are any: a
    repetition tells nothing of chance.

    Args:
      runs: of one task.
      prefix: of the groups' keys, which are unique in a page.

    Returns:
      The groups.
    """
    found: dict[Way, list[Run]] = {}
    for run in runs:
        found.setdefault(_way(run), []).append(run)
    lines = _lines(way for way, held in found.items() if not held[0].dense)
    plain = _lines(way for way, held in found.items() if held[0].dense)
    budgets = sorted({way.budget for way in found if way.budget is not None})
    ratios = sorted({way.ratio for way in found if way.ratio is not None})
    order = [*lines, *plain]
    groups: list[Group] = []
    for way in sorted(found, key=lambda w: (order.index(w.line), w.budget or 0.0, w.ratio or 0.0)):
        dense = way.line in plain
        place = plain.index(way.line) if dense else lines.index(way.line)
        at = _place(ratios, way.ratio) if way.budget is None else budgets.index(way.budget)
        groups.append(
            Group(
                key=f"{prefix}-{len(groups)}",
                way=way,
                differs=_differs(way, [w for w in found if (w.method, w.budget) == (way.method, way.budget)]),
                runs=_one_a_seed(found[way]),
                colour=GREY if dense else COLOURS[place % len(COLOURS)],
                dash=PLAIN[place % len(PLAIN)] if dense else DASHES[at % len(DASHES)],
                marker="cross" if dense else MARKERS[place % len(MARKERS)],
            )
        )
    return groups


def _way(run: Run) -> Way:
    skipped = APART | EXCHANGE if run.dense else APART
    settings = tuple(sorted((key, _said(value)) for key, value in run.config.items() if key not in skipped))
    if run.dense:
        return Way(run.method, settings, None, None)
    return Way(run.method, settings, run.budget, number(run.config.get("ratio")) if run.budget is None else None)


def _one_a_seed(runs: Sequence[Run]) -> tuple[Run, ...]:
    kept: dict[Any, Run] = {}
    for run in sorted(runs, key=lambda run: (run.finished, str(run.header.get("started", "")))):
        kept[run.folder if run.seed == "?" else run.seed] = run
    return tuple(run for run in runs if any(run is one for one in kept.values()))


def _lines(ways: Iterable[Way]) -> list[Line]:
    found = list(dict.fromkeys(way.line for way in ways))
    methods = list(dict.fromkeys(method for method, _ in found))
    # `partition` stands first, whatever else was compared with it
    return sorted(found, key=lambda line: (not line[0].startswith("partition"), methods.index(line[0])))


def _differs(way: Way, alike: Sequence[Way]) -> tuple[str, ...]:
    """Say what tells a way from others of its method and budget; runs without config.json have no settings."""
    if len(alike) == 1:
        return ()
    if not way.options:
        return ("settings unknown",)
    known = [other.options for other in alike if other.options]
    keys = dict.fromkeys(key for options in known for key in options)
    values = {key: [options.get(key, "unknown") for options in known] for key in keys}
    differ = {key: held for key, held in values.items() if len(set(held)) > 1}
    own = {key: way.options.get(key, "unknown") for key in differ}
    if len(differ) > NAMED:
        # A name of many settings is hard to read: what more than half have goes without saying
        own = {key: value for key, value in own.items() if 2 * differ[key].count(value) <= len(known)}
    return tuple(f"{key.replace('_', ' ')} {value}" for key, value in own.items())


def _said(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, float):
        return f"{value:g}" if float(f"{value:g}") == value else repr(value)
    return "none" if value is None else str(value)


def _place(items: list[float], item: float | None) -> int:
    return items.index(item) if item in items else 0
