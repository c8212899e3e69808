"""Lines over a training: loss and accuracy, and what the compressor did at each step."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from bokeh.models import ColumnDataSource, DataRange1d

from train.report.groups import Group
from train.report.style import BYTES, SECONDS, Figure, Panel, chart, hover, unit_of

POINTS = 2000  # of one line
ALL_POINTS = 8000  # of one figure over all runs
FEWEST = 250
FAR = 1e7  # a figure beyond is that of a training that runs away: powers of ten show how it went
FAINT = 6  # methods at most whose loss on training data is drawn too

AXES = ("step", "payload_bytes", "link_bytes", "seconds")
COMPRESSION = {
    "link_ratio": (
        "Compression on the link",
        "times fewer link bytes",
        "How many times fewer bytes each step puts on the link than uncompressed training. A flat line keeps its "
        "budget; steps at 1 are sent uncompressed.",
    ),
    "payload_ratio": (
        "Compression of the payload",
        "times fewer payload bytes",
        "The same for what one device encodes, before the exchange multiplies it.",
    ),
    "entropy": (
        "Entropy of the forecast",
        "bits per entry",
        "How spread out the forecast takes the gradient to be, on average over all entries. Layers with more entropy "
        "get more of the budget.",
    ),
    "overflow": (
        "Overflow",
        "entries a step",
        "Entries above the thresholds that did not fit into the payload; they wait in the memory. Near zero is good, "
        "short spikes are harmless.",
    ),
    "forecast_error": (
        "Forecast error",
        "% off the exact threshold",
        "How far the forecast's thresholds lie above (+) or below (\u2212) those that would have met the budget "
        "exactly. Near zero is good.",
    ),
    "memory_norm": (
        "What is remembered",
        "norm of the memory",
        "Size of all that was not sent yet and is added to later gradients. It should level off; steady growth means "
        "that too little is sent.",
    ),
}
# What a bucket of steps is drawn as: a cumulative or rare figure must not be averaged away
LAST, LARGEST = {*AXES}, {"overflow"}
FORECAST = ("entropy", "forecast_error")  # methods that forecast nothing write 0 for them


Rows = list[tuple[Group, ColumnDataSource]]


@dataclasses.dataclass(frozen=True)
class Tables:
    """What is drawn of the runs of one task, of several seeds the mean, thinned out to a page's size."""

    steps: Rows
    evaluations: Rows
    units: dict[str, str]
    bucket: int  # most steps that one point stands for


def tables(groups: Sequence[Group]) -> Tables:
    """Take the figures that are drawn, in the units they are drawn in.

    Args:
      groups: of one task.

    Returns:
      Tables that all charts share, so that the page holds each number once.
    """
    runs = [run for group in groups for run in group.runs]
    points = max(FEWEST, min(POINTS, ALL_POINTS // max(len(groups), 1)))
    scale = {"step": (1.0, ""), "loss": (1.0, "nats"), "accuracy": (0.01, "%")}
    for key in ("payload_bytes", "link_bytes"):
        scale[key] = unit_of([run.last(key) for run in runs], BYTES)
    scale["seconds"] = unit_of([run.last("seconds") for run in runs], SECONDS)
    steps, evaluations, most = [], [], 1
    for group in groups:
        length = max(len(run.metrics) for run in group.runs)
        bucket = max(1, -(-length // points))
        most = max(most, bucket)
        each = {
            key: _over([run.column(key) for run in group.runs]) for key in (*AXES, "loss", "accuracy", *COMPRESSION)
        }
        before = each["payload_bytes"][0] == 0  # the first exchange, with local steps: figures are of none
        each |= {key: (np.where(before, np.nan, each[key][0]), each[key][1]) for key in COMPRESSION}
        drawn = {key: thin(mean, bucket, key) for key, (mean, _) in each.items()}
        drawn["forecast_error"] = 100 * np.expm1(drawn["forecast_error"])
        if not group.foretells:
            drawn |= {key: np.full_like(drawn[key], np.nan) for key in FORECAST}
        steps.append((group, _source(drawn, scale)))
        tests = {key: _over([run.column(f"test_{key}") for run in group.runs]) for key in ("loss", "accuracy")}
        seen = np.isfinite(tests["loss"][0]) | np.isfinite(tests["accuracy"][0])
        seen &= np.cumsum(seen) % max(1, -(-int(seen.sum()) // points)) == 0
        drawn = {key: each[key][0][seen] for key in AXES}
        for key, (mean, spread) in tests.items():
            drawn |= {key: mean[seen], f"{key}_low": (mean - spread)[seen], f"{key}_high": (mean + spread)[seen]}
            scale[f"{key}_low"] = scale[f"{key}_high"] = scale[key]
        evaluations.append((group, _source(drawn, scale)))
    return Tables(steps, evaluations, {key: unit for key, (_, unit) in scale.items()}, most)


def _over(columns: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    # Mean and spread over seeds, of those that came so far
    held = np.full((len(columns), max(len(column) for column in columns)), np.nan)
    for row, column in zip(held, columns, strict=True):
        row[: len(column)] = column
    known = np.isfinite(held)
    count = known.sum(axis=0)
    mean = np.where(count > 0, np.where(known, held, 0.0).sum(axis=0) / np.maximum(count, 1), np.nan)
    squares = np.where(known, (held - mean) ** 2, 0.0).sum(axis=0)
    return mean, np.sqrt(squares / np.maximum(count - 1, 1))


def thin(column: np.ndarray, bucket: int, key: str) -> np.ndarray:
    """Let one point stand for a bucket of steps: their mean, largest or last.

    Args:
      column: float64[n].
      bucket: steps a point.
      key: says which of them.

    Returns:
      float64[n / bucket, rounded up].

    >>> thin(np.asarray([1.0, 3.0, np.nan, 5.0, 7.0]), 2, "loss")
    array([2., 5., 7.])
    """
    if bucket == 1 or not len(column):
        return column
    starts = np.arange(0, len(column), bucket)
    if key in LAST:
        return column[np.minimum(starts + bucket, len(column)) - 1]
    known = np.isfinite(column)
    if key in LARGEST:
        best = np.maximum.reduceat(np.where(known, column, -np.inf), starts)
        return np.where(np.isfinite(best), best, np.nan)
    count = np.add.reduceat(known.astype(np.float64), starts)
    total = np.add.reduceat(np.where(known, column, 0.0), starts)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def learning(held: Tables) -> list[Panel]:
    """Draw loss and accuracy against steps, bytes and time.

    Args:
      held: from `tables`.

    Returns:
      Two panels with the same views; none where nothing was recorded.
    """
    panels = []
    for key, title, caption in (
        (
            "loss",
            "Loss",
            "Lower is better. Lines with marks are the loss on test data; faint ones, where there are some, on the "
            "training data of each step.",
        ),
        (
            "accuracy",
            "Accuracy",
            "Higher is better. Against bytes, a line further to the left learns the same from less traffic.",
        ),
    ):
        views = {
            name: _quality(held, axis, key)
            for axis, name in zip(AXES, ("steps", "payload bytes", "link bytes", "time"), strict=True)
            if _known(held.steps, axis, positive=True)
        }
        if views and (_known(held.steps, key) or _known(held.evaluations, key)):
            panels.append(Panel(title, caption, views, kind="views"))
    return panels


def compression(held: Tables) -> list[Panel]:
    """Draw what the compressor did over the steps.

    Args:
      held: from `tables`.

    Returns:
      A panel a figure that some run recorded.
    """
    compressed = [row for row in held.steps if not row[0].dense]
    panels = []
    for key, (title, label, caption) in COMPRESSION.items():
        if not _known(compressed, key):
            continue
        every = np.concatenate([source.data[key] for _, source in compressed])
        low, high = np.nanmin(every), np.nanmax(every)
        far = key == "memory_norm" and high > FAR
        log = far or ("ratio" in key and 0 < 4 * low < high)
        made = chart("step", label, height=260, y_axis_type="log" if log else "linear", plain=not far)
        if "ratio" in key and not log:
            made.y_range = DataRange1d(start=0)
        lines = [
            made.line("step", key, source=source, color=group.colour, line_dash=list(group.dash), line_width=1.6,
                      line_alpha=0.9, name=_name(group), tags=[group.key])
            for group, source in compressed
        ]  # fmt: skip
        hover(made, lines, [("", "$name"), ("step", "@step{0,0}"), (label, f"@{key}{{0.[000]}}")])
        panels.append(Panel(title, caption, {"": made}))
    return panels


def _quality(held: Tables, axis: str, key: str) -> Figure:
    unit = held.units[axis]
    says = {
        "step": "training step",
        "payload_bytes": f"payload of one device so far, {unit}",
        "link_bytes": f"sent over the link by one device so far, {unit}",
        "seconds": f"training time, {unit}",
    }[axis]
    measure = {"loss": "loss, nats", "accuracy": "accuracy, %"}[key]
    drawn = np.concatenate([source.data[key] for _, source in (*held.steps, *held.evaluations)])
    far = bool((drawn > FAR).any())
    scales = {"x_axis_type": "log" if "bytes" in axis else "linear", "y_axis_type": "log" if far else "linear"}
    made = chart(says, measure, height=340, plain=not far, **scales)
    marks = []
    for group, source in held.steps if len(held.steps) <= FAINT else []:
        faint: dict[str, Any] = {
            "source": source,
            "color": group.colour,
            "line_alpha": 0.45,
            "line_width": 1,
            "level": "underlay",
        }
        made.line(axis, key, tags=[group.key], **faint)
    for group, source in held.evaluations:
        style: dict[str, Any] = {"source": source, "color": group.colour, "name": _name(group), "tags": [group.key]}
        if len(group.runs) > 1:
            made.varea(
                axis, f"{key}_low", f"{key}_high", source=source, color=group.colour, alpha=0.15, tags=[group.key]
            )
        made.line(axis, key, line_width=2, line_dash=list(group.dash), **style)
        marks.append(made.scatter(axis, key, size=6, marker=group.marker, **style))
    hover(
        made,
        marks,
        [
            ("", "$name"),
            ("step", "@step{0,0}"),
            (f"test {key}", f"@{key}{{0.[0000]}}"),
            ("payload", f"@payload_bytes{{0,0.[00]}} {held.units['payload_bytes']}"),
            ("link", f"@link_bytes{{0,0.[00]}} {held.units['link_bytes']}"),
        ],
    )
    return made


def _source(columns: dict[str, np.ndarray], scale: dict[str, tuple[float, str]]) -> ColumnDataSource:
    factors = {key: factor for key, (factor, _) in scale.items()}
    data = {key: (column / factors.get(key, 1.0)).astype(np.float32) for key, column in columns.items()}
    return ColumnDataSource(data)


def _known(rows: Rows, key: str, positive: bool = False) -> bool:
    columns = [np.asarray(source.data[key]) for _, source in rows]
    return any((np.isfinite(column) & (column > 0 if positive else True)).any() for column in columns)


def _name(group: Group) -> str:
    return f"{group.label}, mean of {len(group.runs)} seeds" if len(group.runs) > 1 else group.label
