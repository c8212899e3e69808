"""The picture of a comparison: how good each method ended, for how many times fewer bytes, and how it got there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from train import figures

CURVES = 8  # methods whose way is drawn: with more, none can be told from another


class Ended(NamedTuple):
    """The trainings of one method at one budget."""

    name: str
    link_ratio: float
    scores: list[float]  # one a seed, at the end
    ways: list[Mapping[int, float]]  # one a seed: test score by step


def draw(methods: Sequence[Ended], kind: str, path: Path) -> None:
    """Draw one row for each method, the best at the top, and the way of the first methods.

    Args:
      methods: in the order asked for; the scores are losses in nats for text, accuracies for images.
      kind: of the data.
      path: of the picture.
    """
    import matplotlib as mpl

    score = "test loss, nats" if kind == "text" else "test accuracy"
    shown = [m for m in methods if any(np.isfinite(m.scores))]
    order = sorted(shown, key=lambda m: float(np.nanmean(m.scores)), reverse=kind == "text")
    colours = {m.name: mpl.colormaps["tab10"](place % 10) for place, m in enumerate(shown)}
    with figures.canvas(2, path, height=max(4.0, 1.3 + 0.27 * len(order))) as (rows, ways):
        for place, method in enumerate(order):
            rows.scatter(method.scores, [place] * len(method.scores), color=colours[method.name], s=18, zorder=2)
            rows.scatter(np.nanmean(method.scores), place, color=colours[method.name], s=150, marker="|", zorder=3)
        for method in shown:
            if method.link_ratio == 1:
                rows.axvline(float(np.nanmean(method.scores)), color="#999999", lw=0.8, ls=":")
        rows.set(title=f"{score}, at the end of training", ylim=(-0.7, len(order) - 0.3), yticks=range(len(order)))
        rows.set_yticklabels([f"{m.name}, {m.link_ratio:.3g} x" for m in order])
        if kind == "text":
            rows.set_xscale("log")
            rows.xaxis.set_major_locator(mpl.ticker.MaxNLocator(5))
            rows.xaxis.set_major_formatter("{x:.4g}")
            rows.xaxis.set_minor_locator(mpl.ticker.NullLocator())
        for method in shown[:CURVES]:
            steps = sorted(set.intersection(*(set(way) for way in method.ways)))
            values = np.array([[way[step] for step in steps] for way in method.ways])
            ways.plot(steps, values.mean(axis=0), color=colours[method.name], label=method.name, lw=1.4)
            ways.fill_between(
                steps, values.min(axis=0), values.max(axis=0), color=colours[method.name], alpha=0.2, lw=0
            )
        ways.set(title=f"{score}, by step")
        ways.legend(frameon=False, fontsize=8)
