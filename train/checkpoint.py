"""Checkpoints with orbax: parameters, optimizer, predictor, and the memory of every device."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from train.errors import UsageError

KEPT = 2


class Checkpoints:
    """The checkpoints of one run, newest and the one before.

    Args:
      folder: where they lie.
    """

    def __init__(self, folder: Path) -> None:
        options = ocp.CheckpointManagerOptions(max_to_keep=KEPT, enable_async_checkpointing=False)
        self._manager = ocp.CheckpointManager(folder.absolute(), options=options)

    def save(self, step: int, state: Any) -> None:
        """Write a state.

        Args:
          step: steps done.
          state: a pytree of arrays, those that differ per device with a leading device axis.

        Raises:
          UsageError: the disk is full or cannot be written to; earlier checkpoints stay.
        """
        if step in self._manager.all_steps():
            return
        # orbax takes no empty arrays
        leaves = {str(i): np.asarray(x) for i, x in enumerate(jax.tree.leaves(state)) if x.size}
        try:
            self._manager.save(step, args=ocp.args.StandardSave(leaves), force=True)
        except OSError as error:
            raise UsageError(
                f"the checkpoint of step {step} could not be written ({error}): free some space"
            ) from error

    def restore(self, like: Any, notice: Callable[[str], None]) -> tuple[int, Any] | None:
        """Read the newest sound state.

        Args:
          like: a state of the same structure and shapes.
          notice: is told of each damaged checkpoint passed over.

        Returns:
          Steps done and the state as numpy arrays; None where there is no checkpoint.

        Raises:
          UsageError: there are checkpoints, but none that can be read and fits.
        """
        leaves, structure = jax.tree.flatten(like)
        wanted = {str(i): jax.ShapeDtypeStruct(np.shape(x), x.dtype) for i, x in enumerate(leaves) if x.size}
        steps = sorted(self._manager.all_steps(), reverse=True)
        for step in steps:
            try:
                found = self._manager.restore(step, args=ocp.args.StandardRestore(wanted))
                restored = [np.asarray(found[str(i)] if x.size else x) for i, x in enumerate(leaves)]
                if any(np.shape(a) != np.shape(b) for a, b in zip(restored, leaves, strict=True)):
                    raise ValueError("its arrays have other shapes: was it made with other options?")
            except Exception as error:  # whatever a damaged file raises
                notice(f"checkpoint of step {step} cannot be used: {str(error).splitlines()[0][:160]}")
                continue
            return step, jax.tree.unflatten(structure, restored)
        if steps:
            raise UsageError("--resume: no checkpoint of this run can be used: start again with --overwrite")
        return None

    def close(self) -> None:
        """Finish writing."""
        self._manager.close()
