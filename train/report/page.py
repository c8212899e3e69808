"""The page: every task's charts and words in one HTML file that loads nothing."""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import importlib.resources
from collections.abc import Sequence
from pathlib import Path

import jinja2
from bokeh.embed import components
from bokeh.resources import Resources

from train.errors import UsageError
from train.report import comparison, curves, words
from train.report.forecast import forecasts
from train.report.groups import Group, gather
from train.report.layers import layers
from train.report.phases import phases
from train.report.runs import Run, find
from train.report.style import Panel


@dataclasses.dataclass(frozen=True)
class Section:
    """Charts under one heading, and what can be chosen for all of them."""

    key: str
    title: str
    says: str
    panels: list[Panel]
    choices: dict[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Task:
    """All that is shown of one data set and model."""

    key: str
    title: str
    lead: list[str]
    best: str
    tiles: list[words.Tile]
    groups: list[Group]
    rows: list[tuple[Group, list[comparison.Cell]]]
    sections: list[Section]
    runs: list[Run]
    bucket: int

    @property
    def seeded(self) -> bool:
        """Whether a group has several seeds, so that there is a mean and a spread."""
        return any(len(group.runs) > 1 for group in self.groups)

    @property
    def repeated(self) -> bool:
        """Whether a seed of a group was run more than once."""
        return len(self.runs) > sum(len(group.runs) for group in self.groups)


def write(folders: Sequence[Path], out: Path) -> Path:
    """Write the report of every run at or below some folders.

    Args:
      folders: that are runs or hold some.
      out: path of the page.

    Returns:
      The page's path.

    Raises:
      UsageError: a folder holds no run, or the page cannot be written.
    """
    if not folders:
        raise UsageError("no run was given: name one or more run folders")
    runs = find([Path(folder) for folder in folders])
    text = render(runs)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text, encoding="utf-8", errors="replace")  # paths may hold any bytes
    except OSError as error:
        raise UsageError(f"--out {out} cannot be written ({error.strerror}): choose another path") from error
    return out


def render(runs: Sequence[Run]) -> str:
    """Make the page.

    Args:
      runs: at least one.

    Returns:
      HTML that holds its scripts, its style and its data.
    """
    found: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        found.setdefault(run.task, []).append(run)
    tasks = [_task(f"t{at}", task, held) for at, (task, held) in enumerate(found.items())]
    models = {
        f"{task.key}-{section.key}-{at}-{view}": figure
        for task in tasks
        for section in task.sections
        for at, panel in enumerate(section.panels)
        for view, figure in enumerate(panel.views.values())
    }
    script, places = components(models, wrap_script=False) if models else ("", {})
    files = importlib.resources.files(__package__)
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    return environment.from_string((files / "page.html").read_text(encoding="utf-8")).render(
        title=" · ".join([task.title for task in tasks[:3]] + ([f"{len(tasks) - 3} more"] if len(tasks) > 3 else [])),
        tasks=tasks,
        places=places,
        glossary=words.GLOSSARY,
        style=(files / "page.css").read_text(encoding="utf-8"),
        script=(files / "page.js").read_text(encoding="utf-8"),
        charts=script,
        library="\n".join(Resources(mode="inline", components=["bokeh"]).js_raw),
        made=datetime.datetime.now().astimezone().strftime("%d %B %Y, %H:%M"),
        count=len(runs),
        bokeh=importlib.metadata.version("bokeh"),
    )


def _task(key: str, task: tuple[str, str], runs: list[Run]) -> Task:
    groups = gather(runs, key)
    held = curves.tables(groups)
    maps, choices = layers(groups)
    forecast, time = forecasts(groups), phases(groups)
    best, tiles = words.tiles(groups, task)
    sections = [
        Section("quality", "Quality for the bytes", "", comparison.pictures(groups)),
        Section("learning", "Learning", "", curves.learning(held)),
        Section("steps", "Compression, step by step", "", curves.compression(held)),
        Section(
            "forecast",
            "Forecast against what came",
            "Before each step a small network forecasts how large the entries of each layer will be; two thresholds "
            "follow from it.",
            [forecast] if forecast else [],
        ),
        Section(
            "layers",
            "Layer by layer",
            "Each row is a layer of the network, the first at the top; time runs to the right.",
            maps,
            choices,
        ),
        Section("time", "Time", "", [time] if time else []),
    ]
    return Task(
        key,
        f"{task[1]} on {task[0]}",
        words.lead(task, runs, groups),
        best,
        tiles,
        groups,
        comparison.rows(groups),
        [section for section in sections if section.panels],
        runs,
        held.bucket,
    )
