"""Moments segment by segment, with the same bits in every program, in units of each segment's largest magnitude."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from gradpart_jax.bits import WORD
from gradpart_jax.reductions import segment_sums
from gradpart_jax.replicated import replicated
from gradpart_jax.segments import Layout, spread

SMALLEST = 1e-37  # scale below which a segment counts as zero


class Tail(NamedTuple):
    """What lies above a bound in each segment, in units of the segment's largest magnitude."""

    number: jax.Array  # float32[S]
    mean: jax.Array  # float32[S]: of the excess over the bound; 0 where nothing lies above
    square: jax.Array  # float32[S]: mean of the squared excess
    log: jax.Array  # float32[S]: mean of the logarithm of the magnitude


def greatest_magnitude(vector: jax.Array, layout: Layout) -> jax.Array:
    """Find each segment's largest magnitude.

    Args:
      vector: float32[n].
      layout: the segments.

    Returns:
      float32[S], 0 for an empty segment.
    """
    rows = jnp.max(jnp.abs(vector).reshape(-1, WORD), axis=1)
    return jnp.zeros(layout.segments, jnp.float32).at[_owners(layout)].max(rows, indices_are_sorted=True)


def tail(vector: jax.Array, scale: jax.Array, bounds: jax.Array, layout: Layout) -> Tail:
    """Take the moments of what lies above a bound in each segment.

    They have the same bits in every program (see `replicated`), though each device has its own.

    Args:
      vector: float32[n].
      scale: float32[S], the largest magnitudes, of which the results are multiples: squares stay in range.
      bounds: float32[S], in multiples of scale; below 0 counts zeros (and padding) too.
      layout: the segments.

    Returns:
      Tail.
    """
    return replicated(_tail)(vector, scale, bounds, layout=layout)


def _tail(vector: jax.Array, scale: jax.Array, bounds: jax.Array, *, layout: Layout) -> Tail:
    x = jnp.abs(scaled(vector, scale, layout))
    bound = spread(bounds, layout)[:, None]
    over = x > bound
    excess = jnp.where(over, x - bound, 0.0)
    logs = jnp.where(over, jnp.log(jnp.maximum(x, SMALLEST)), 0.0)
    count = segment_sums(over.astype(jnp.float32), layout)
    some = jnp.maximum(count, 1.0)
    sums = (segment_sums(values, layout) for values in (excess, excess * excess, logs))
    return Tail(count, *[total / some for total in sums])


def scaled(vector: jax.Array, scale: jax.Array, layout: Layout) -> jax.Array:
    """Express values in units of their segment's scale; for use within `replicated`.

    Args:
      vector: float32[n].
      scale: float32[S], the largest magnitudes; where there is none, 1 is taken.
      layout: the segments.

    Returns:
      float32[n / 32, 32].
    """
    unit = 1.0 / jnp.where((scale > SMALLEST) & (scale < jnp.inf), scale, 1.0)
    return vector.reshape(-1, WORD) * spread(unit, layout)[:, None]


def _owners(layout: Layout) -> jax.Array:
    return spread(jnp.arange(layout.segments, dtype=jnp.int32), layout)
