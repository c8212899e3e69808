"""What all charts share: their frame, their tools, and how numbers are written."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from bokeh.models import (
    BasicTicker,
    BoxZoomTool,
    HoverTool,
    LinearAxis,
    LogAxis,
    LogTicker,
    NumeralTickFormatter,
    PanTool,
    ResetTool,
    SaveTool,
    WheelZoomTool,
)
from bokeh.plotting import figure

# Bokeh's annotations of its figure leave out much of what it takes
Figure = Any


@dataclasses.dataclass(frozen=True)
class Entry:
    """One line of a legend; a click on it hides what carries its key as a tag."""

    key: str
    label: str
    colour: str
    dash: tuple[int, ...] = ()
    area: bool = False


@dataclasses.dataclass(frozen=True)
class Panel:
    """One chart, or several views of it of which one is shown."""

    title: str
    caption: str
    views: dict[str, Figure]
    legend: Sequence[Entry] = ()
    kind: str = "plain"
    choices: dict[str, Any] = dataclasses.field(default_factory=dict)
    wide: bool = False


def chart(x_label: str, y_label: str, *, height: int = 300, plain: bool = True, **options: Any) -> Figure:
    """Make an empty chart that fills its column.

    Args:
      x_label: with its unit.
      y_label: with its unit.
      height: in pixels.
      plain: whether a logarithmic axis is written in plain numbers, not in powers of ten.
      **options: for Bokeh's figure.

    Returns:
      The chart; its colours are the page's, by CSS.
    """
    made: Figure = figure(
        x_axis_label=x_label,
        y_axis_label=y_label,
        height=height,
        sizing_mode="stretch_width",
        min_width=240,
        tools=[BoxZoomTool(), PanTool(), WheelZoomTool(), ResetTool(), SaveTool()],
        toolbar_location="above",
        toolbar_inner=True,
        background_fill_color=None,
        border_fill_color=None,
        outline_line_color=None,
        min_border_left=8,
        min_border_right=14,
        **options,
    )
    made.toolbar.logo = None
    made.toolbar.autohide = True
    for axis in made.axis:
        axis.axis_label_text_font_style = "normal"
        axis.minor_tick_line_color = None
        axis.major_tick_in = 0
        axis.major_tick_out = 4
        if isinstance(axis, LinearAxis):
            axis.update(formatter=NumeralTickFormatter(format="0,0.[0000]"), ticker=BasicTicker(desired_num_ticks=5))
        elif isinstance(axis, LogAxis) and plain:
            axis.update(formatter=NumeralTickFormatter(format="0,0.[000000]"), ticker=LogTicker(desired_num_ticks=5))
    made.xgrid.grid_line_color = None
    return made


def hover(made: Figure, renderers: list[Any], tooltips: list[tuple[str, str]], **options: Any) -> None:
    """Show values under the pointer.

    Args:
      made: the chart.
      renderers: of it, that have the values.
      tooltips: name and field of each value.
      **options: for Bokeh's HoverTool.
    """
    made.add_tools(HoverTool(renderers=renderers, tooltips=tooltips, **options))


def unit_of(sizes: Sequence[float], units: Sequence[tuple[float, str]]) -> tuple[float, str]:
    """Choose a unit in which the largest of some sizes reads well.

    Args:
      sizes: in the base unit.
      units: how many base units each is, ascending, and its name.

    Returns:
      The unit.

    >>> unit_of([3e6, 2e4], BYTES)
    (1000000.0, 'MB')
    """
    known = [size for size in sizes if np.isfinite(size)]
    most = max(known, default=0.0)
    return max((unit for unit in units if unit[0] <= most), default=units[0])


BYTES = ((1.0, "B"), (1e3, "kB"), (1e6, "MB"), (1e9, "GB"), (1e12, "TB"))
SECONDS = ((1.0, "s"), (3600.0, "h"))


def duration(seconds: float) -> str:
    """Write a time for people.

    >>> duration(75), duration(4.2)
    ('1.2 min', '4.2 s')
    """
    if not np.isfinite(seconds):
        return "\u2013"
    if seconds < 60:
        return f"{seconds:.3g} s" if seconds >= 1 else f"{seconds:.2f} s"
    if seconds < 3600:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 3600:.1f} h"
