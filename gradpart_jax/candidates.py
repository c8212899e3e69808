"""Candidates: what lies above the forecast's thresholds, found in one pass over the vector."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from gradpart_jax.bits import WORD, bitmask, keep, popcount, scramble, select, thin
from gradpart_jax.buffers import gather, rank_score
from gradpart_jax.codecs import LARGEST_VALUE
from gradpart_jax.outlook import Outlook
from gradpart_jax.segments import Layout, Segmented, segment_of, spread
from gradpart_jax.shares import deal_words, share_of, share_size
from gradpart_jax.stored import stored
from gradpart_jax.varying import alike

PASSES = 6  # over the vector at most, where forecast and sample were far off
STRIDE = 0.9  # factor on the thresholds from one such pass to the next, at the most
FARTHEST = 1e30  # factor by which a forecast may be off
SAMPLE = 2**18  # elements that tell how far off the forecast is
DEVIATIONS = 3.5  # of the sample's count, between what is needed, what is aimed at, and what there is room for


class Candidates(NamedTuple):
    """Entries above the thresholds, a few more than are to be sent."""

    positions: jax.Array  # int32[room]: ascending, padded with the vector's length
    values: jax.Array  # float32[room]: finite
    found: jax.Array  # int32[]: how many of them are no padding
    marked: jax.Array  # int32[]: how many lie above the thresholds, with those that there was no room for
    proposed: jax.Array  # int32[]: how many lie above the thresholds that the forecast proposed, by a sample


def find(
    vector: jax.Array, outlook: Outlook, turn: jax.Array, entries: int, layout: Segmented, spare: int = 0
) -> tuple[Candidates, jax.Array]:
    """Read the vector once, and gather what lies above the thresholds.

    Args:
      vector: float32[n].
      outlook: thresholds for the asked-for counts, and lower ones, which let MARGIN times as many through.
      turn: int32[], a step counter.
      entries: that are to be sent.
      layout: the segments, of the whole vector or of a share.
      spare: more candidates that there is to be room for, where many may be equal, which no threshold parts.

    Returns:
      Candidates; bool[], whether the vector is finite.
    """
    room = min(candidates_of(entries, layout.total)[1] + spare, layout.total)
    words, count, proposed = _mark(vector, outlook, turn, entries, layout, room)
    crowded = count > room
    words = jax.lax.cond(crowded, lambda w: _thinned(w, room, turn), lambda w: w, words)
    positions, found = select(words, room)
    values, finite = _read(vector, positions, crowded, room >= layout.total)
    return Candidates(positions, values, found, count, proposed), finite


def find_by_share(
    vector: jax.Array,
    outlook: Outlook,
    turn: jax.Array,
    entries: int,
    layout: Layout,
    devices: int,
    owners: jax.Array,
    owned: jax.Array,
) -> tuple[Candidates, jax.Array]:
    """Read the vector once, and gather what lies above the thresholds, sorted by the device that owns it.

    Args:
      vector: float32[n].
      outlook: as in `find`.
      turn: int32[], a step counter.
      entries: that are to be sent to each owner.
      layout: the segments.
      devices: W.
      owners: int32[W - 1], all but this device.
      owned: bool[n / 32], words of this device's own share, which hold no candidates.

    Returns:
      Candidates, each array with a leading axis of owners, positions being those in their shares; bool[], whether the
      vector is finite, its own share left out.
    """
    total, others = share_size(layout, devices), devices - 1
    most = candidates_of(entries * others, layout.total, others)[1]
    room = min(most // others + WORD, total)
    words, _, proposed = _mark(vector, outlook, turn, entries * others, layout, most, others, owned)
    rows = stored(deal_words(words, devices, owners))
    counts = jnp.sum(popcount(rows), axis=1)
    crowded = jnp.any(counts > room)
    rows = jax.lax.cond(crowded, jax.vmap(lambda row: _thinned(row, room, turn)), lambda rows: rows, rows)
    positions, found = jax.vmap(lambda row: select(row, room))(rows)
    whole = stored(jax.vmap(lambda owner, own: share_of(layout, devices, owner).restore(own))(owners, positions))
    values, finite = _read(vector, whole.reshape(-1), crowded, room >= total)
    proposed = jnp.broadcast_to(proposed // others, (others,))
    return Candidates(positions, values.reshape(whole.shape), found, counts, proposed), finite


def candidates_of(entries: int, total: int, shares: int = 1) -> tuple[int, int]:
    """Say how many candidates to mark, so that a sample's error leaves neither too few nor too many.

    Args:
      entries: that are to be sent.
      total: length of the vector.
      shares: that each are to have their part of the entries.

    Returns:
      Candidates to aim at; candidates that there is room for, at most all.
    """
    sampled = total // _stride(total)
    variance = (1 - sampled / total) / max(entries * sampled / total, 1.0) + (shares - 1) / max(entries, 1)
    aim, room = (math.ceil(entries * (1 + k * math.sqrt(variance))) for k in (DEVIATIONS, 2 * DEVIATIONS + 0.5))
    return min(aim, total), min(room + WORD, total)


def _stride(total: int) -> int:
    """Of how many elements one is sampled."""
    return -(-total // SAMPLE)


def _scores(
    vector: jax.Array, outlook: Outlook, turn: jax.Array, layout: Segmented, without: jax.Array | None
) -> jax.Array:
    """Give a sample's magnitudes in units of the thresholds that the forecast proposed: float32[M]."""
    stride = _stride(layout.total)
    # One of each stride, at random, so that no column of a matrix is favoured.
    place = jnp.arange(layout.total // stride, dtype=jnp.int32) * stride
    place += (scramble(place.shape[0], turn) % jnp.uint32(stride)).astype(jnp.int32)
    score = jnp.minimum(jnp.abs(vector[place]) / outlook.proposal[segment_of(place, layout)], FARTHEST)
    return score if without is None else jnp.where(without[place // WORD], 0.0, score)


def _thinned(words: jax.Array, room: int, turn: jax.Array) -> jax.Array:
    return keep(thin(words, room, turn), room, turn)


def _read(vector: jax.Array, positions: jax.Array, crowded: jax.Array, roomy: bool) -> tuple[jax.Array, jax.Array]:
    """Read candidates' values, and see whether all of the vector is finite: what is not, is a candidate."""
    values = stored(gather(vector, positions))
    finite = jnp.all(jnp.isfinite(values))
    if not roomy:
        finite &= jax.lax.cond(crowded, lambda v: jnp.all(jnp.isfinite(v)), lambda v: alike(jnp.bool_(True), v), vector)
    return stored(jnp.nan_to_num(values)), finite


def _mark(
    vector: jax.Array,
    outlook: Outlook,
    turn: jax.Array,
    entries: int,
    layout: Segmented,
    room: int,
    shares: int = 1,
    without: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Mark what lies above the thresholds, or, should that be too few or too many, above better ones.

    A sample of the vector says by which factor the forecast is off; then one pass does in almost all steps. Else the
    factor is looked for, first in growing steps and then by halves, a pass each; what is still too much after some
    passes is thinned out. Words in `without` are passed over.

    Returns:
      Words of the bitmask; their set bits; how many lie above the proposed thresholds, as estimated by the sample.
    """
    aim = candidates_of(entries, layout.total, shares)[0]

    def mark(factor: jax.Array) -> tuple[jax.Array, jax.Array]:
        # Not "above", but "not within": a NaN is a candidate too, so that no separate pass need look for one. Without
        # `abs`, of which a compiler would keep a copy for the search.
        bound = spread(jnp.minimum(outlook.proposal * factor, LARGEST_VALUE), layout)[:, None]
        rows = vector.reshape(-1, WORD)
        over = ~((rows <= bound) & (rows >= -bound))
        words = bitmask(over.reshape(-1))
        if without is not None:
            words = jnp.where(without, jnp.uint32(0), words)
        return words, jnp.sum(popcount(words))

    def unsuited(search: tuple[jax.Array, ...]) -> jax.Array:
        _, count, factor, _, _, _, passes = search
        return ((count < entries) | (count > room)) & (factor > 0) & (passes < PASSES)

    def again(search: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        _, count, factor, step, low, high, passes = search
        low = jnp.where(count > room, factor, low)
        high = jnp.where(count < entries, factor, high)
        bracketed = (low > 0) & (high < jnp.inf)
        factor = jnp.where(bracketed, (low + high) / 2, jnp.where(count < entries, factor * step, factor / step))
        return (*mark(factor), factor, step * step, low, high, passes + 1)

    score, stride = _scores(vector, outlook, turn, layout, without), _stride(layout.total)
    proposed = jnp.sum((score > 1).astype(jnp.int32)) * stride
    zero, one = jnp.float32(0.0), jnp.float32(1.0)
    if room >= layout.total:  # there is room for all that is not zero
        return *mark(zero), proposed
    factor = rank_score(score, jnp.ones(score.shape, bool), jnp.int32(max(1, round(aim / stride))))
    start: tuple[jax.Array, ...] = alike(
        (*mark(factor), factor, jnp.minimum(outlook.retreat, STRIDE), zero, one * jnp.inf, jnp.int32(1))
    )

    def find(search: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        search = jax.lax.while_loop(unsuited, again, search)
        _, count, _, _, low, _, _ = search
        # Where many are equal no threshold leaves some of them: rather too many, to be thinned out, than too few.
        return jax.lax.cond((count < entries) & (low > 0), lambda: (*mark(low), *search[2:]), lambda: search)

    # A loop copies what it reads, here the vector, so that it is entered only where it is needed.
    search = jax.lax.cond(unsuited(start), find, lambda s: s, start)
    return search[0], search[1], proposed
