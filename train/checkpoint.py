"""Checkpoints with orbax: all that a run needs to go on as if it had never stopped."""

from __future__ import annotations

import json
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp

from train.errors import UsageError

KEPT = 2
FACTS = "facts"
SPARE = 2**20  # bytes that a checkpoint may need beside its arrays


class Found(NamedTuple):
    """A checkpoint that was read."""

    step: int  # steps done, which is also the data's position
    state: Any  # numpy arrays, with as many devices as it was saved with
    facts: dict[str, Any]  # as given to `save`


class Checkpoints:
    """The checkpoints of one run, newest and the one before.

    A checkpoint appears whole or not at all, for orbax renames it into place; what a kill leaves half written is
    removed at the next start.

    Args:
      folder: where they lie.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder.absolute()
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._open()
        except OSError as error:
            raise UsageError(f"checkpoints cannot be kept in {folder} ({error}): choose another --workdir") from error

    def save(self, step: int, state: Any, facts: dict[str, Any]) -> None:
        """Write a state.

        Args:
          step: steps done.
          state: a pytree of arrays, those that differ per device with a leading device axis.
          facts: what else is to be known, of JSON's types.

        Raises:
          UsageError: the disk is full or cannot be written to; earlier checkpoints stay.
        """
        if step in self._manager.all_steps():
            return
        leaves, names = _leaves(state)
        sums = [zlib.crc32(np.ascontiguousarray(x).data) if x.size else 0 for x in leaves]
        text = json.dumps({"names": names, "sums": sums, "facts": facts}).encode()
        # orbax takes no empty arrays
        arrays = {str(i): x for i, x in enumerate(leaves) if x.size} | {FACTS: np.frombuffer(text, np.uint8)}
        needed = sum(x.nbytes for x in arrays.values()) + SPARE
        try:
            free = shutil.disk_usage(self._folder).free
            if free < needed:
                raise OSError(f"{needed / 1e6:.1f} MB are needed, {free / 1e6:.1f} MB are free")
            self._manager.save(step, args=ocp.args.StandardSave(arrays), force=True)
        except Exception as error:  # whatever the storage raises
            last = max(self._steps_on_disk(), default=None)
            self._clear()
            stays = "there is none before it" if last is None else f"that of step {last} is intact"
            raise UsageError(
                f"the checkpoint of step {step} could not be written to {self._folder}; {stays}: free some space and "
                f"go on with --resume ({_first_line(error)})"
            ) from error

    def restore(self, like: Any, axes: Any, notice: Callable[[str], None]) -> Found | None:
        """Read the newest sound checkpoint, and remove damaged ones that are newer.

        Args:
          like: a state of the same structure and shapes, but for the number of devices.
          axes: which of its leaves have a device axis: 0 or None.
          notice: is told of each damaged checkpoint passed over.

        Returns:
          What was found; None where there is no checkpoint.

        Raises:
          UsageError: there are checkpoints, but none that can be read, or one that was made with other options.
        """
        steps = sorted(self._manager.all_steps(), reverse=True)
        for place, step in enumerate(steps):
            try:
                arrays = self._manager.restore(step, args=ocp.args.StandardRestore())
                header = json.loads(arrays[FACTS].tobytes())
                state = _assemble(arrays, header, like, axes)
            except UsageError:
                raise
            except Exception as error:  # whatever a damaged file raises
                notice(f"the checkpoint of step {step} is damaged and passed over ({_first_line(error)})")
                continue
            for damaged in steps[:place]:
                shutil.rmtree(self._folder / str(damaged), ignore_errors=True)
            if place:
                self._manager.close()
                self._open()
            return Found(step, state, header["facts"])
        if steps:
            raise UsageError(
                f"--resume: no checkpoint in {self._folder} can be read: start again with --overwrite, "
                "or choose another --name"
            )
        return None

    def close(self) -> None:
        """Finish."""
        self._manager.close()

    def _open(self) -> None:
        options = ocp.CheckpointManagerOptions(
            max_to_keep=KEPT, enable_async_checkpointing=False, cleanup_tmp_directories=True
        )
        self._manager = ocp.CheckpointManager(self._folder, options=options)

    def _steps_on_disk(self) -> list[int]:
        return [int(path.name) for path in self._folder.iterdir() if path.name.isdecimal()]

    def _clear(self) -> None:
        for path in self._folder.iterdir():
            if not path.name.isdecimal():
                shutil.rmtree(path, ignore_errors=True)


def _leaves(state: Any) -> tuple[list[np.ndarray], list[str]]:
    pairs = jax.tree.leaves_with_path(state)
    return [np.asarray(x) for _, x in pairs], [jax.tree_util.keystr(path) for path, _ in pairs]


def _assemble(arrays: dict[str, Any], header: dict[str, Any], like: Any, axes: Any) -> Any:
    wanted, names = _leaves(like)
    marks = jax.tree.leaves(axes, is_leaf=lambda x: x is None)
    other = set(names) ^ set(header["names"])
    if other:
        raise UsageError(
            f"--resume: the run was made with other options: {min(other)} is in one of the two states only"
        )
    found = []
    for i, (x, name, axis, kept) in enumerate(zip(wanted, names, marks, header["sums"], strict=True)):
        if not x.size:
            found.append(x)
            continue
        array = np.asarray(arrays[str(i)])
        if zlib.crc32(np.ascontiguousarray(array).data) != kept:
            raise ValueError(f"{name} has another checksum than when it was written")
        own, theirs = ((y.shape if axis is None else y.shape[1:]) for y in (x, array))
        if own != theirs or x.dtype != array.dtype:
            raise UsageError(
                f"--resume: the run was made with other options: {name} is {array.dtype}{list(theirs)} there, "
                f"{x.dtype}{list(own)} here"
            )
        found.append(array)
    return jax.tree.unflatten(jax.tree.structure(like), found)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:160]
