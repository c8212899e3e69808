"""Heat maps, layers by steps: where each layer's thresholds lay, and what it sent."""

from __future__ import annotations

import posixpath
from collections.abc import Sequence
from typing import Any

import numpy as np
from bokeh.models import (
    BasicTicker,
    ColumnDataSource,
    CustomJSHover,
    FixedTicker,
    LinearColorMapper,
    LogColorMapper,
    LogTicker,
)
from bokeh.models.annotations import ColorBar
from bokeh.palettes import Cividis256

from train.report.groups import Group
from train.report.runs import Run, number, numbers
from train.report.style import Figure, Panel, chart, hover

COLUMNS = 80  # of one heat map
RUNS = 6  # that one can choose among
NAMES = 40  # layers that are named at the axis
LETTERS = 18
LEAST = 1e-30  # a threshold below is that of a layer of which nothing was known yet
BETWEEN = "#868e96"  # read on white as on black: a colour bar takes no colours from the page

# Title, unit, whether the colours are logarithmic, caption
QUANTITIES = {
    "key": (
        "Threshold of the key region",
        "magnitude",
        True,
        "Where the key region begins: entries above are sent precisely.",
    ),
    "sparse": (
        "Threshold",
        "magnitude",
        True,
        "Entries below are not sent, but remembered. By partition the sparse region begins here.",
    ),
    "density": (
        "Density",
        "% of entries sent",
        True,
        "Which layers send most of themselves; brighter rows get more of the budget. Empty where nothing was sent.",
    ),
    "met": (
        "Sent against asked for",
        "times",
        True,
        "1 where a layer sent what it was asked for; brighter where it sent more.",
    ),
    "entropy": (
        "Entropy",
        "bits",
        False,
        "Layers with a higher entropy have a broader spread of magnitudes, and get more of the budget.",
    ),
}
FORETOLD = ("key", "entropy")  # which methods without a forecast do not have


def layers(groups: Sequence[Group]) -> tuple[list[Panel], dict[str, str]]:
    """Draw what layers.jsonl holds.

    Args:
      groups: of one task.

    Returns:
      A panel a quantity, and the runs to choose among, by the name of their data.
    """
    runs = chosen(groups, "layers")
    held = [(group, run, _stash(run)) for group, run in runs]
    held = [(group, run, stash) for group, run, stash in held if stash]
    for group, _, stash in held:
        for key in () if group.foretells else FORETOLD:
            del stash[key]
    panels = []
    for key, (title, unit, log, caption) in QUANTITIES.items():
        images = {f"{at}": stash[key] for at, (_, _, stash) in enumerate(held) if key in stash}
        if images and any(np.isfinite(image).any() for image in images.values()):
            made = _map([stash for _, _, stash in held], key, unit, log)
            panels.append(Panel(title, caption, {"": made}, kind="map"))
    return panels, {f"{at}": title_of(group, run) for at, (group, run, _) in enumerate(held)}


def chosen(groups: Sequence[Group], what: str) -> list[tuple[Group, Run]]:
    """Choose the runs that are shown layer by layer: of each group the first, then further seeds.

    Args:
      groups: of one task.
      what: the attribute of a run that it must have lines of.

    Returns:
      At most RUNS of them.
    """
    able = [[(group, run) for run in group.runs if getattr(run, what)] for group in groups]
    firsts = [rows[0] for rows in able if rows]
    return (firsts + [row for rows in able for row in rows[1:]])[:RUNS]


def title_of(group: Group, run: Run) -> str:
    """Name a run among others of its task."""
    return f"{group.label}, seed {run.seed}"


def short(names: Sequence[str]) -> list[str]:
    """Cut names of layers to what tells them from their neighbours.

    >>> short(["Transformer_0/Block_3/Attention_0/Dense_1/kernel", "Transformer_0/Embed_0/embedding"])
    ['Block_3/…_1/kernel', 'Embed_0/embedding']
    """
    common = posixpath.commonpath(names) if len(names) > 1 and not any(name.startswith("/") for name in names) else ""
    cut = [name.removeprefix(f"{common}/") for name in names]
    head = LETTERS // 2 - 1
    return [name if len(name) <= LETTERS else f"{name[:head]}\u2026{name[head - LETTERS + 1 :]}" for name in cut]


def names_of(run: Run, count: int) -> list[str]:
    """List the names of a run's segments, or their numbers where the header has none."""
    names = run.header.get("segments")
    return (
        [str(n) for n in names]
        if isinstance(names, list) and len(names) == count
        else [f"segment {i}" for i in range(count)]
    )


def _stash(run: Run) -> dict[str, Any]:
    shape = next(
        (t.shape for line in run.layers if (t := numbers(line.get("threshold"))).ndim == 2 and t.shape[1] == 2), None
    )
    if shape is None:
        return {}
    count = shape[0]
    lines = [line for line in run.layers if numbers(line.get("threshold")).shape == shape]
    if len(lines) > COLUMNS:
        lines = [lines[at] for at in np.unique(np.linspace(0, len(lines) - 1, COLUMNS).round().astype(int))]

    def rows(key: str) -> np.ndarray:
        columns = [numbers(line.get(key)) for line in lines]
        return np.stack([c if c.shape == (count,) else np.full(count, np.nan) for c in columns], axis=1)

    threshold = np.stack([numbers(line["threshold"]) for line in lines], axis=2)
    asked, realised, sizes = rows("asked"), rows("realised"), numbers(run.header.get("sizes"))
    with np.errstate(divide="ignore", invalid="ignore"):
        made = {
            "sparse": threshold[:, 0],
            "key": threshold[:, 1],
            "entropy": rows("entropy"),
            "met": realised / asked,
        }
        if sizes.shape == (count,):
            made["density"] = 100 * realised / sizes[:, None]
    for key, values in made.items():
        nothing = (values < LEAST) & QUANTITIES[key][2]
        # The first layer stands at the top
        made[key] = np.where(np.isfinite(values) & ~nothing, values, np.nan)[::-1].astype(np.float32)
    return made | {"steps": [int(number(line["step"])) for line in lines], "names": names_of(run, count)[::-1]}


def _map(stashes: list[dict[str, Any]], key: str, unit: str, log: bool) -> Figure:
    first = next(stash for stash in stashes if key in stash)
    every = np.concatenate([stash[key].ravel() for stash in stashes if key in stash])
    low, high = (float(np.nanpercentile(every, q)) for q in (1, 99))
    if not high > low:
        low, high = (low / 1.5, high * 1.5 + 1e-12) if log else (low - 0.5, high + 0.5)
    mapper = (LogColorMapper if log else LinearColorMapper)(
        palette=Cividis256, low=low, high=high, nan_color="rgba(0,0,0,0)"
    )
    names, steps = first["names"], first["steps"]
    made = chart(
        "step of each record",
        "",
        height=int(np.clip(14 * len(names) + 110, 220, 560)),
        x_range=(0, len(steps)),
        y_range=(0, len(names)),
    )
    # What a choice of another run puts in place of this one; tags carry it into the page
    made.tags = [
        {
            f"{at}": {"image": stash[key], "steps": stash["steps"], "ticks": ticks(stash["steps"])}
            for at, stash in enumerate(stashes)
            if key in stash
        }
    ]
    source = ColumnDataSource(
        {"image": [first[key]], "x": [0], "y": [0], "dw": [len(steps)], "dh": [len(names)]}, tags=list(steps)
    )
    image = made.image("image", source=source, x="x", y="y", dw="dw", dh="dh", color_mapper=mapper)
    made.xaxis.ticker = FixedTicker(ticks=[tick for tick, _ in ticks(steps)])
    made.xaxis.major_label_overrides = dict(ticks(steps))
    named = short(names)
    shown = range(0, len(names), -(-len(names) // NAMES))
    made.yaxis.ticker = FixedTicker(ticks=[at + 0.5 for at in shown])
    made.yaxis.major_label_overrides = {at + 0.5: named[at] for at in shown}
    made.yaxis.axis_line_color = made.ygrid.grid_line_color = made.yaxis.major_tick_line_color = None
    bar = ColorBar(
        color_mapper=mapper,
        ticker=LogTicker(desired_num_ticks=4) if log and high > 8 * low else BasicTicker(desired_num_ticks=4),
        location=(0, 0),
        background_fill_color=None,
        title=unit,
        title_text_font_style="normal",
        title_text_font_size="11px",
        title_text_color=BETWEEN,
        major_label_text_color=BETWEEN,
        padding=4,
        orientation="horizontal",
        height=9,
        width="auto",
    )
    made.add_layout(bar, "below")
    layer = CustomJSHover(args={"names": names}, code="return names[Math.floor(special_vars.y)] ?? ''")
    step = CustomJSHover(args={"source": source}, code="return `${source.tags[Math.floor(special_vars.x)] ?? ''}`")
    hover(
        made,
        [image],
        [
            ("layer", "$y{custom}"),
            ("step", "$x{custom}"),
            (unit, "@image{0.[0000]}" if key not in ("key", "sparse") else "@image{0.00e+0}"),
        ],
        formatters={"$y": layer, "$x": step},
    )
    return made


def ticks(steps: list[int]) -> list[tuple[float, str]]:
    """Choose at most six columns to write the step under."""
    every = max(1, -(-len(steps) // 6))
    return [(at + 0.5, f"{steps[at]:,}") for at in range(0, len(steps), every)]
