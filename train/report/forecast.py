"""The forecast of a layer's magnitudes beside what was observed, with the regions that followed from it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from bokeh.models import ColumnDataSource
from bokeh.models.annotations import BoxAnnotation, Span

from train.report.groups import Group
from train.report.layers import chosen, title_of
from train.report.runs import Run, number, numbers
from train.report.style import Entry, Figure, Panel, chart, hover

STEPS = 60  # of one run
NEVER, SPARSE, KEY, FORECAST = "#8b929a", "#e69f00", "#d55e00", "#2b7bba"
OBSERVED = "#6b727a"
LEAST = 1e-6  # share of entries an octave, at the foot of the chart


@dataclasses.dataclass(frozen=True)
class Shown:
    """The histograms of one run: T steps, S layers, B bins."""

    steps: list[int]
    names: list[str]
    edges: np.ndarray  # [T, S, B + 1]
    forecast: np.ndarray  # [T, S, B]: masses
    observed: np.ndarray  # [T, S, B]
    threshold: np.ndarray  # [T, S, 2]: at which the sparse and the key region begin
    sent: np.ndarray  # [T, S]: share of its entries that a layer sent; not a number where it is not known


def forecasts(groups: Sequence[Group]) -> Panel | None:
    """Draw what forecast.jsonl holds, one run, layer and step at a time.

    Args:
      groups: of one task.

    Returns:
      The panel, with its choices; None where no run has forecasts.
    """
    found = [(title_of(group, run), shown) for group, run in chosen(groups, "forecast") if (shown := _shown(run))]
    if not found:
        return None
    runs = [{"title": title, "layers": shown.names, "steps": shown.steps, **_drawn(shown)} for title, shown in found]
    choices = {
        "runs": {f"{at}": title for at, (title, _) in enumerate(found)},
        "layers": found[0][1].names,
        "steps": found[0][1].steps,
    }
    legend = (
        Entry("observed", "observed", OBSERVED, area=True),
        Entry("forecast", "forecast", FORECAST),
        Entry("never", "not sent, remembered", NEVER, area=True),
        Entry("sparse", "sparse region", SPARSE, area=True),
        Entry("key", "key region", KEY, area=True),
    )
    return Panel(
        "Forecast and regions",
        "A good forecast (line) follows the observed shape (bars), above all at the right, where the thresholds lie. "
        "Only what lies in the shaded sparse and key regions is sent. The bars are the last histogram, which is some "
        "steps old: where magnitudes change fast, as at a training's end, forecast and thresholds have gone on. The "
        "outermost bins hold all that lies beyond.",
        {"": _picture(runs)},
        legend,
        kind="forecast",
        choices=choices,
        wide=True,
    )


def _shown(run: Run) -> Shown | None:
    keys = ("edges", "forecast", "observed", "threshold")
    rows = [(line, {key: numbers(line.get(key)) for key in keys}) for line in run.forecast]
    rows = [(line, arrays) for line, arrays in rows if all(a.ndim == 2 and a.size for a in arrays.values())]
    # Steps of one shape alone: the last one's
    rows = [(line, arrays) for line, arrays in rows if all(arrays[key].shape == rows[-1][1][key].shape for key in keys)]
    if not rows:
        return None
    layers, bins = rows[-1][1]["forecast"].shape
    wanted = ((layers, bins + 1), (layers, bins), (layers, bins), (layers, 2))
    if any(rows[-1][1][key].shape != shape for key, shape in zip(keys, wanted, strict=True)):
        return None
    if len(rows) > STEPS:
        rows = [rows[at] for at in np.unique(np.linspace(0, len(rows) - 1, STEPS).round().astype(int))]
    found = rows[-1][0].get("segments")
    known = found if isinstance(found, list) and len(found) == layers else range(layers)
    names, steps = [str(name) for name in known], [int(number(line["step"])) for line, _ in rows]
    stacked = {key: np.stack([arrays[key] for _, arrays in rows]) for key in keys}
    return Shown(steps, names, **stacked, sent=_sent(run, steps, names))


def _sent(run: Run, steps: Sequence[int], names: Sequence[str]) -> np.ndarray:
    """Say which share of their entries layers sent; a histogram of an earlier step does not tell."""
    segments, sizes = run.header.get("segments"), numbers(run.header.get("sizes"))
    made = np.full((len(steps), len(names)), np.nan)
    if not isinstance(segments, list) or sizes.shape != (len(segments),):
        return made
    places = [segments.index(name) if name in segments else -1 for name in names]
    for line in run.layers:
        counts = numbers(line.get("realised"))
        if line["step"] in steps and counts.shape == sizes.shape:
            shares = np.append(counts / np.maximum(sizes, 1), np.nan)  # the last for names that are not known
            made[steps.index(line["step"])] = shares[places]
    return made


def _drawn(shown: Shown) -> dict[str, Any]:
    with np.errstate(divide="ignore", invalid="ignore"):
        octaves = np.log2(shown.edges[..., 1:] / shown.edges[..., :-1])
        octaves = np.where(np.isfinite(octaves) & (octaves > 0), octaves, 1.0)
    bars, line = (_flat(np.maximum(np.nan_to_num(m) / octaves, LEAST)) for m in (shown.observed, shown.forecast))
    return {
        "bins": shown.forecast.shape[2],
        "left": _flat(shown.edges[..., :-1]),
        "right": _flat(shown.edges[..., 1:]),
        "observed": bars,
        "forecast": line,
        # Where more lay above the sparse threshold than had room, the key region can begin below it
        "thresholds": _flat(np.maximum.accumulate(shown.threshold, axis=-1)),
        "sent": _flat(shown.sent),
    }


def _flat(values: np.ndarray) -> np.ndarray:
    return values.astype(np.float32).ravel()


def _picture(runs: list[dict[str, Any]]) -> Figure:
    made = chart(
        "magnitude of gradient and memory",
        "share of entries an octave",
        height=380,
        plain=False,
        x_axis_type="log",
        y_axis_type="log",
        y_range=(LEAST, 6.0),  # all entries in one bin, the narrowest of which is a fifth of an octave
        x_range=(1e-6, 1.0),
    )
    made.tags = [runs]
    for name, colour, alpha in (("never", NEVER, 0.10), ("sparse", SPARSE, 0.20), ("key", KEY, 0.24)):
        style: dict[str, Any] = {
            "fill_color": colour,
            "fill_alpha": alpha,
            "line_color": None,
            "level": "underlay",
            "tags": [name],
        }
        made.add_layout(BoxAnnotation(left=1e-6, right=1e-5, **style))
    for name, colour in (("sparse", SPARSE), ("key", KEY)):
        made.add_layout(
            Span(location=1e-5, dimension="height", line_color=colour, line_width=1.5, line_dash="dashed", tags=[name])
        )
    source = ColumnDataSource({key: [] for key in ("left", "right", "center", "observed", "forecast", "foot")})
    bars = made.quad(
        left="left", right="right", top="observed", bottom="foot", source=source, fill_color=OBSERVED,
        fill_alpha=0.45, line_color=None, tags=["observed"],
    )  # fmt: skip
    made.line("center", "forecast", source=source, color=FORECAST, line_width=2.5, tags=["forecast"])
    hover(
        made,
        [bars],
        [
            ("magnitude", "@left{0.00e+0} to @right{0.00e+0}"),
            ("observed", "@observed{0.00e+0}"),
            ("forecast", "@forecast{0.00e+0}"),
        ],
    )
    return made
