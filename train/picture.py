"""The picture of a comparison: how good each method ended, for how many times fewer bytes, and how it got there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from train import figures

CURVES = 8  # methods whose way is drawn: with more, none can be told from another
DASHES = ("-", "--", "-.", ":")  # of the budgets, in their order


class Ended(NamedTuple):
    """The trainings of one method at one budget."""

    method: str
    budget: float | None  # link ratio asked for; None where the method has none
    link_ratio: float
    scores: list[float]  # one a seed, at the end
    ways: list[Mapping[int, float]]  # one a seed: test score by step


def draw(methods: Sequence[Ended], kind: str, path: Path) -> None:
    """Draw one row for each method, the best at the top, and the way of the first methods.

    Where a method was given several budgets, how good it ended is drawn against its link ratio, too.

    Args:
      methods: in the order asked for; the scores are losses in nats for text, accuracies for images.
      kind: of the data.
      path: of the picture.
    """
    import matplotlib as mpl

    from train.report.style import times

    score = "test loss, nats" if kind == "text" else "test accuracy"
    shown = [m for m in methods if any(np.isfinite(m.scores))]
    order = sorted(shown, key=lambda m: float(np.nanmean(m.scores)), reverse=kind == "text")
    colours = {name: mpl.colormaps["tab10"](n % 10) for n, name in enumerate(dict.fromkeys(m.method for m in shown))}
    budgets = sorted({m.budget for m in methods if m.budget})
    several = len(budgets) > 1

    def name(method: Ended) -> str:
        return method.method + (f" at {method.budget:g} x" if several and method.budget else "")

    with figures.canvas(2 + several, path, height=max(4.0, 1.3 + 0.27 * len(order))) as (rows, *ratios, ways):
        for place, method in enumerate(order):
            rows.scatter(method.scores, [place] * len(method.scores), color=colours[method.method], s=18, zorder=2)
            rows.scatter(np.nanmean(method.scores), place, color=colours[method.method], s=150, marker="|", zorder=3)
        for method in shown:
            if method.link_ratio == 1:
                rows.axvline(float(np.nanmean(method.scores)), color="#999999", lw=0.8, ls=":")
        rows.set(title=f"{score}, at the end of training", ylim=(-0.7, len(order) - 0.3), yticks=range(len(order)))
        rows.set_yticklabels([f"{name(m)}, {times(m.link_ratio)} x" for m in order])
        if kind == "text":
            rows.set_xscale("log")
            rows.xaxis.set_major_locator(mpl.ticker.MaxNLocator(5))
            rows.xaxis.set_major_formatter("{x:.4g}")
            rows.xaxis.set_minor_locator(mpl.ticker.NullLocator())
        for axis in ratios:
            _by_ratio(axis, shown, colours)
            axis.set(title=f"{score}, by link ratio")
        for method in shown[:CURVES]:
            steps = sorted(set.intersection(*(set(way) for way in method.ways)))
            values = np.array([[way[step] for step in steps] for way in method.ways])
            colour = colours[method.method]
            dash = DASHES[budgets.index(method.budget) % len(DASHES) if method.budget else 0]
            ways.plot(steps, values.mean(axis=0), color=colour, ls=dash, label=name(method), lw=1.4)
            ways.fill_between(steps, values.min(axis=0), values.max(axis=0), color=colour, alpha=0.2, lw=0)
        ways.set(title=f"{score}, by step")
        ways.xaxis.set_major_locator(mpl.ticker.MaxNLocator(integer=True))
        ways.legend(frameon=False, fontsize=8)


def _by_ratio(axis: Any, shown: Sequence[Ended], colours: Mapping[str, Any]) -> None:
    """Draw a line a method through the means at its budgets, uncompressed training across all."""
    import matplotlib as mpl

    for name, colour in colours.items():
        own = sorted((m for m in shown if m.method == name), key=lambda m: m.link_ratio)
        at = [m.link_ratio for m in own]
        if at == [1]:
            axis.axhline(float(np.nanmean(own[0].scores)), color=colour, lw=1, ls=":", label=name)
            continue
        axis.plot(at, [np.nanmean(m.scores) for m in own], color=colour, label=name, lw=1.4, marker="o", ms=4)
        for method in own:
            axis.scatter([method.link_ratio] * len(method.scores), method.scores, color=colour, s=8, alpha=0.5)
    axis.set_xscale("log")
    axis.xaxis.set_major_locator(mpl.ticker.LogLocator(subs=(1, 3)))
    axis.xaxis.set_major_formatter("{x:g}")
    axis.xaxis.set_minor_locator(mpl.ticker.NullLocator())
    axis.legend(frameon=False, fontsize=8)
