"""Methods side by side: what each reached for how many bytes, with mean and spread over seeds."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from bokeh.models import ColumnDataSource
from bokeh.models.annotations import Span

from train.log import amount, nats, times
from train.report.groups import Group
from train.report.style import BYTES, Figure, Panel, chart, duration, hover, unit_of

Writer = Callable[[float], str]


@dataclasses.dataclass(frozen=True)
class Cell:
    """A figure of a group: its mean, and how far seeds lie apart."""

    name: str
    value: str
    spread: str


FIGURES: tuple[tuple[str, str, Writer], ...] = (
    ("test_accuracy", "test accuracy", lambda v: f"{100 * v:.2f} %"),
    ("test_loss", "test loss, nats", nats),
    ("link_ratio", "fewer link bytes", lambda v: f"{times(v)} \u00d7"),
    ("payload_ratio", "smaller payload", lambda v: f"{times(v)} \u00d7"),
    ("link_bytes", "link, in all", amount),
    ("payload_bytes", "payload, in all", amount),
    ("seconds", "time", duration),
)


def rows(groups: Sequence[Group]) -> list[tuple[Group, list[Cell]]]:
    """Set every group's results in a row.

    Args:
      groups: of one task.

    Returns:
      Each group with its cells, which are the same for all.
    """
    return [(group, [_cell(group, *figure_) for figure_ in FIGURES]) for group in groups]


def pictures(groups: Sequence[Group]) -> list[Panel]:
    """Draw quality against link bytes and against the budget.

    Args:
      groups: of one task.

    Returns:
      Panels; none where there is nothing to compare but one method with uncompressed training.
    """
    compressed = [group for group in groups if not group.dense]
    if len(compressed) < 2:
        return []
    panels = []
    for axis, title, caption in (
        (
            "link_bytes",
            "Quality against bytes",
            "Further up (accuracy) or down (loss) is better, further left is cheaper. Each mark is the mean over "
            "seeds, its bars one standard deviation; the dashed line is uncompressed training.",
        ),
        (
            "link_ratio",
            "Quality against compression",
            "How much quality each method keeps as it sends less: flat is good. Further right is more compressed; the "
            "ratio is the one measured, over the whole run.",
        ),
    ):
        views = {
            name: made
            for key, name in (("test_accuracy", "test accuracy"), ("test_loss", "test loss"))
            if (made := _picture(groups, axis, key))
        }
        if views:
            panels.append(Panel(title, caption, views, kind="views"))
    return panels


def _cell(group: Group, key: str, name: str, write: Writer) -> Cell:
    mean, deviation = group.spread(key)
    if not np.isfinite(mean):
        diverged = sum(run.diverged for run in group.counted) if key.startswith("test_") else 0
        return Cell(name, "\u2013", f"{diverged} of {len(group.counted)} diverged" if diverged else "")
    return Cell(name, write(mean), f"± {write(deviation)}" if len(group.counted) > 1 else "")


def _picture(groups: Sequence[Group], axis: str, key: str) -> Figure | None:
    points = [(group, *group.spread(axis), *group.spread(key)) for group in groups]
    points = [point for point in points if np.isfinite([point[1], point[3]]).all() and point[1] > 0]
    if not any(not group.dense for group, *_ in points):
        return None
    factor, unit = unit_of([x for _, x, *_ in points], BYTES) if axis == "link_bytes" else (1.0, "")
    percent = 100.0 if key == "test_accuracy" else 1.0
    made = chart(
        f"sent over the link by one device in all, {unit}" if unit else "times fewer link bytes than uncompressed",
        "test accuracy, %" if percent > 1 else "test loss, nats",
        height=360,
        x_axis_type="log",
    )
    marks = []
    for line in dict.fromkeys(group.way.line for group, *_ in points):
        drawn = sorted((p for p in points if p[0].way.line == line), key=lambda p: p[1])
        tags = [group.key for group, *_ in drawn]
        first = drawn[0][0]
        x, dx, y, dy = (np.asarray([point[at] for point in drawn]) for at in range(1, 5))
        x, dx, y, dy = x / factor, dx / factor, percent * y, percent * dy
        if first.dense:
            reference = Span(location=y[0], dimension="width", line_color=first.colour, line_dash="dashed", tags=tags)
            made.add_layout(reference)
        made.line(x, y, color=first.colour, line_width=1.6, tags=tags)
        ends = {"left": np.maximum(x - dx, x / 10), "right": x + dx, "low": y - dy, "high": y + dy}
        for at, (group, *_) in enumerate(drawn):
            every = {"x": x, "y": y, "dx": dx, "dy": dy, **ends}
            source = ColumnDataSource({key: values[at : at + 1] for key, values in every.items()})
            style: dict[str, Any] = {"source": source, "color": group.colour, "tags": [group.key]}
            made.segment("left", "y", "right", "y", line_width=1.2, **style)
            made.segment("x", "low", "x", "high", line_width=1.2, **style)
            marks.append(made.scatter("x", "y", size=10, marker=group.marker, name=group.label, **style))
    hover(
        made,
        marks,
        [
            ("", "$name"),
            ("link" if unit else "ratio", f"@x{{0,0.[00]}} {unit} ± @dx{{0.[00]}}"),
            (key.replace("_", " "), "@y{0.00[00]} ± @dy{0.00[00]}"),
        ],
    )
    return made
