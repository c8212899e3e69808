"""Meshes of more than one axis: fast links beside the slow one, and parameters that are sharded.

Along an inner axis, such as the chips of a host, gradients are averaged before anything else, and whatever is
compressed is the same on all of them. Along a model axis each device holds other parameters, compresses its own shard,
and shares nothing but whether the step counts.
"""

from __future__ import annotations

import warnings
from typing import Any

import jax
import jax.numpy as jnp

from gradpart_jax import accounting
from gradpart_jax.accounting import WORD_BITS, Wire
from gradpart_jax.checks import check_axes
from gradpart_jax.exchange import AxisName, axis_size, least, mean, names


def check_apart(axis_name: AxisName, inner_axis: AxisName, model_axis: AxisName) -> None:
    """Check that all are axes, and that none serves twice.

    Args:
      axis_name: the slow axis.
      inner_axis: the fast one.
      model_axis: the one over which parameters are sharded.

    Raises:
      TypeError: one is no axis, nor a tuple of them.
      ValueError: one is an empty tuple, or two of them share a name.
    """
    check_axes(axis_name=axis_name, inner_axis=inner_axis, model_axis=model_axis)
    every = [*names(axis_name), *names(inner_axis), *names(model_axis)]
    twice = sorted({str(name) for name in every if every.count(name) > 1})
    if twice:
        raise ValueError(
            f"axis_name={axis_name!r}, inner_axis={inner_axis!r} and model_axis={model_axis!r} share "
            f"{', '.join(twice)}: give each axis of the mesh to one of them"
        )


def check_mapped(*axes: AxisName) -> None:
    """Check, while an update is traced, that all are mapped; warn where devices are, and no axis is given.

    Args:
      *axes: as in `check_apart`.

    Raises:
      NameError: one is not mapped.
    """
    given = [name for axis in axes for name in names(axis)]
    for name in given:
        axis_size(name)
    mesh = jax.sharding.get_abstract_mesh()
    mapped = [axis for axis in mesh.manual_axes if mesh.shape[axis] > 1]
    if mapped and not given:
        warnings.warn(
            f"axis_name=None, where {', '.join(map(repr, mapped))} is mapped: each device goes by itself, nothing is "
            f"exchanged, and parameters go apart; give axis_name={mapped[0]!r}",
            stacklevel=2,
        )


def average(gradients: Any, inner_axis: AxisName) -> tuple[Any, Wire]:
    """Average gradients over the inner axis, in float32 whatever their dtype.

    Args:
      gradients: a tree.
      inner_axis: the fast axis, or None.

    Returns:
      The tree, in float32 if there is an inner axis, the same on all of it; and what the all-reduce carried.
    """
    if inner_axis is None:
        return gradients, accounting.nothing()
    wide = jax.tree.map(lambda leaf: jnp.asarray(leaf).astype(jnp.float32), gradients)
    bits = WORD_BITS * sum(leaf.size for leaf in jax.tree.leaves(wide))
    return mean(wide, inner_axis), accounting.reduced(bits, axis_size(inner_axis))


def spoil(vector: jax.Array, model_axis: AxisName) -> tuple[jax.Array, Wire]:
    """Make every shard's vector non-finite where one shard's is, so that all skip the step, each as it would alone.

    Args:
      vector: float32[n], n at least 1.
      model_axis: over which parameters are sharded, or None.

    Returns:
      The vector, and what the agreement carried.
    """
    if model_axis is None:
        return vector, accounting.nothing()
    finite = least(jnp.all(jnp.isfinite(vector)).astype(jnp.int32), model_axis)
    first = jnp.where(finite == 1, vector[0], jnp.nan)
    return vector.at[0].set(first), accounting.reduced(WORD_BITS, axis_size(model_axis))


def share(numbers: list[jax.Array], model_axis: AxisName) -> tuple[jax.Array, Wire]:
    """Average numbers over the shards.

    Args:
      numbers: k of float32[].
      model_axis: over which parameters are sharded.

    Returns:
      float32[k], the same on every shard; and what that carried.
    """
    wire = accounting.reduced(WORD_BITS * len(numbers), axis_size(model_axis))
    return mean(jnp.stack(numbers), model_axis), wire


def widen(state: Any, model_axis: AxisName) -> Any:
    """Give scalars an axis, along which the states of all shards can lie side by side.

    Args:
      state: arrays that differ from shard to shard.
      model_axis: over which parameters are sharded, or None.

    Returns:
      The arrays; with a model axis, of at least one dimension.
    """
    return state if model_axis is None else jax.tree.map(jnp.atleast_1d, state)


def narrow(state: Any, like: Any) -> Any:
    """Undo `widen`.

    Args:
      state: of `widen`.
      like: the same tree with the shapes it had.

    Returns:
      The arrays in those shapes.
    """
    return jax.tree.map(lambda leaf, shape: leaf.reshape(shape.shape), state, like)
