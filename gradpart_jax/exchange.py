"""Every collective of the package; nothing else knows what an axis name is.

`None` stands for one device alone: the same results that a mapped axis of size one would give, with no collective.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from gradpart_jax.varying import axes_of, vary

AxisName: TypeAlias = Hashable | tuple[Hashable, ...] | None


def names(axis: AxisName) -> tuple[Any, ...]:
    """List the names in an axis argument.

    Args:
      axis: a name, a tuple of names, or None.

    Returns:
      The names.
    """
    if axis is None:
        return ()
    return axis if isinstance(axis, tuple) else (axis,)


def axis_size(axis_name: AxisName) -> int:
    """Count the devices under an axis name.

    Args:
      axis_name: a mapped axis, a tuple of them, or None.

    Returns:
      Their number, a Python int.

    Raises:
      NameError: no such axis is mapped.

    >>> axis_size(None)
    1
    """
    if axis_name is None:
        return 1
    try:
        return int(jax.lax.axis_size(axis_name))
    except NameError as error:
        raise NameError(
            f"no axis {axis_name!r} is mapped here: call update inside of jax.pmap, jax.shard_map or jax.vmap with "
            f"axis_name={axis_name!r}; or make the optimizer with axis_name=None, for one device alone"
        ) from error


def gather(payload: jax.Array, axis_name: AxisName) -> jax.Array:
    """Give every device every device's payload, in device order.

    Args:
      payload: [...], the same shape on every device.
      axis_name: the mapped axis.

    Returns:
      [W, ...].
    """
    if axis_name is None:
        return payload[None]
    axes = frozenset(names(axis_name))
    if len(axes) > 1 and not axes <= set(jax.sharding.get_abstract_mesh().axis_names):
        # Under nested vmaps JAX gathers over one axis at a time only.
        whole = payload
        for name in reversed(names(axis_name)):
            whole = jax.lax.all_gather(whole, name)
        return whole.reshape(-1, *payload.shape)
    if not axes & axes_of(payload):
        return jax.lax.all_gather(payload, axis_name)
    # Under check_vma=True: all devices get the same, and so does the type say.
    return _gather_alike(vary(payload, axes), axis_name)


def _gather_alike(payload: jax.Array, axis_name: AxisName) -> jax.Array:
    if jax.__version_info__ >= (0, 10):
        return jax.lax.all_gather(payload, axis_name, to="invarying")
    from jax._src.lax.parallel import all_gather_invariant  # by that name alone in releases that change no more

    return all_gather_invariant(payload, axis_name)


def mean(values: Any, axis_name: AxisName) -> Any:
    """Average over devices.

    Args:
      values: [...], float; or a tree of such.
      axis_name: the mapped axis.

    Returns:
      [...], the same on every device.
    """
    return values if axis_name is None else jax.lax.pmean(values, axis_name)


def greatest(values: jax.Array, axis_name: AxisName) -> jax.Array:
    """Take the greatest over devices.

    Args:
      values: [...].
      axis_name: the mapped axis.

    Returns:
      [...], the same on every device.
    """
    return values if axis_name is None else jax.lax.pmax(values, axis_name)


def least(values: jax.Array, axis_name: AxisName) -> jax.Array:
    """Take the least over devices.

    Args:
      values: [...].
      axis_name: the mapped axis.

    Returns:
      [...], the same on every device.
    """
    return values if axis_name is None else jax.lax.pmin(values, axis_name)


def position(axis_name: AxisName) -> jax.Array:
    """Say which device this is.

    Args:
      axis_name: the mapped axis.

    Returns:
      int32[] in [0, W).
    """
    return jnp.int32(0) if axis_name is None else jnp.asarray(jax.lax.axis_index(axis_name), jnp.int32)


def total(values: jax.Array, axis_name: AxisName) -> jax.Array:
    """Sum over devices.

    Args:
      values: [...], numbers.
      axis_name: the mapped axis.

    Returns:
      [...], the same on every device.
    """
    return values if axis_name is None else jax.lax.psum(values, axis_name)


def from_leader(values: jax.Array, leader: jax.Array, axis_name: AxisName) -> jax.Array:
    """Give every device one device's values: a broadcast, as the sum of what all but one of them leave at zero.

    Args:
      values: [...], numbers.
      leader: int32[] in [0, W), the same on every device.
      axis_name: the mapped axis.

    Returns:
      [...], the leader's values.
    """
    return total(jnp.where(position(axis_name) == leader, values, jnp.zeros_like(values)), axis_name)


def deal(payloads: jax.Array, axis_name: AxisName) -> jax.Array:
    """Give each device what every device has for it: an all-to-all.

    Args:
      payloads: [W, ...], one for each device.
      axis_name: the mapped axis.

    Returns:
      [W, ...], one from each device, in device order.
    """
    return payloads if axis_name is None else jax.lax.all_to_all(payloads, axis_name, 0, 0)
