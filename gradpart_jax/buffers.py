"""Fixed-capacity sparse buffers: what is selected from a vector, in order of position."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from gradpart_jax.bits import WORD, bitmask, flags, keep, select

QUARTERINGS = 8  # of the range of scores' bit patterns: a relative precision of about 2^-12


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
      float32[n], zeros.
    """
    # True, but known to no compiler: it has to wait for `after`, and to go by `vector`.
    if not after.size:
        return jnp.zeros_like(vector)
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
    """Flag the largest scores, exactly as many as fit.

    The cut is found by quartering the range of the scores' bit patterns, which order non-negative floats; entries that
    are equal to the cut, or within its precision, give way in turns.

    Args:
      scores: float32[C], non-negative.
      filled: bool[C]; other slots are empty.
      capacity: how many to flag at most.
      turn: int32[], a step counter.

    Returns:
      bool[C] with `capacity` set, or all that are filled; float32[], the cut: no flagged score is below it.

    >>> import jax.numpy as jnp
    >>> flagged, cut = largest(jnp.array([3.0, 1.0, 2.0, 9.0]), jnp.arange(4) < 3, 2, jnp.int32(0))
    >>> flagged.tolist(), round(float(cut), 3)
    ([True, False, True, False], 2.0)
    """
    size = scores.shape[0]
    if size == 0 or (isinstance(capacity, int) and capacity == 0):
        return jnp.zeros(size, bool), jnp.float32(1.0)
    cut, above = ranked(scores, filled, jnp.maximum(capacity, 1))
    certain = filled & (scores >= above)
    close = bitmask(jnp.pad(filled & (scores >= cut) & ~certain, (0, -size % WORD)))
    taken = flags(keep(close, capacity - jnp.sum(certain.astype(jnp.int32)), turn))[:size]
    return certain | taken, cut


def ranked(scores: jax.Array, filled: jax.Array, rank: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Find the score that so many reach, from both sides.

    Args:
      scores: float32[C], non-negative, C at least 1.
      filled: bool[C]; other slots are empty.
      rank: int32[], at least 1.

    Returns:
      float32[], which at least `rank` scores reach (all, if they are fewer); float32[], which fewer reach.
    """
    pattern = jnp.where(filled, jax.lax.bitcast_convert_type(scores, jnp.int32), -1)
    least = jnp.min(jnp.where(filled, pattern, jnp.iinfo(jnp.int32).max))

    quarters = jnp.arange(1, 4, dtype=jnp.int32)

    def quarter(_: int, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bounds  # at least `rank` reach low, fewer reach high
        cuts = low + (high - low) // 4 * quarters + (high - low) % 4 * quarters // 4
        enough = jnp.sum((pattern[None, :] >= cuts[:, None]).astype(jnp.int32), axis=1) >= rank
        return jnp.max(jnp.where(enough, cuts, low)), jnp.min(jnp.where(enough, high, cuts))

    most = jnp.max(pattern)
    low, high = jax.lax.fori_loop(0, QUARTERINGS, quarter, (jnp.minimum(least, most), most + 1))
    low, high = (jax.lax.bitcast_convert_type(jnp.maximum(x, 0), jnp.float32) for x in (low, high))
    return low, high


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
    words = bitmask(jnp.pad(flagged, (0, -flagged.shape[0] % WORD)))
    slots, count = select(words, capacity)
    return Buffer(
        indices=indices.at[slots].get(mode="fill", fill_value=size),
        values=values.at[slots].get(mode="fill", fill_value=0.0),
        used=jnp.minimum(count, capacity),
    )
