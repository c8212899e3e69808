"""Values kept in memory, where a compiler would compute them anew at each use.

XLA's CPU backend fuses whatever it can into the loops that read it: a threshold that took a forecast to make is
forecast again for each of a million entries that look it up. It fuses all but a few operations; a window reduction is
the cheapest of those.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np


def stored(values: jax.Array) -> jax.Array:
    """Give the same values, from memory.

    The maximum is taken over windows of one value and a neutral element, which no simplification sees through.

    Args:
      values: [...], of real numbers or booleans.

    Returns:
      The same, bit for bit.

    >>> import jax.numpy as jnp
    >>> stored(jnp.array([-0.0, 3.0]))
    Array([-0.,  3.], dtype=float32)
    """
    if not values.size or values.dtype == bool:
        return values
    floating = jnp.issubdtype(values.dtype, jnp.floating)
    least = np.asarray(-np.inf if floating else jnp.iinfo(values.dtype).min, values.dtype)
    column = values.reshape(-1, 1)
    return jax.lax.reduce_window(column, least, jax.lax.max, (1, 2), (1, 1), ((0, 0), (0, 1))).reshape(values.shape)
