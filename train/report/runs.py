"""Run folders as they lie on disk: whole, still growing, or left by a run that was killed."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from train.errors import UsageError
from train.log import read_object
from train.summary import DIVERGED, FINISHED

Lines = list[dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Run:
    """One training: what its folder's files say; empty where a file is missing."""

    folder: Path
    header: Mapping[str, Any]
    config: Mapping[str, Any]
    summary: Mapping[str, Any]
    metrics: Lines
    layers: Lines
    forecast: Lines
    phases: Mapping[str, Any]

    @property
    def name(self) -> str:
        """That of its folder, also where the path is `.`."""
        return self.folder.resolve().name

    @property
    def method(self) -> str:
        """Its label, as the run's header gives it."""
        return str(self.header.get("method") or self.summary.get("method") or self.name)

    @property
    def dense(self) -> bool:
        """Whether it is uncompressed training."""
        return (self.header.get("kind") or self.method) == "dense"

    @property
    def budget(self) -> float | None:
        """Link ratio asked for, where one was."""
        return number(self.header.get("budget"))

    @property
    def seed(self) -> Any:
        """Of parameters and data order."""
        return self.about("seed", "?")

    @property
    def task(self) -> tuple[str, str]:
        """Data set and model: only runs that share both are comparable."""
        return str(self.about("data", "unknown data")), str(self.about("model", "model"))

    @property
    def step(self) -> int:
        """Last step on record."""
        return int(number(self.metrics[-1].get("step")) or 0) if self.metrics else 0

    @property
    def planned(self) -> int | None:
        """Steps that the run was to make."""
        steps = number(next(_nested(self.config, "steps"), self.about("steps", None)))
        return None if steps is None else int(steps)

    @property
    def finished(self) -> bool:
        """Whether the run came to an end, and wrote its summary."""
        return self.summary.get("status") in (FINISHED, DIVERGED)

    @property
    def diverged(self) -> bool:
        """Whether the run came to an end with a loss that is no number."""
        return self.finished and "test_loss" in self.summary and number(self.summary["test_loss"]) is None

    def about(self, key: str, default: Any) -> Any:
        """Look a fact up in the header, the summary and the configuration, in this order.

        Args:
          key: of the fact.
          default: where none has it.

        Returns:
          The fact.
        """
        for source in (self.header, self.summary):
            if source.get(key) is not None:
                return source[key]
        found = next(_nested(self.config, key), None)
        return default if found is None else found

    def column(self, key: str) -> np.ndarray:
        """Take one figure of every step.

        Args:
          key: of metrics.jsonl.

        Returns:
          float64[steps]; not a number where there is none.
        """
        return np.asarray([number(line.get(key), np.nan) for line in self.metrics], np.float64)

    def last(self, key: str) -> float:
        """Take a figure of the whole run from its summary, or else from the last step that has it.

        Args:
          key: of summary.json and metrics.jsonl.

        Returns:
          The figure; not a number where there is none, or where the training diverged.
        """
        if key in self.summary:
            return number(self.summary[key], float("nan"))
        column = self.column(key)
        known = column[np.isfinite(column)]
        return float(known[-1]) if len(known) else float("nan")

    def ratio(self, kind: str) -> float:
        """Say how many times fewer bytes than uncompressed training the run has sent.

        Args:
          kind: payload or link.

        Returns:
          The ratio; not a number where it is not known.
        """
        value = number(self.summary.get(f"{kind}_ratio"))
        if value is not None:
            return value
        each, sent = number(self.header.get(f"dense_{kind}_bytes")), self.last(f"{kind}_bytes")
        return each * self.step / sent if each and sent > 0 else float("nan")


def find(paths: Sequence[Path]) -> list[Run]:
    """Find and read every run at or below some folders.

    Args:
      paths: to search; each must hold a run.

    Returns:
      The runs, each once, in the paths' order.

    Raises:
      UsageError: names the path that does not exist or holds no run.
    """
    folders: dict[Path, Path] = {}
    for path in paths:
        if not path.exists():
            raise UsageError(f"{path} does not exist: give a run folder, or a folder that holds some")
        if not path.is_dir():
            raise UsageError(f"{path} is not a folder: give the run folder that holds it")
        found = _folders(path)
        if not found:
            raise UsageError(f"{path} holds no run (no run.json or config.json): give a folder that train.main wrote")
        folders |= {folder.resolve(): folder for folder in found}
    return [_read(folder) for folder in folders.values()]


def number(value: Any, default: Any = None) -> Any:
    """Take a JSON value for a finite number.

    Args:
      value: of a file.
      default: for anything else, as null or NaN.

    Returns:
      A float, or the default.
    """
    known = isinstance(value, int | float) and not isinstance(value, bool) and np.isfinite(value)
    return float(value) if known else default


def numbers(value: Any) -> np.ndarray:
    """Take a JSON list, nested or not, for an array.

    Args:
      value: of a file.

    Returns:
      float64; empty where the value is no list or is ragged.
    """
    try:
        return np.asarray([] if value is None else value, np.float64)
    except (TypeError, ValueError):
        return np.zeros(0)


def _folders(path: Path) -> list[Path]:
    marked = {file.parent for name in ("run.json", "config.json") for file in path.rglob(name)}
    # The configuration of a folder that holds runs is not a run itself
    held = {parent for folder in marked for parent in folder.parents}
    return sorted(f for f in marked if f not in held or (f / "run.json").exists() or (f / "metrics.jsonl").exists())


def _read(folder: Path) -> Run:
    return Run(
        folder=folder,
        header=read_object(folder / "run.json"),
        config=read_object(folder / "config.json"),
        summary=read_object(folder / "summary.json"),
        metrics=_lines(folder / "metrics.jsonl"),
        layers=_lines(folder / "layers.jsonl"),
        forecast=_lines(folder / "forecast.jsonl"),
        phases=read_object(folder / "phases.json"),
    )


def _lines(path: Path) -> Lines:
    lines: dict[float, dict[str, Any]] = {}
    try:
        text = path.read_text(errors="replace")
    except OSError:
        return []
    for line in text.splitlines():
        try:
            value = json.loads(line)
        except ValueError:
            # Cut short by a kill; a resumed run may have gone on behind it
            continue
        step = number(value.get("step")) if isinstance(value, dict) else None
        if step is not None:
            lines[step] = value
    return [lines[step] for step in sorted(lines)]


def _nested(config: Mapping[str, Any], key: str) -> Iterator[Any]:
    if config.get(key) is not None:
        yield config[key]
    for value in config.values():
        if isinstance(value, Mapping):
            yield from _nested(value, key)
