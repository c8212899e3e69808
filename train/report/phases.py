"""Where the time of a step goes."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

import numpy as np
from bokeh.models import ColumnDataSource, FixedTicker

from train.report.groups import Group
from train.report.runs import number
from train.report.style import Entry, Panel, chart, hover

PHASES = {
    "forward_backward": ("forward and backward", "#8b929a"),
    "encode": ("encode", "#e69f00"),
    "wire": ("wire", "#2b7bba"),
    "decode": ("decode", "#009e73"),
    "optimizer": ("optimizer", "#cc79a7"),
}
LETTERS, LINES = 26, 3  # of a name at the axis: a long one would leave the bars no room


def phases(groups: Sequence[Group]) -> Panel | None:
    """Draw phases.json of every method as bars.

    Args:
      groups: of one task; of several seeds the mean is drawn.

    Returns:
      The panel; None where no run was measured.
    """
    rows = [(group.label, _mean(group)) for group in groups]
    rows = [(label, values) for label, values in rows if any(values.values())][::-1]
    if not rows:
        return None
    data: dict[str, list] = {
        "method": [label for label, _ in rows],
        "place": [at + 0.5 for at in range(len(rows))],
        "total": [sum(values.values()) for _, values in rows],
    }
    data |= {key: [values[key] for _, values in rows] for key in PHASES}
    made = chart(
        "milliseconds a step",
        "",
        height=100 + 44 * len(rows),
        y_range=(0, len(rows)),
        x_range=(0, 1.04 * max(data["total"])),
    )
    made.yaxis.ticker = FixedTicker(ticks=data["place"])
    made.yaxis.major_label_overrides = {
        place: "\n".join(textwrap.wrap(label.replace(",", ", "), LETTERS, max_lines=LINES, placeholder=" \u2026"))
        for place, label in zip(data["place"], data["method"], strict=True)
    }
    source = ColumnDataSource(data)
    drawn = made.hbar_stack(list(PHASES), y="place", height=0.62, color=[c for _, c in PHASES.values()],
                            source=source, line_color=None)  # fmt: skip
    for key, bar in zip(PHASES, drawn, strict=True):
        bar.tags = [f"phase-{key}"]
        hover(made, [bar], [("", "@method"), (PHASES[key][0], f"@{key}{{0.00}} ms"), ("in all", "@total{0.00} ms")])
    made.xgrid.grid_line_color = "#808080"
    made.xgrid.grid_line_alpha = 0.2
    made.ygrid.grid_line_color = made.yaxis.axis_line_color = made.yaxis.major_tick_line_color = None
    notes = dict.fromkeys(str(run.phases["note"]) for group in groups for run in group.runs if run.phases.get("note"))
    return Panel(
        "Where the time of a step goes",
        "Compression pays where the wire's share shrinks by more than encoding and decoding take. " + " ".join(notes),
        {"": made},
        tuple(Entry(f"phase-{key}", name, colour, area=True) for key, (name, colour) in PHASES.items()),
        wide=True,
    )


def _mean(group: Group) -> dict[str, float]:
    values = {key: [number(run.phases.get(key)) for run in group.runs] for key in PHASES}
    return {
        key: 1000 * float(np.mean(known)) if (known := [v for v in found if v is not None]) else 0.0
        for key, found in values.items()
    }
