"""What all processes must have alike: programs, settings, data at the start; replicas while they train."""

from __future__ import annotations

import dataclasses
import platform
import socket
import zlib
from collections import Counter
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import flax
import jax
import numpy as np
import optax

import gradpart_jax as gp
from train import hosts
from train.config import Config, flat, groups
from train.data import Dataset, Split
from train.errors import DivergedError, UsageError

OWN = {"workdir", "data_dir"}  # settings that a host may have to itself
LOOKED_AT = 256  # examples of a split that stand for all of it


def check(config: Config) -> None:
    """Compare programs and settings.

    Args:
      config: settled.

    Raises:
      UsageError: names all that differs, on every process.
    """
    packages = [Path(gp.__file__).parent, Path(__file__).parent]
    code = 0
    for package in packages:
        for path in sorted(package.rglob("*.py")):
            code = zlib.crc32(path.read_bytes(), code)
    found: dict[str, Any] = {
        f"--{key.replace('_', '-')}": str(value) for key, value in flat(config).items() if key not in OWN
    }
    for field in dataclasses.fields(config):
        if field.name not in groups():
            found[f"--{field.name}"] = str(getattr(config, field.name))
    start = config.start
    found |= {"--resume": start.resume, "--overwrite": start.overwrite, "--check-every": config.hosts.check_every}
    found |= {
        "gradpart_jax": f"{gp.__version__}, code {code:08x}",
        "jax": f"{jax.__version__}, jaxlib {metadata.version('jaxlib')}",
        "flax": flax.__version__,
        "optax": optax.__version__,
        "kind of device": jax.devices()[0].device_kind,
        "kind of processor": platform.machine(),
        "devices a process": jax.local_device_count(),
    }
    _compare(found, "the comparison of settings")


def check_data(dataset: Dataset, name: str) -> None:
    """Compare what there is to learn, by a hash of some of it.

    Args:
      dataset: to learn.
      name: of --data.

    Raises:
      UsageError: it differs; said on every process.
    """
    if hosts.count() > 1:
        splits = {"training": dataset.train, "test": dataset.test}
        _compare({f"{key} split of --data {name}": _print(split) for key, split in splits.items()}, "that of the data")


def check_replicas(step: int, state: Any, axes: Any) -> None:
    """Compare what all devices must hold alike.

    Args:
      step: steps done.
      state: placed.
      axes: which of its leaves have a device axis, 0 or None.

    Raises:
      DivergedError: names the step and the devices.
    """
    sums: dict[int, int] = {}
    for axis, x in zip(jax.tree.leaves(axes, is_leaf=lambda a: a is None), jax.tree.leaves(state), strict=True):
        if axis is None:
            for shard in x.addressable_shards:
                own = np.ascontiguousarray(shard.data)
                sums[shard.device.id] = zlib.crc32(own.data if own.size else b"", sums.get(shard.device.id, 0))
    mine = [sums[device] for device in sorted(sums)]
    found = hosts.gather([socket.gethostname(), *mine], f"the comparison of replicas after step {step}")
    usual = Counter(x for _, *own in found for x in own).most_common(1)[0][0]
    odd = [
        f"device {number} of process {process} ({name})"
        for process, (name, *own) in enumerate(found)
        for number, x in enumerate(own)
        if x != usual
    ]
    if odd:
        raise DivergedError(
            f"the replicas differ after step {step}: {', '.join(odd)} from most others. Processors of unlike kinds "
            "round unlike; where they are alike, suspect memory. Go on with --resume from the checkpoint before"
        )


def _print(split: Split) -> str:
    numbers = np.unique(np.linspace(0, split.size - 1, LOOKED_AT).astype(int))
    code = 0
    for _, values in sorted(split.read(numbers).items()):
        code = zlib.crc32(np.ascontiguousarray(values).data, code)
    return f"{split.size} examples, {code:08x}"


def _compare(own: dict[str, Any], what: str) -> None:
    everyone: Sequence[dict[str, Any]] = hosts.gather(own | {"host": socket.gethostname()}, what)
    names = [f"process {process} ({one.pop('host')})" for process, one in enumerate(everyone)]
    told = []
    for key in dict.fromkeys(key for one in everyone for key in one):
        values = [one.get(key) for one in everyone]
        if any(value != values[0] for value in values):
            other = next(i for i, value in enumerate(values) if value != values[0])
            told.append(f"{key} is {values[0]} on {names[0]}, {values[other]} on {names[other]}")
    if told:
        raise UsageError(f"the hosts differ, and none trains: {'; '.join(told)}: make them alike")
