"""The files that a run writes while it goes: metrics, layers, forecasts, and TensorBoard events."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import numpy as np

import gradpart_jax as gp
from train.errors import UsageError
from train.log import Journal
from train.placing import one

SHOWN = 6  # segments whose forecast is kept, those with most elements


class Record:
    """A run's files, for the length of a with-block; lines after `start` are dropped from those that exist.

    Args:
      folder: of the run.
      start: steps already done.
      header: of run.json.
      family: of the forecast; None where the method has no forecast.
      tensorboard: whether to write its events.
    """

    def __init__(
        self, folder: Path, start: int, header: dict[str, Any], family: str | None, *, tensorboard: bool
    ) -> None:
        self._folder, self._start, self._family = folder, start, family
        self._events = _events(folder, start) if tensorboard else None
        largest = np.argsort([-size for size in header["sizes"]], kind="stable")[:SHOWN]
        self._shown = np.sort(largest)
        self._names = [header["segments"][i] for i in self._shown]
        self._inspect: Callable[[Any], Any] | None = None
        if family is not None:
            self._inspect = jax.jit(functools.partial(gp.inspect, family=family))

    def __enter__(self) -> Record:
        """Open the files."""
        with contextlib.ExitStack() as stack:
            self._metrics, self._layers, self._forecast = (
                stack.enter_context(Journal(self._folder / f"{name}.jsonl", self._start))
                for name in ("metrics", "layers", "forecast")
            )
            if self._events is not None:
                stack.callback(self._events.close)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close them."""
        self._stack.close()

    def step(self, line: dict[str, Any], stats: gp.Stats, opt_state: Any, *, evaluated: bool) -> None:
        """Keep a step's numbers, and now and then those of layers and of the forecast.

        Args:
          line: of metrics.jsonl.
          stats: of the exchange.
          opt_state: placed.
          evaluated: whether the step was followed by an evaluation.
        """
        number = line["step"]
        if evaluated and self._inspect is not None:
            found = self._inspect(jax.tree.map(np.asarray, one(opt_state)))
            arrays = {key: np.asarray(value)[self._shown] for key, value in found._asdict().items()}
            self._forecast.write({"step": number, "segments": self._names, **arrays})
        # Thresholds, counts and entropies of each segment, of methods that have them
        if (evaluated or number & (number - 1) == 0) and np.any(stats.threshold):
            self._layers.write(
                {
                    "step": number,
                    "threshold": stats.threshold,
                    "asked": stats.asked,
                    "realised": stats.realised,
                    "entropy": stats.segment_entropy,
                }
            )
        self._metrics.write(line)
        if self._events is not None:
            for key, value in line.items():
                if key != "step":
                    self._events.add_scalar(key, value, number)


def _events(folder: Path, start: int) -> Any:
    try:
        from tensorboardX import SummaryWriter
    except ImportError as error:
        raise UsageError("--tensorboard needs tensorboardX: run `pip install -e '.[train]'`") from error
    return SummaryWriter(str(folder / "tensorboard"), purge_step=start + 1)
