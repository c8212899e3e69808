"""Magnitudes segment by segment, by whole words: counts, exact ranks, and selection.

Segments begin at whole words of 32 elements, so that a word's set bits belong to one segment, and a tree of any number
of leaves is one vector here: no loop over leaves, no sort.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from gradpart_jax.bits import WORD, bitmask, keep, lowest, popcount, prefix, select
from gradpart_jax.buffers import Buffer, compact, gather
from gradpart_jax.prefix_sums import prefix_sum
from gradpart_jax.segments import Layout, segment_of, spread
from gradpart_jax.varying import alike

INFINITE = 0x7F800000  # bit pattern of infinity, above that of every finite magnitude


def quotas(ratio: float, layout: Layout) -> tuple[int, ...]:
    """Fix how many entries each segment may send: its share, but at least one.

    Args:
      ratio: of its elements, in (0, 1].
      layout: the segments.

    Returns:
      One number a segment, 0 only for an empty one.

    >>> quotas(0.01, Layout(sizes=(7, 2000, 0), starts=(0, 32, 2032), total=2048, elements=2007, shapes=()))
    (1, 20, 0)
    """
    return tuple(min(size, max(1, round(ratio * size))) for size in layout.sizes)


def room(ratio: float, slack: float, layout: Layout) -> int:
    """Fix how many entries a payload holds whose count only a threshold decides.

    Args:
      ratio: of entries asked for.
      slack: room over those asked for.
      layout: the segments.

    Returns:
      How many.
    """
    return min(layout.elements, math.ceil(slack * sum(quotas(ratio, layout))))


def per_segment(words: jax.Array, layout: Layout) -> jax.Array:
    """Count set bits by segment.

    Args:
      words: uint32[n / 32].
      layout: the segments.

    Returns:
      int32[S].
    """
    ends = jnp.concatenate([jnp.zeros(1, jnp.int32), prefix_sum(popcount(words))])
    first = [start // WORD for start in layout.starts]
    last = [start // WORD + -(-size // WORD) for start, size in zip(layout.starts, layout.sizes, strict=True)]
    return ends[jnp.asarray(last, jnp.int32)] - ends[jnp.asarray(first, jnp.int32)]


def reaching(vector: jax.Array, bounds: jax.Array, layout: Layout) -> jax.Array:
    """Mark what reaches its segment's bound, and is not zero.

    Args:
      vector: float32[n].
      bounds: float32[S], non-negative.
      layout: the segments.

    Returns:
      uint32[n / 32], a bit for each element.
    """
    rows = jnp.abs(vector.reshape(-1, WORD))
    return bitmask(((rows >= spread(bounds, layout)[:, None]) & (rows > 0)).reshape(-1))


def top(vector: jax.Array, ranks: jax.Array, layout: Layout) -> jax.Array:
    """Mark each segment's largest magnitudes, exactly; of equal ones those that come first, of zeros none.

    The rank-th largest is found bit by bit, in all segments at once: the bit patterns of magnitudes are ordered as the
    magnitudes are.

    Args:
      vector: float32[n].
      ranks: int32[S], how many.
      layout: the segments.

    Returns:
      uint32[n / 32], a bit for each element.
    """
    pattern = _patterns(vector)
    cut = _cut(pattern, ranks, layout)
    bound = spread(cut, layout)[:, None]
    over = bitmask((pattern > bound).reshape(-1))
    equal = bitmask(((pattern == bound) & (pattern > 0)).reshape(-1))
    first = jnp.asarray([start // WORD for start in layout.starts], jnp.int32)
    before = prefix(equal)
    missing = ranks - per_segment(over, layout)
    at_start = before.at[first].get(mode="fill", fill_value=0)
    return over | lowest(equal, spread(missing + at_start, layout) - before)


def rank_magnitude(vector: jax.Array, ranks: jax.Array, layout: Layout) -> jax.Array:
    """Find each segment's rank-th largest magnitude.

    Args:
      vector: float32[n].
      ranks: int32[S], at least 1.
      layout: the segments.

    Returns:
      float32[S]; 0 where a segment has fewer elements.
    """
    return jax.lax.bitcast_convert_type(_cut(_patterns(vector), ranks, layout), jnp.float32)


def _patterns(vector: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(vector, jnp.int32).reshape(-1, WORD) & jnp.int32(0x7FFFFFFF)


def _cut(pattern: jax.Array, ranks: jax.Array, layout: Layout) -> jax.Array:
    """Find the greatest pattern that at least `ranks` reach, by halving: int32[S]."""

    def halve(_: jax.Array, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bounds
        middle = low + (high - low) // 2
        reached = bitmask((pattern >= spread(middle, layout)[:, None]).reshape(-1))
        enough = per_segment(reached, layout) >= ranks
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

    start = alike((jnp.zeros_like(ranks), jnp.full_like(ranks, INFINITE + 1)), pattern)
    return jax.lax.fori_loop(0, math.ceil(math.log2(INFINITE + 1)), halve, start)[0]


def entries(vector: jax.Array, words: jax.Array, capacity: int, turn: jax.Array) -> Buffer:
    """Read marked entries; where more are marked than fit, a run of them is left out that moves from turn to turn.

    Args:
      vector: float32[n].
      words: uint32[n / 32], the marks.
      capacity: of the buffer.
      turn: int32[], a step counter.

    Returns:
      Buffer.
    """
    places, count = select(keep(words, capacity, turn), capacity)
    return Buffer(places, gather(vector, places), jnp.minimum(count, capacity))


def trimmed(buffer: Buffer, ranks: jax.Array, capacity: int, layout: Layout) -> Buffer:
    """Keep each segment's largest entries of a buffer.

    Args:
      buffer: of any capacity.
      ranks: int32[S], how many of each segment at most.
      capacity: of the result, at least the sum of the ranks.
      layout: the segments.

    Returns:
      Buffer.
    """
    owner = jnp.where(buffer.indices < layout.total, segment_of(buffer.indices, layout), layout.segments)
    kept = largest_of_each(owner, buffer.values, ranks)
    return compact(buffer.indices, buffer.values, kept, capacity, layout.total)


def largest_of_each(owner: jax.Array, values: jax.Array, ranks: jax.Array) -> jax.Array:
    """Flag each owner's largest entries, by a sort: for buffers, not for vectors.

    Args:
      owner: int32[C] in [0, G]; what belongs to G is never flagged.
      values: float32[C].
      ranks: int32[G], how many to flag at most.

    Returns:
      bool[C].
    """
    size, groups = owner.shape[0], ranks.shape[0]
    slot = jnp.arange(size, dtype=jnp.int32)
    owner, _, order = jax.lax.sort((owner, -jnp.abs(values), slot), num_keys=2)
    first = jnp.searchsorted(owner, jnp.arange(groups + 1, dtype=jnp.int32))
    limit = jnp.append(ranks, 0)[owner] + first[owner]
    return jnp.zeros(size, bool).at[order].set(slot < limit)
