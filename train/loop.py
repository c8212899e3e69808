"""Training as a function of a configuration: what the programs, the tests and notebooks call."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from gradpart_jax.segments import layout_of
from train import agree, data, evaluate, folders, hosts, methods, options, phases, screen, step
from train.checkpoint import FOLDER, Checkpoints, steps_on_disk
from train.config import Config, flat
from train.errors import Interrupted, NonFiniteError, UsageError
from train.interrupts import check_missed
from train.labels import parse_label
from train.log import plain, read
from train.owners import release
from train.parts import devices_of
from train.placing import own, place, spread_out
from train.program import Program, prepare
from train.redistribute import redistribute
from train.screen import say
from train.session import Session, Standing, batches
from train.summary import DIVERGED, summarise


class Run(NamedTuple):
    """One training, and where it goes."""

    config: Config  # settled and checked
    folder: Path
    command: str
    budget: float | None = None  # link ratio asked for


def run(config: Config, console: Console, command: str = "loop.run") -> list[dict[str, Any]]:
    """Train by the method of the configuration, then uncompressed, each into a run folder of its own.

    Args:
      config: settled and checked.
      console: to draw on.
      command: that started this.

    Returns:
      One summary a method, as in summary.json.

    Raises:
      UsageError: the data set, the devices or the folder cannot be had.
      NonFiniteError: the loss is not finite any more.
      KeyboardInterrupt: somebody asked for the end.
    """
    labels = [parse_label(config.exchange.method)]
    if config.exchange.dense_reference and labels[0].kind != "dense":
        labels.append(parse_label("dense"))
    methods.check_served(labels[0], config.exchange)
    dataset = load(config)
    programs = [prepare(config, dataset, label, config.exchange.ratio) for label in labels]
    kept = [config.folder / program.label.folder for program in programs]
    hosts.lead(lambda: check_resumable(config, *kept), "the look for checkpoints")
    check_missed()
    with folders.made(config):  # not before: what `prepare` refuses leaves none
        with contextlib.suppress(OSError):
            # Where hosts share no disk an older one may have been left: the launcher is to see that it is this run's
            os.utime(config.folder / "config.json")
        summaries: list[dict[str, Any]] = []
        for program, folder in zip(programs, kept, strict=True):
            summaries.append(train(Run(config, folder, command), program, dataset, console))
            if summaries[-1]["status"] == DIVERGED:
                raise NonFiniteError(summaries[-1]["why"])
        console.print(screen.summary_table(summaries))
        if hosts.leads():
            # Imported here: reading bokeh must not slow every process's start down
            from train import report

            page = report.write(kept, config.folder / "report.html")
            say(console, f"report: {page}")
        return summaries


def load(config: Config) -> data.Dataset:
    """Load the data set that a configuration names; every process has its own copy, and all are compared.

    Args:
      config: settled.

    Returns:
      Dataset.

    Raises:
      UsageError: it cannot be had, or the processes' copies differ.
    """
    task, found = config.task, []
    window = {} if task.window is None else {"window": task.window}

    def read() -> None:
        found.append(data.load(task.data, task.data_dir, image_size=task.image_size, **window))

    hosts.together(read, "the loading of data")
    agree.check_data(found[0], task.data)
    return found[0]


def train(
    run: Run, program: Program, dataset: data.Dataset, console: Console, *, header: bool = True
) -> dict[str, Any]:
    """Train, from the start or from the newest sound checkpoint, and fill the run folder.

    Args:
      run: what, and where to.
      program: of `prepare`, for this configuration.
      dataset: to learn.
      console: to draw on.
      header: whether to say what is trained.

    Returns:
      The summary, as in summary.json; of a training that diverges, too, with why.

    Raises:
      UsageError: the folder holds another run, or a checkpoint cannot be written.
      KeyboardInterrupt: somebody asked for the end.
    """
    config, folder, label = run.config, run.folder, program.label
    tuned = methods.tuned(config, label)

    def notice(text: str) -> None:
        say(console, text, "yellow")

    def conclude(scores: tuple[float, float] | None, why: str | None = None) -> dict[str, Any]:
        exchanges = methods.settings_of(label, tuned.exchange).get("warmup_steps", 0)
        warmup = exchanges * tuned.exchange.local_steps
        result = summarise(about, read(folder / "metrics.jsonl"), scores, warmup, why)
        options.write_json(plain(result), folder / "summary.json")
        return result

    def enter() -> dict[str, Any] | None:
        check_resumable(config, folder)
        return folders.enter(config, folder, notice)

    summary = hosts.lead(enter, "the opening of the run folder")
    if summary is not None:
        say(console, f"{folder} has finished: left as it is")
        return summary
    fresh = step.start(program.network, program.tx, config.training.seed)
    about = folders.describe(config, label, program.ratio, run.budget, fresh.params, run.command)
    if header:
        screen.header(console, about, flat(tuned))
    saved = Checkpoints(folder, replace=config.start.overwrite or config.start.resume)
    with contextlib.closing(saved):
        standing = _stand(program, saved, fresh, notice)
        if hosts.leads():
            if config.start.resume and not standing.done and read(folder / "metrics.jsonl"):
                notice(f"{folder} has no checkpoint yet: begun anew")
            about = folders.keep_header(about, folder, standing.done)
        session = Session(config, folder, program, dataset, about, saved, console)
        try:
            standing = session.run(standing)
        except NonFiniteError as error:
            return hosts.lead(functools.partial(conclude, None, str(error)), "the end of training")
    # None where this start had no step left to do
    model, scores = session.scored or evaluate.scored(program.evaluator, standing.state, dataset)

    def keep() -> dict[str, Any]:
        model.save(folder / "model.msgpack")
        return conclude(scores)

    result = hosts.lead(keep, "the end of training")
    # Heard too late for a step to tell the others, or in the last step, which ends the training anyway
    signal = max(hosts.gather(session.heard, "the end of training"))
    if signal:
        say(console, f"{folder} has finished; what comes after it is left: go on with --resume")
        raise Interrupted(signal)
    # Last, so that whoever does not wait for it loses nothing else
    if config.output.phases and not hosts.lead((folder / "phases.json").exists, "the end of training"):
        say(console, "measuring where a step's time goes ...")
        with contextlib.closing(batches(config, dataset.train, standing.done)) as source:
            times = phases.measure(config, program, standing.state, next(source))
        if hosts.leads():
            options.write_json(plain(times), folder / "phases.json")
    return result


def check_resumable(config: Config, *kept: Path) -> None:
    """Refuse to go on to fewer steps than there are, and with a finished run that would begin anew and be lost.

    Args:
      config: settled.
      *kept: run folders.

    Raises:
      UsageError: names the run folder and the remedy.
    """
    steps = config.training.steps
    for folder in kept if config.start.resume else ():
        summary, saved = folders.finished(folder), steps_on_disk(folder / FOLDER)
        done = max(saved, default=0) if summary is None else summary["steps"]
        if done > steps:
            raise UsageError(
                f"--resume --steps {steps}: {folder} has made {done} steps: give that many, or choose another --name"
            )
        if summary is not None and done < steps and not saved:
            raise UsageError(
                f"--resume: {folder} has {done} steps on record and no checkpoint: "
                "start again with --overwrite, or choose another --name"
            )


def _stand(program: Program, saved: Checkpoints, fresh: step.State, notice: Callable[[str], None]) -> Standing:
    mesh, axes = program.mesh, program.axes
    start = spread_out(fresh, axes, mesh.size)
    found = saved.restore(start, axes, notice)
    if found is None:
        return Standing(0, place(own(start, axes, mesh), axes, mesh), 0.0, 0.0, 0.0)
    notice(f"resumed at step {found.step}")
    state = found.state
    rows = devices_of(state, axes) or mesh.size
    first, before = (0, rows) if found.whole else (rows * hosts.index(), mesh.size)
    state = state._replace(opt_state=release(state.opt_state, start.opt_state, layout_of(fresh.params), first, before))
    if found.whole:
        state, dealt = redistribute(state, axes, mesh.size)
        state = own(state, axes, mesh)
        if dealt:
            notice(dealt)
    return Standing(found.step, place(state, axes, mesh), **found.facts)
