"""The picture of a comparison: how good each method ended, for how many times fewer bytes, and how it got there."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from train import figures
from train.labels import briefly
from train.log import times
from train.report.groups import COLOURS

CURVES = 10  # methods whose way is drawn: with more, none can be told from another
MARKS = "os^DvPX<>*"  # a shape a method: not everyone tells colours apart, and there may be more methods than colours
MARKED = 8  # places of a way that bear its shape
LETTERS = 32  # of a line of a name: a longer one would leave the panels no room


class Ended(NamedTuple):
    """The trainings of one method at one budget."""

    method: str
    budget: float | None  # link ratio asked for; None where the method has none
    link_ratio: float
    scores: list[float]  # one a seed, at the end
    ways: list[Mapping[int, float]]  # one a seed: test score by step


class Look(NamedTuple):
    """What tells a method from others in both panels."""

    colour: str
    mark: str


def draw(methods: Sequence[Ended], kind: str, path: Path) -> None:
    """Draw how good each method ended, and the way of the first methods there.

    Methods are rows, the best at the top. Where there are several budgets, they are lines instead, by link
    ratio, and the ways are those at a budget in the middle.

    Args:
      methods: in the order asked for; the scores are losses in nats for text, accuracies for images.
      kind: of the data.
      path: of the picture.
    """
    import matplotlib as mpl

    score = "test loss, nats" if kind == "text" else "test accuracy"
    shown = [m for m in methods if any(np.isfinite(m.scores))]
    # Broken at commas
    names = {
        method: "\n".join(textwrap.wrap(name.replace(",", ", "), LETTERS))
        for method, name in briefly(m.method for m in shown).items()
    }
    lines = sum(1 + names[m.method].count("\n") for m in shown)
    looks = {method: Look(COLOURS[n % len(COLOURS)], MARKS[n % len(MARKS)]) for n, method in enumerate(names)}
    budgets = sorted({m.budget for m in methods if m.budget})
    several = len(budgets) > 1
    middle = budgets[(len(budgets) - 1) // 2] if budgets else None
    followed = [m for m in shown if m.budget in (None, middle)][:CURVES]

    with figures.canvas(2, path, height=5.4 if several else max(4.0, 1.3 + 0.27 * lines)) as (ends, ways):
        if several:
            _by_ratio(ends, shown, names, looks)
            ends.set(title=f"{score}, by link ratio")
        else:
            _rows(ends, shown, names, looks, kind)
            ends.set(title=f"{score}, at the end of training")
        for method in followed:
            # What a seed did that diverged is far out of the picture
            held = [way for way, score in zip(method.ways, method.scores, strict=True) if np.isfinite(score)]
            steps = sorted(set.intersection(*(set(way) for way in held)))
            values = np.array([[way[step] for step in steps] for way in held])
            (colour, mark), label = looks[method.method], names[method.method]
            every = -(-len(steps) // MARKED)
            ways.plot(steps, values.mean(axis=0), color=colour, label=label, lw=1.4, marker=mark, ms=4, markevery=every)
            ways.fill_between(steps, values.min(axis=0), values.max(axis=0), color=colour, alpha=0.2, lw=0)
        ways.set(title=f"{score}, by step" + (f" at {middle:g} x" if several else ""))
        ways.xaxis.set_major_locator(mpl.ticker.MaxNLocator(integer=True))
        if shown:
            named = (ends if several else ways).get_legend_handles_labels()
            ways.legend(*named, frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))


def _rows(axis: Any, shown: Sequence[Ended], names: Mapping[str, str], looks: Mapping[str, Look], kind: str) -> None:
    """Draw a row a method, with a point a seed and a stroke for the mean, and uncompressed training across all."""
    import matplotlib as mpl

    order = sorted(shown, key=lambda m: float(np.nanmean(m.scores)), reverse=kind == "text")
    for place, method in enumerate(order):
        colour, mark = looks[method.method]
        axis.scatter(method.scores, [place] * len(method.scores), color=colour, marker=mark, s=18, zorder=2)
        axis.scatter(np.nanmean(method.scores), place, color=colour, s=150, marker="|", zorder=3)
        if method.link_ratio == 1:
            axis.axvline(float(np.nanmean(method.scores)), color="#999999", lw=0.8, ls=":")
    axis.set(ylim=(-0.7, len(order) - 0.3), yticks=range(len(order)))
    axis.set_yticklabels([f"{names[m.method]}, {times(m.link_ratio)} x" for m in order])
    if kind == "text":
        axis.set_xscale("log")
        axis.xaxis.set_major_locator(mpl.ticker.MaxNLocator(5))
        axis.xaxis.set_major_formatter("{x:.4g}")
        axis.xaxis.set_minor_locator(mpl.ticker.NullLocator())


def _by_ratio(axis: Any, shown: Sequence[Ended], names: Mapping[str, str], looks: Mapping[str, Look]) -> None:
    """Draw a line a method through the means at its budgets, uncompressed training across all."""
    import matplotlib as mpl

    for method, (colour, mark) in looks.items():
        own = sorted((m for m in shown if m.method == method), key=lambda m: m.link_ratio)
        at = [m.link_ratio for m in own]
        if at == [1]:
            axis.axhline(float(np.nanmean(own[0].scores)), color=colour, lw=1, ls=":", label=names[method])
            continue
        axis.plot(at, [np.nanmean(m.scores) for m in own], color=colour, label=names[method], lw=1.4, marker=mark, ms=5)
        for one in own:
            axis.scatter([one.link_ratio] * len(one.scores), one.scores, color=colour, marker=mark, s=8, alpha=0.5)
    axis.set_xscale("log")
    axis.xaxis.set_major_locator(mpl.ticker.LogLocator(subs=(1, 3)))
    axis.xaxis.set_major_formatter("{x:g}")
    axis.xaxis.set_minor_locator(mpl.ticker.NullLocator())
