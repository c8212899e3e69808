"""The checkpoints of a run with orbax: all that it needs to go on as if it had never stopped."""

from __future__ import annotations

import functools
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp

from gradpart_jax.placement import each_leaf
from train import hosts
from train.errors import UsageError
from train.parts import Part, assemble, devices_of, load, pack

KEPT = 2
FOLDER = "checkpoints"
SPARE = 2**20  # bytes that a checkpoint may need beside its arrays


class Found(NamedTuple):
    """A checkpoint that was read."""

    step: int  # steps done, which is also the data's position
    state: Any  # numpy arrays, with as many devices as it was saved with, or with those of this process
    facts: dict[str, Any]  # as given to `save`
    whole: bool  # whether the state has all devices' rows


class Checkpoints:
    """The checkpoints of one run, newest and the one before; each process writes its own part, where it is.

    Parts lie in `checkpoints` (of process 0), `checkpoints-1` and so on: on a disk that hosts share, side by side, else
    each on its own host's disk, so that memories never travel. A part appears whole or not at all, for orbax renames it
    into place; what a kill leaves half written is removed at the next start. Process 0 writes last: where its part is,
    the others are.

    Args:
      folder: of the run.
      replace: whether parts that lie there while process 0 has none may go.
    """

    def __init__(self, folder: Path, *, replace: bool = False) -> None:
        self._run = folder.absolute()
        self._folder = self._of(hosts.index())
        self._replace = replace
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._open()
        except OSError as error:
            raise UsageError(f"checkpoints cannot be kept in {folder} ({error}): choose another --workdir") from error

    def save(self, step: int, state: Any, facts: dict[str, Any]) -> None:
        """Write a state.

        Args:
          step: steps done.
          state: a pytree of placed arrays, those that differ per device with a leading device axis.
          facts: what else is to be known, of JSON's types.

        Raises:
          UsageError: a disk is full or cannot be written to; earlier checkpoints stay.
        """
        what = f"the checkpoint of step {step}"
        hosts.together(lambda: None if hosts.leads() else self._write(step, state, facts), what)
        hosts.lead(lambda: self._write(step, state, facts), what)
        if hosts.leads():
            for path in self._run.glob(f"{FOLDER}-*"):
                number = path.name.rpartition("-")[2]
                if number.isdecimal() and int(number) >= hosts.count():  # of a start with more processes
                    shutil.rmtree(path, ignore_errors=True)

    def _write(self, step: int, state: Any, facts: dict[str, Any]) -> None:
        if step in self._manager.all_steps():
            return
        part = pack(state, facts)
        needed = sum(x.nbytes for x in part.arrays.values()) + SPARE
        try:
            free = shutil.disk_usage(self._folder).free
            if free < needed:
                raise OSError(f"{needed / 1e6:.1f} MB are needed, {free / 1e6:.1f} MB are free")
            self._manager.save(step, args=part, force=True)
        except Exception as error:  # whatever the storage raises
            last = max(steps_on_disk(self._folder), default=None)
            self._clear()
            stays = "there is none before it" if last is None else f"that of step {last} is intact"
            raise UsageError(
                f"the checkpoint of step {step} could not be written to {self._folder}; {stays}: free some space and "
                f"go on with --resume ({_first_line(error)})"
            ) from error

    def restore(self, like: Any, axes: Any, notice: Callable[[str], None]) -> Found | None:
        """Read the newest checkpoint that every process can read, and remove newer ones.

        Args:
          like: a state of the same structure and shapes, with the device axis of all devices that go on.
          axes: which of its leaves have a device axis: 0 or None.
          notice: is told of each damaged checkpoint passed over.

        Returns:
          What was found; None where there is no checkpoint.

        Raises:
          UsageError: there are checkpoints, but none that can be read, or one that was made with other options.
        """
        steps: list[int] = hosts.lead(
            lambda: sorted(self._manager.all_steps(), reverse=True), "the choice of a checkpoint"
        )
        found: list[Found] = []
        problem = ""

        def read(step: int) -> str:
            try:
                found.append(self._read(step, like, axes))
            except UsageError:
                raise
            except Exception as error:  # whatever a damaged file raises
                return _first_line(error)
            return ""

        for step in steps:
            found.clear()
            problems = hosts.together(functools.partial(read, step), f"the reading of the checkpoint of step {step}")
            if not any(problems):
                self._forget(step)
                return found[0]
            problem = next(filter(None, problems))
            notice(f"the checkpoint of step {step} is damaged and passed over ({problem})")
        if steps:
            raise UsageError(
                f"--resume: no checkpoint in {self._run} can be read ({problem}): start again with --overwrite, "
                "or choose another --name"
            )
        hosts.together(self._start_over, "the start without a checkpoint")
        return None

    def _read(self, step: int, like: Any, axes: Any) -> Found:
        own = hosts.index(), hosts.count()
        part = self._load(own[0], step) if (self._folder / str(step)).exists() else None
        if part is None or part.place != own:
            part = self._load(0, step)
        state = assemble(part, like, axes)
        total, here = (devices_of(tree, axes) for tree in (like, state))
        if part.place == own and (total is None or here is None or here * own[1] == total):
            # What is empty was not written, and has as many rows as all devices
            state = each_leaf(lambda x, axis: x if axis is None or x.size else x[: len(x) // own[1]], state, axes)
            return Found(step, state, part.facts, whole=own[1] == 1)
        parts = [assemble(self._load(number, step), like, axes) for number in range(part.place[1])]
        state = jax.tree.map(
            lambda axis, *xs: xs[0] if axis is None or not xs[0].size else np.concatenate(xs),
            axes, *parts, is_leaf=lambda x: x is None,
        )  # fmt: skip
        return Found(step, state, part.facts, whole=True)

    def _load(self, number: int, step: int) -> Part:
        folder = self._of(number)
        if not (folder / str(step)).exists():
            raise FileNotFoundError(
                f"part {number} of it is not on host {socket.gethostname()}: where hosts share no disk, go on with as "
                f"many processes in the same order, or copy {folder.name} from the host that has it"
            )
        return load(folder / str(step))

    def _forget(self, step: int) -> None:
        """Remove this process's parts that are newer."""
        newer = [one for one in self._manager.all_steps() if one > step]
        for one in newer:
            shutil.rmtree(self._folder / str(one), ignore_errors=True)
        if newer:
            self._manager.close()
            self._open()

    def _start_over(self) -> None:
        if self._manager.all_steps() and not self._replace:
            raise UsageError(
                f"{self._folder} holds parts of another run, of which process 0 has none: replace them with "
                "--overwrite, or choose another --name"
            )
        self._forget(-1)

    def close(self) -> None:
        """Finish."""
        self._manager.close()

    def _of(self, process: int) -> Path:
        return self._run / (f"{FOLDER}-{process}" if process else FOLDER)

    def _open(self) -> None:
        # Each process looks after its own part, and orbax is not to wait for the others
        number = hosts.index()
        alone = ocp.options.MultiprocessingOptions(
            primary_host=number, active_processes={number}, barrier_sync_key_prefix=f"part-{number}"
        )
        options = ocp.CheckpointManagerOptions(
            max_to_keep=KEPT,
            enable_async_checkpointing=False,
            cleanup_tmp_directories=True,
            create=False,
            multiprocessing_options=alone,
        )
        self._manager = ocp.CheckpointManager(self._folder, options=options)

    def _clear(self) -> None:
        for path in self._folder.iterdir():
            if not path.name.isdecimal():
                shutil.rmtree(path, ignore_errors=True)


def steps_on_disk(folder: Path) -> list[int]:
    """List the steps of the checkpoints in a folder, if there is one.

    Args:
      folder: of one process's parts.

    Returns:
      Steps, in no order.
    """
    return [int(path.name) for path in folder.glob("*") if path.name.isdecimal()]


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:160]
