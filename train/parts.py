"""One process's part of a checkpoint: what is replicated and the rows of its own devices, each with a checksum."""

from __future__ import annotations

import dataclasses
import json
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from train import hosts
from train.errors import UsageError
from train.placing import rows

OWNED = ".scheme.local"  # a leaf whose length may go by the number of devices: `owners` sees to it
FACTS = "facts"
ITEM, FILE = "default", "part.npz"


class PartHandler(ocp.CheckpointHandler):
    """How orbax writes a part: its own way with arrays wants a disk that all processes share."""

    def save(self, directory: epath.Path, args: PartArgs) -> None:
        """Write a part into a fresh folder."""
        with (directory / FILE).open("wb") as file:
            np.savez(file, allow_pickle=False, **args.arrays)

    def restore(self, directory: epath.Path | Path, args: ocp.args.CheckpointArgs | None = None) -> dict[str, Any]:
        """Read a part; damage raises, for the file holds a checksum of each array."""
        with (directory / FILE).open("rb") as file, np.load(file) as arrays:
            return dict(arrays)


@ocp.args.register_with_handler(PartHandler, for_save=True, for_restore=True)
@dataclasses.dataclass
class PartArgs(ocp.args.CheckpointArgs):
    """Arrays by name."""

    arrays: dict[str, Any] = dataclasses.field(default_factory=dict)


class Part(NamedTuple):
    """What one process wrote: all that is replicated, and the rows of its own devices."""

    arrays: dict[str, Any]
    header: dict[str, Any]

    @property
    def facts(self) -> dict[str, Any]:
        """What was to be known beside the state."""
        return self.header["facts"]

    @property
    def place(self) -> tuple[int, int]:
        """Number of the process, and how many there were."""
        number, of = self.header.get("part", (0, 1))
        return number, of


def pack(state: Any, facts: dict[str, Any]) -> PartArgs:
    """Take this process's part of a state.

    Args:
      state: a pytree of placed arrays, those that differ per device with a leading device axis.
      facts: what else is to be known, of JSON's types.

    Returns:
      What orbax is to save; what is empty is left out.
    """
    leaves, names = _leaves(rows(state))
    sums = [zlib.crc32(np.ascontiguousarray(x).data) if x.size else 0 for x in leaves]
    place = (hosts.index(), hosts.count())
    text = json.dumps({"names": names, "sums": sums, "facts": facts, "part": place}).encode()
    return PartArgs({str(i): x for i, x in enumerate(leaves) if x.size} | {FACTS: np.frombuffer(text, np.uint8)})


def load(folder: Path) -> Part:
    """Read a part.

    Args:
      folder: of a step.

    Returns:
      Part; damage raises, of whatever kind.
    """
    arrays = PartHandler().restore(folder / ITEM)
    return Part(arrays, json.loads(arrays[FACTS].tobytes()))


def devices_of(tree: Any, axes: Any) -> int | None:
    """Count the rows of leaves with a device axis.

    Args:
      tree: arrays.
      axes: which of its leaves have a device axis: 0 or None.

    Returns:
      Their number; None where there are no such leaves.
    """
    marks = jax.tree.leaves(axes, is_leaf=lambda x: x is None)
    sizes = [x.shape[0] for x, axis in zip(jax.tree.leaves(tree), marks, strict=True) if axis == 0 and x.size]
    return sizes[0] if sizes else None


def _leaves(state: Any) -> tuple[list[np.ndarray], list[str]]:
    pairs = jax.tree.leaves_with_path(state)
    return [np.asarray(x) for _, x in pairs], [jax.tree_util.keystr(path) for path, _ in pairs]


def assemble(part: Part, like: Any, axes: Any) -> Any:
    """Make a state of a part.

    Args:
      part: of `load`.
      like: a state of the same structure and shapes, with the device axis of all devices.
      axes: which of its leaves have a device axis: 0 or None.

    Returns:
      A state of numpy arrays, with the rows of the part.

    Raises:
      UsageError: the part is of a run with other options.
      ValueError: the part is damaged.
    """
    wanted, names = _leaves(like)
    marks = jax.tree.leaves(axes, is_leaf=lambda x: x is None)
    other = set(names) ^ set(part.header["names"])
    if other:
        raise UsageError(
            f"--resume: the run was made with other options: {min(other)} is in one of the two states only"
        )
    found = []
    for i, (x, name, axis, kept) in enumerate(zip(wanted, names, marks, part.header["sums"], strict=True)):
        owners = axis == 0 and name.endswith(OWNED)
        if (str(i) not in part.arrays) if owners else (not x.size):
            found.append(x)
            continue
        array = part.arrays[str(i)]
        if zlib.crc32(np.ascontiguousarray(array).data) != kept:
            raise ValueError(f"{name} has another checksum than when it was written")
        own, theirs = ((y.shape if axis is None else y.shape[1:]) for y in (x, array))
        if (own != theirs and not owners) or x.dtype != array.dtype:
            raise UsageError(
                f"--resume: the run was made with other options: {name} is {array.dtype}{list(theirs)} there, "
                f"{x.dtype}{list(own)} here"
            )
        found.append(array)
    return jax.tree.unflatten(jax.tree.structure(like), found)
