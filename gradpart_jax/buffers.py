"""Fixed-capacity sparse buffers: what is selected from a vector, in order of position."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from gradpart_jax.bits import WORD, scramble
from gradpart_jax.prefix_sums import prefix_sum
from gradpart_jax.varying import alike, axes_of

LOT_BITS = 30  # so that int32 holds one more than the largest


class Buffer(NamedTuple):
    """Entries of a vector of length n, ascending by position."""

    indices: jax.Array  # int32[C]: positions, padded with n
    values: jax.Array  # float32[C]: padded with 0
    used: jax.Array  # int32[]: entries that are no padding


def gather(vector: jax.Array, indices: jax.Array) -> jax.Array:
    """Read entries of a vector.

    Args:
      vector: float32[n].
      indices: int32[C], n where there is none.

    Returns:
      float32[C], 0 where there is none.
    """
    return vector.at[indices].get(mode="fill", fill_value=0.0)


def resize(buffer: Buffer, capacity: int, size: int) -> Buffer:
    """Give a buffer another capacity, at least as large as what is used of it.

    Args:
      buffer: of any capacity.
      capacity: of the result.
      size: length n of the vector, for the padding.

    Returns:
      Buffer.
    """
    more = max(capacity - buffer.indices.shape[0], 0)
    return Buffer(
        indices=jnp.pad(buffer.indices[:capacity], (0, more), constant_values=size),
        values=jnp.pad(buffer.values[:capacity], (0, more)),
        used=jnp.minimum(buffer.used, capacity),
    )


def overwritten(vector: jax.Array, after: jax.Array) -> jax.Array:
    """Give zeros in the place of a vector that is not read again once `after` is made.

    Fresh memory costs more than a pass over memory in use: page faults, and a copy into a donated buffer.

    Args:
      vector: float32[n].
      after: float32[m], any.

    Returns:
      float32[n], zeros; under `shard_map(check_vma=True)` fresh ones, of a type that varies over no axis.
    """
    # True, but known to no compiler: it has to wait for `after`, and to go by `vector`.
    if not after.size or axes_of(vector):
        return jnp.zeros(vector.shape, vector.dtype)
    done = jnp.max(jax.lax.bitcast_convert_type(after[:WORD], jnp.uint32)) | 1 > 0
    return jax.lax.fori_loop(0, done.astype(jnp.int32), lambda _, x: jnp.zeros_like(x), vector)


def scatter_add(vector: jax.Array, indices: jax.Array, values: jax.Array) -> jax.Array:
    """Add entries to a vector.

    Args:
      vector: float32[n].
      indices: int32[C], n where there is none.
      values: float32[C].

    Returns:
      float32[n].
    """
    return vector.at[indices].add(values, mode="drop")


def largest(
    scores: jax.Array, filled: jax.Array, capacity: int | jax.Array, turn: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Flag the largest scores, exactly as many as fit; which of equal ones, changes from turn to turn.

    Args:
      scores: float32[C], non-negative, C at most 2^30.
      filled: bool[C]; other slots are empty.
      capacity: how many to flag at most.
      turn: int32[], a step counter.

    Returns:
      bool[C] with `capacity` set, or all that are filled; float32[], the least score flagged, inf where there is none.

    >>> import jax.numpy as jnp
    >>> flagged, cut = largest(jnp.array([3.0, 1.0, 2.0, 9.0]), jnp.arange(4) < 3, 2, jnp.int32(0))
    >>> flagged.tolist(), float(cut)
    ([True, False, True, False], 2.0)
    """
    size = scores.shape[0]
    if size == 0 or (isinstance(capacity, int) and capacity == 0):
        return jnp.zeros(size, bool), jnp.float32(jnp.inf)
    pattern = _pattern(scores, filled)
    cut, count = _cut(lambda least: pattern >= least, capacity, jnp.max(pattern))
    # Too many reach the cut only where several are equal to it: those draw lots.
    lot = scramble(size, turn, LOT_BITS).astype(jnp.int32)
    drawn, _ = _cut(
        lambda least: (pattern > cut) | ((pattern == cut) & (lot >= least)),
        capacity,
        jnp.int32(2**LOT_BITS - 1),
        count,
    )
    flagged = filled & ((pattern > cut) | ((pattern == cut) & (lot >= drawn))) & (capacity > 0)
    return flagged, jnp.min(jnp.where(flagged, scores, jnp.inf))


def rank_score(scores: jax.Array, filled: jax.Array, rank: jax.Array) -> jax.Array:
    """Find a number that so many scores reach: at most the rank-th largest, and above the next lower one.

    Args:
      scores: float32[C], non-negative, C at least 1.
      filled: bool[C]; other slots are empty.
      rank: int32[], at least 1.

    Returns:
      float32[]; the rank-th largest score itself where the next is equal to it; 0 where no more than `rank` are filled.
    """
    pattern = _pattern(scores, filled)
    cut, _ = _cut(lambda least: pattern >= least, rank, jnp.max(pattern))
    return jax.lax.bitcast_convert_type(cut, jnp.float32)


def _pattern(scores: jax.Array, filled: jax.Array) -> jax.Array:
    # The bit patterns of non-negative floats are ordered as the floats are.
    return jnp.where(filled, jax.lax.bitcast_convert_type(scores, jnp.int32), -1)


def _cut(
    reach: Callable[[jax.Array], jax.Array],
    rank: int | jax.Array,
    most: jax.Array,
    count: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Find the greatest number from 0 on that at least `rank` reach, in eighths of the range that is left.

    Args:
      reach: says which of C reach a number.
      rank: how many should.
      most: int32[], that some reach, and none exceeds.
      count: how many reach 0, where that is known.

    Returns:
      int32[], the number, or a lower one that exactly `rank` reach; int32[], how many reach it: less than rank only
      where they are fewer in all.
    """
    eighths = jnp.arange(1, 8, dtype=jnp.int32)

    def reaching(numbers: jax.Array) -> jax.Array:
        # One reduction of all seven masks: it vectorises, where a sum of one mask does not.
        masks = tuple(reach(number).astype(jnp.int32) for number in numbers)
        zeros = tuple(jnp.int32(0) for _ in masks)
        return jnp.stack(
            jax.lax.reduce(masks, zeros, lambda a, b: tuple(x + y for x, y in zip(a, b, strict=True)), (0,))
        )

    def unsettled(bounds: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        low, high, count = bounds
        return (count > rank) & (high - low > 1)

    def narrow(bounds: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        low, high, count = bounds
        numbers = low + (high - low) // 8 * eighths + (high - low) % 8 * eighths // 8
        found = reaching(numbers)
        enough = found >= rank
        low, high = jnp.max(jnp.where(enough, numbers, low)), jnp.min(jnp.where(enough, high, numbers))
        return low, high, jnp.min(jnp.where(enough, found, count))

    zero = jnp.int32(0)
    start = alike((zero, jnp.maximum(most, 0) + 1, jnp.sum(reach(zero).astype(jnp.int32)) if count is None else count))
    low, _, count = jax.lax.while_loop(unsettled, narrow, start)
    return low, count


def compact(indices: jax.Array, values: jax.Array, flagged: jax.Array, capacity: int, size: int) -> Buffer:
    """Move flagged entries to the front, in order.

    Args:
      indices: int32[C], ascending.
      values: float32[C].
      flagged: bool[C].
      capacity: of the result; surplus entries are left out.
      size: length n of the vector, for the padding.

    Returns:
      Buffer.
    """
    rank = prefix_sum(flagged.astype(jnp.int32))
    slot = jnp.where(flagged, rank - 1, capacity)
    count = rank[-1] if rank.size else jnp.int32(0)
    return Buffer(
        indices=jnp.full(capacity, size, jnp.int32).at[slot].set(indices, mode="drop"),
        values=jnp.zeros(capacity, jnp.float32).at[slot].set(values, mode="drop"),
        used=jnp.minimum(count, capacity),
    )
