"""Arrays over the devices of all processes: one code path for one process and for many."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from gradpart_jax.placement import each_leaf
from train import hosts

AXIS = "devices"


def mesh_of(devices: int) -> Mesh:
    """Put so many devices, as many of each process, on a mesh whose axis is the exchange's.

    Args:
      devices: their number, a multiple of that of processes.

    Returns:
      The mesh; the devices of a process stand side by side, in the order of processes.
    """
    each = devices // hosts.count()
    chosen = [d for p in range(hosts.count()) for d in jax.local_devices(p)[:each]]
    return jax.make_mesh((devices,), (AXIS,), axis_types=(AxisType.Auto,), devices=chosen)


def place(tree: Any, axes: Any, mesh: Mesh) -> Any:
    """Place arrays on the mesh as the step wants them, so that it is traced once.

    Args:
      tree: arrays; of those with a device axis, the rows of this process's devices.
      axes: 0 for a device axis, None for a replica; a prefix of the tree.
      mesh: of `mesh_of`.

    Returns:
      The arrays, placed, with as many rows as there are devices in all processes.
    """

    def put(x: Any, axis: int | None) -> jax.Array:
        # A copy of its own: equal leaves of a fresh state may share a buffer, which cannot be donated twice.
        spec = PartitionSpec() if axis is None else PartitionSpec(AXIS)
        return jax.make_array_from_process_local_data(NamedSharding(mesh, spec), np.array(x))

    return each_leaf(put, tree, axes)


def spread_out(tree: Any, axes: Any, devices: int) -> Any:
    """Give one device's fresh arrays a device axis, those that are to have one.

    Args:
      tree: of one device.
      axes: 0 for a device axis, None for a replica; a prefix of the tree.
      devices: their number.

    Returns:
      The arrays.
    """
    return each_leaf(lambda x, axis: x if axis is None else jnp.broadcast_to(x, (devices, *x.shape)), tree, axes)


def own(tree: Any, axes: Any, mesh: Mesh) -> Any:
    """Take the rows of this process's devices.

    Args:
      tree: arrays, with rows of all devices.
      axes: 0 for a device axis, None for a replica; a prefix of the tree.
      mesh: of `mesh_of`.

    Returns:
      The arrays, with rows of this process's devices.
    """
    here = mesh.size // hosts.count()
    mine = slice(here * hosts.index(), here * (hosts.index() + 1))
    return each_leaf(lambda x, axis: x if axis is None else x[mine], tree, axes)


def one(tree: Any) -> Any:
    """Take the first device's part of placed arrays, without gathering from the others."""
    return jax.tree.map(lambda x: x.addressable_shards[0].data if isinstance(x, jax.Array) else x, tree)


def rows(tree: Any) -> Any:
    """Take this process's devices' part of placed arrays, as numpy arrays; of replicas, all."""

    def take(x: jax.Array) -> np.ndarray:
        if x.is_fully_replicated:
            return np.asarray(x.addressable_shards[0].data)
        shards = sorted(x.addressable_shards, key=lambda shard: shard.index[0].start or 0)
        return np.concatenate([shard.data for shard in shards])

    return jax.tree.map(take, tree)
