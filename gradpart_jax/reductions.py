"""One number a segment, with the same bits in every program.

Under vmap a sum over many elements would be taken in another order than under pmap: here it is taken one device at a
time, in its own shapes.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from gradpart_jax.segments import ALIGNMENT, Layout, loosen, spread, tighten
from gradpart_jax.stored import stored


def alone(function: Callable[..., jax.Array], *arguments: jax.Array) -> jax.Array:
    """Apply a function to one device's values at a time, and keep its result in memory.

    A stored result is not contracted with what is made of it.

    Args:
      function: of arrays to an array, without collectives.
      arguments: its arguments.

    Returns:
      The result.
    """
    return stored(jax.custom_batching.sequential_vmap(function)(*arguments))


def segment_sums(values: jax.Array, layout: Layout) -> jax.Array:
    """Add up by segment, each in one order; for use within `alone` or `replicated`.

    Args:
      values: float32[n], or [n / 32, 32], zeros between the segments.
      layout: the segments.

    Returns:
      float32[S].
    """
    words = stored(jnp.sum(values.reshape(-1, ALIGNMENT), axis=1))
    return jnp.stack([jnp.sum(words[first:end]) for first, end in _spans(layout)])


def segment_means(values: jax.Array, layout: Layout) -> jax.Array:
    """Average each segment.

    Args:
      values: float32[n], zeros between the segments.
      layout: the segments.

    Returns:
      float32[S], 0 for an empty segment.
    """
    return alone(lambda values: segment_sums(values, layout) * _shares(layout), values)


def segment_deviations(values: jax.Array, layout: Layout) -> jax.Array:
    """Take the root mean square of each segment.

    Args:
      values: float32[n], zeros between the segments.
      layout: the segments.

    Returns:
      float32[S], 0 for an empty segment.
    """
    return alone(lambda values: jnp.sqrt(segment_sums(values * values, layout) * _shares(layout)), values)


def per_element(numbers: jax.Array, layout: Layout) -> jax.Array:
    """Repeat each segment's number for its elements.

    Args:
      numbers: [S].
      layout: the segments.

    Returns:
      [n].
    """
    words = spread(numbers, layout)
    return jnp.broadcast_to(words[:, None], (words.shape[0], ALIGNMENT)).reshape(-1)


def cleared(values: jax.Array, layout: Layout) -> jax.Array:
    """Put zeros between the segments.

    Args:
      values: float32[n].
      layout: the segments.

    Returns:
      float32[n].
    """
    return loosen(tighten(values, layout), layout)


def _shares(layout: Layout) -> jax.Array:
    return jnp.asarray([1.0 / max(size, 1) for size in layout.sizes], jnp.float32)


def _spans(layout: Layout) -> list[tuple[int, int]]:
    """First word and the word after the last, of each segment."""
    return [
        (start // ALIGNMENT, start // ALIGNMENT - (-size // ALIGNMENT))
        for start, size in zip(layout.starts, layout.sizes, strict=True)
    ]
