"""The steps of one training, from wherever it stands to its end."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from rich.console import Console

import gradpart_jax as gp
from train import agree, data, evaluate, hosts, methods, step
from train.checkpoint import FOLDER, Checkpoints, steps_on_disk
from train.config import Config
from train.errors import SIGPIPE, Interrupted, NonFiniteError
from train.interrupts import Interrupts
from train.placing import one, place
from train.program import Program
from train.record import Record
from train.screen import Screen, say

TRACED = (3, 8)  # steps after the start that --profile traces


class Standing(NamedTuple):
    """Where a training stands."""

    done: int  # steps
    state: step.State  # placed
    payload_bytes: float  # of one device, so far
    link_bytes: float
    seconds: float  # of training so far, without compilation, evaluations and checkpoints

    def facts(self) -> dict[str, float]:
        """Give what a checkpoint keeps beside the state."""
        return {"payload_bytes": self.payload_bytes, "link_bytes": self.link_bytes, "seconds": self.seconds}


class Session:
    """One training of one start of the program.

    Args:
      config: settled.
      folder: of the run.
      program: to run.
      dataset: to learn.
      header: of run.json.
      saved: the run's checkpoints.
      console: to draw on.
    """

    def __init__(
        self,
        config: Config,
        folder: Path,
        program: Program,
        dataset: data.Dataset,
        header: dict[str, Any],
        saved: Checkpoints,
        console: Console,
    ) -> None:
        self._config, self._folder, self._program, self._dataset = config, folder, program, dataset
        self._header, self._saved, self._console = header, saved, console
        self._family = methods.settings_of(program.label, config.exchange).get("family")
        self.scored: evaluate.Scored | None = None  # at the last step, where `run` has done it
        # Signal heard here during `run`, SIGPIPE where nobody reads on; one in the last steps does not end it
        self.heard = 0

    def run(self, standing: Standing) -> Standing:
        """Train to the last step, writing, showing and saving on the way.

        Args:
          standing: where to begin.

        Returns:
          Where the training stands at its end.

        Raises:
          NonFiniteError: the loss is not finite any more.
          Interrupted: after a checkpoint was written.
          UsageError: a checkpoint cannot be written.
        """
        output, steps, first = self._config.output, self._config.training.steps, standing.done
        title = self._program.label.text
        signal = 0
        with contextlib.ExitStack() as stack:
            record: Record | None = None
            if hosts.leads():
                record = stack.enter_context(
                    Record(self._folder, first, self._header, self._family, tensorboard=output.tensorboard)
                )
            show = stack.enter_context(Screen(self._console, title, first, steps, standing.seconds))
            interrupts = stack.enter_context(Interrupts(show.says))
            trace = stack.enter_context(Trace(self._folder / "profile" if output.profile and hosts.leads() else None))
            source = stack.enter_context(contextlib.closing(batches(self._config, self._dataset.train, first)))
            while standing.done < steps and not signal:
                trace.step(standing.done - first)
                self.heard = interrupts.number or show.unread * SIGPIPE
                standing, line, stats, signal = self._advance(standing, source, self.heard)
                evaluated = standing.done % output.eval_every == 0 or standing.done == steps
                if evaluated:
                    standing, line = self._evaluate(standing, line)
                if record is not None:
                    record.step(line, stats, standing.state.opt_state, evaluated=evaluated)
                show.step(line)
                self._keep(standing, last=standing.done == steps or bool(signal))
        self.heard = interrupts.number or show.unread * SIGPIPE
        if signal and standing.done < steps:
            kept = "a checkpoint was written: go on with --resume" if output.checkpoint_every else "nothing was saved"
            say(self._console, f"ended after step {standing.done} of {steps}; {kept}")
            raise Interrupted(signal)
        return standing

    def _keep(self, standing: Standing, *, last: bool) -> None:
        """Compare replicas, and write a checkpoint, where it is time."""
        each, every = self._config.hosts.check_every, self._config.output.checkpoint_every
        save = bool(every) and (last or standing.done % every == 0)
        if save or (each and standing.done % each == 0):
            agree.check_replicas(standing.done, standing.state, self._program.axes)
        if save:
            self._saved.save(standing.done, standing.state, standing.facts())

    def _advance(
        self, standing: Standing, source: Generator[dict[str, np.ndarray]], signal: int
    ) -> tuple[Standing, dict[str, Any], gp.Stats, int]:
        program = self._program
        began = time.perf_counter()
        batch = place(next(source), 0, program.mesh)
        signals = place(np.full(program.mesh.local_mesh.size, signal, np.float32), 0, program.mesh)
        fetched = time.perf_counter()
        if program.advance.compile(standing.state, batch, signals):
            # gloo waits 30 s for a process that meets the others for the first time, and compiling takes as it takes
            hosts.gather(None, "the first step")
        compiled = time.perf_counter()
        state, metrics = program.advance(standing.state, batch, signals)
        stats = jax.tree.map(np.asarray, one(gp.stats(state.opt_state)))
        loss = float(metrics.loss)
        now = standing.done + 1
        if not np.isfinite(loss):
            raise NonFiniteError(f"the loss of step {now} ({program.label.text}) is {loss}: {self._remedy()}")
        seconds = time.perf_counter() - compiled + fetched - began
        standing = Standing(
            now,
            state,
            standing.payload_bytes + float(stats.payload_bits) / 8,
            standing.link_bytes + float(stats.link_bits) / 8,
            standing.seconds + seconds,
        )
        line = {
            "step": now,
            "loss": loss,
            "accuracy": float(metrics.accuracy),
            "learning_rate": float(program.rates[standing.done - 1]),
            "payload_bytes": standing.payload_bytes,
            "link_bytes": standing.link_bytes,
            "payload_ratio": float(stats.payload_ratio),
            "link_ratio": float(stats.link_ratio),
            "sent": float(stats.sent),
            "capacity": int(stats.capacity),
            "overflow": float(stats.overflow),
            "nonfinite": int(stats.nonfinite) + int(metrics.skipped),
            "entropy": float(stats.entropy),
            "forecast_error": float(stats.forecast_error),
            "memory_norm": float(metrics.memory_norm),
            "seconds": standing.seconds,
        }
        return standing, line, stats, int(metrics.signal)

    def _remedy(self) -> str:
        """Say what to do about a loss that is not finite; a run does not go on with other settings."""
        remedy = "lower --learning-rate or --clip, and start again under another --name, or with --overwrite"
        kept = self._folder / FOLDER
        return f"{remedy}; checkpoints before it are in {kept}" if steps_on_disk(kept) else remedy

    def _evaluate(self, standing: Standing, line: dict[str, Any]) -> tuple[Standing, dict[str, Any]]:
        """Score, and count what averaging the batch statistics for it costs."""
        model, scores = evaluate.scored(self._program.evaluator, standing.state, self._dataset)
        if standing.done == self._config.training.steps:
            self.scored = model, scores
        payload, link = evaluate.cost(standing.state, self._config.devices)
        standing = standing._replace(
            payload_bytes=standing.payload_bytes + payload, link_bytes=standing.link_bytes + link
        )
        for key, total, extra in (("payload", standing.payload_bytes, payload), ("link", standing.link_bytes, link)):
            dense = self._header[f"dense_{key}_bytes"]
            if dense and extra:
                line[f"{key}_ratio"] = dense / (dense / line[f"{key}_ratio"] + extra)
            line[f"{key}_bytes"] = total
        return standing, line | {"test_loss": scores[0], "test_accuracy": scores[1]}


class Trace:
    """A JAX trace of a few steps, for the length of a with-block.

    Args:
      folder: to write to; None for none.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._on = False

    def step(self, since: int) -> None:
        """Start or stop, before the step that comes so many after the start."""
        if self._folder is not None and since == TRACED[0]:
            jax.profiler.start_trace(str(self._folder))
            self._on = True
        elif since == TRACED[1]:
            self._stop()

    def __enter__(self) -> Trace:
        """Begin."""
        return self

    def __exit__(self, *error: object) -> None:
        """Stop where the run was shorter."""
        self._stop()

    def _stop(self) -> None:
        if self._on:
            jax.profiler.stop_trace()
            self._on = False


def batches(config: Config, split: data.Split, start: int) -> Generator[dict[str, np.ndarray]]:
    """Go through this process's share of the training data from a step on, with leading axes of devices and parts.

    Args:
      config: settled.
      split: to read from.
      start: step to begin with.

    Yields:
      Batches, without end.
    """
    training, augment = config.training, config.task.augment
    source = data.batches(
        split,
        training.batch,
        training.seed,
        start,
        process=hosts.index(),
        processes=hosts.count(),
        augment=None if augment == "none" else augment,
    )
    here = config.devices // hosts.count()
    with contextlib.closing(source):
        for batch in source:
            yield {k: v.reshape(here, training.accumulate, -1, *v.shape[1:]) for k, v in batch.items()}
