"""Every collective of the package, and what keeps devices bit-equal; nothing else knows what an axis name is.

`None` stands for one device alone: the same results that a mapped axis of size one would give, with no collective.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

AxisName: TypeAlias = Hashable | tuple[Hashable, ...] | None


def axis_size(axis_name: AxisName) -> int:
    """Count the devices under an axis name.

    Args:
      axis_name: a mapped axis, a tuple of them, or None.

    Returns:
      Their number, a Python int.

    >>> axis_size(None)
    1
    """
    return 1 if axis_name is None else int(jax.lax.axis_size(axis_name))


def gather(payload: jax.Array, axis_name: AxisName) -> jax.Array:
    """Give every device every device's payload, in device order.

    Args:
      payload: [...], the same shape on every device.
      axis_name: the mapped axis.

    Returns:
      [W, ...].
    """
    return payload[None] if axis_name is None else jax.lax.all_gather(payload, axis_name)


def mean(values: jax.Array, axis_name: AxisName) -> jax.Array:
    """Average over devices.

    Args:
      values: [...], float.
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


def isolated(function: Callable[..., Any], step: jax.Array) -> Callable[..., Any]:
    """Compile a function of replicated values alike wherever it stands, under vmap too.

    A compiler fuses, contracts and orders sums by shape and neighbourhood, and so rounds the same expression otherwise
    in a batched program than in an unbatched one. As the branch of a conditional the function is compiled by itself
    (an optimization barrier does not outlive fusion on CPUs), and under vmap it runs one device at a time, in its own
    shapes.

    Args:
      function: small, without collectives; keyword arguments are static.
      step: int32[], a step counter, never negative: a condition that holds, but that no compiler knows to hold.

    Returns:
      The same function of the same values, to the last bit.
    """

    def run(*arguments: Any, **static: Any) -> Any:
        fixed = functools.partial(function, **static)
        outcome = jax.eval_shape(fixed, *arguments)

        def nothing(*_: Any) -> Any:
            return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), outcome)

        def alone(step: jax.Array, *arguments: Any) -> Any:
            return jax.lax.cond(step >= 0, fixed, nothing, *arguments)

        return jax.custom_batching.sequential_vmap(alone)(step, *arguments)

    return run
