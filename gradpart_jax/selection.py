"""From a vector and thresholds to a payload and back: select in one pass, trim to what fits, encode, decode."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from gradpart_jax.bits import WORD, bitmask, keep, popcount, scramble, select, thin
from gradpart_jax.buffers import Buffer, compact, gather, largest, rank_score, resize
from gradpart_jax.codecs import LARGEST_VALUE
from gradpart_jax.outlook import MARGIN, Outlook
from gradpart_jax.payload import Bases, Contents, Header, PayloadFormat
from gradpart_jax.replicated import replicated
from gradpart_jax.segments import Layout, segment_of, spread
from gradpart_jax.stored import stored

PASSES = 6  # over the vector at most, where forecast and sample were far off
STRIDE = 0.9  # factor on the thresholds from one such pass to the next, at the most
FARTHEST = 1e30  # factor by which a forecast may be off
SAMPLE = 2**18  # elements that tell how far off the forecast is
DEVIATIONS = 3.5  # of the sample's count, between what is needed, what is aimed at, and what there is room for


class Chosen(NamedTuple):
    """This device's selection, before its values are coded."""

    key: Buffer
    sparse: Buffer
    candidates: jax.Array  # int32[]
    trim: jax.Array  # float32[]
    key_scale: jax.Array  # float32[]


def choose(
    vector: jax.Array,
    outlook: Outlook,
    turn: jax.Array,
    shape: PayloadFormat,
    layout: Layout,
) -> tuple[Chosen, jax.Array]:
    """Read the vector once, gather what lies above the thresholds, trim it to what the payload holds.

    Args:
      vector: float32[n].
      outlook: thresholds for the asked-for counts, and lower ones, which let MARGIN times as many through.
      turn: int32[], a step counter.
      shape: of the payload.
      layout: the segments.

    Returns:
      What is to be sent; bool[], whether the vector is finite.
    """
    entries = shape.entries
    room = candidates_of(entries, layout.total)[1]
    words, count, proposed = _candidates(vector, outlook, turn, entries, layout)
    crowded = count > room
    words = jax.lax.cond(crowded, lambda w: keep(thin(w, room, turn), room, turn), lambda w: w, words)
    positions, found = select(words, room)
    values = stored(gather(vector, positions))
    finite = jnp.all(jnp.isfinite(values))
    if room < layout.total:
        finite &= jax.lax.cond(crowded, lambda v: jnp.all(jnp.isfinite(v)), lambda _: jnp.bool_(True), vector)
    values = stored(jnp.nan_to_num(values))
    segment = segment_of(positions, layout)
    score = jnp.abs(values) / outlook.regions.sparse[segment]
    filled = jnp.arange(room, dtype=jnp.int32) < found
    flagged, trim = largest(score, filled, entries, turn)
    # A sample's exact threshold is that of the same share of it.
    rank = jnp.maximum(entries * (found.astype(jnp.float32) / count), 1.0).astype(jnp.int32)
    trim = jax.lax.cond(crowded, lambda: rank_score(score, filled, rank), lambda: trim)
    used = jnp.minimum(found, entries)
    # Both regions are filled alike, so that a few entries fit into a small payload.
    share = jnp.ceil(used * (shape.key_capacity / entries)).astype(jnp.int32)
    share = jnp.where(used < entries, jnp.minimum(share, shape.key_capacity), shape.key_capacity)
    is_key, key_scale = largest(jnp.abs(values) / outlook.regions.key[segment], flagged, share, turn)
    key = compact(positions, values, is_key, shape.key_capacity, layout.total)
    sparse = compact(positions, values, flagged & ~is_key, shape.sparse_capacity, layout.total)
    # A payload that is not full says nothing of the exact threshold but that it is lower: by about what is missing.
    short = replicated(_shortfall)(used, outlook.slope, entries=entries)
    trim = jnp.where(used < entries, short, trim)
    factors = [jnp.clip(factor, 1e-30, 1e29) for factor in (trim, key_scale)]
    return Chosen(key, sparse, proposed, *factors), finite


def candidates_of(entries: int, total: int) -> tuple[int, int]:
    """Say how many candidates to mark, so that a sample's error leaves neither too few nor too many.

    Args:
      entries: that are to be sent.
      total: length of the vector.

    Returns:
      Candidates to aim at; candidates that there is room for, at most all.
    """
    sampled = total // _stride(total)
    deviation = math.sqrt((1 - sampled / total) / max(entries * sampled / total, 1.0))
    aim, room = (math.ceil(entries * (1 + k * deviation)) for k in (DEVIATIONS, 2 * DEVIATIONS + 0.5))
    return min(aim, total), min(room + WORD, total)


def _stride(total: int) -> int:
    """Of how many elements one is sampled."""
    return -(-total // SAMPLE)


def _candidates(
    vector: jax.Array, outlook: Outlook, turn: jax.Array, entries: int, layout: Layout
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Mark what lies above the thresholds, or, should that be too few or too many, above better ones.

    A sample of the vector says by which factor the forecast is off; then one pass does in almost all steps. Else the
    factor is looked for, first in growing steps and then by halves, a pass each; what is still too much after some
    passes is thinned out.

    Returns:
      Words of the bitmask; their set bits; how many lie above the proposed thresholds, as estimated by the sample.
    """
    aim, room = candidates_of(entries, layout.total)

    def mark(factor: jax.Array) -> tuple[jax.Array, jax.Array]:
        # Not "above", but "not within": a NaN is a candidate too, so that no separate pass need look for one. Without
        # `abs`, of which a compiler would keep a copy for the search.
        bound = spread(jnp.minimum(outlook.proposal * factor, LARGEST_VALUE), layout)[:, None]
        rows = vector.reshape(-1, WORD)
        over = ~((rows <= bound) & (rows >= -bound))
        words = bitmask(over.reshape(-1))
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

    stride = _stride(layout.total)
    # One of each stride, at random, so that no column of a matrix is favoured.
    place = jnp.arange(layout.total // stride, dtype=jnp.int32) * stride
    place += (scramble(place.shape[0], turn) % jnp.uint32(stride)).astype(jnp.int32)
    score = jnp.minimum(jnp.abs(vector[place]) / outlook.proposal[segment_of(place, layout)], FARTHEST)
    proposed = jnp.sum((score > 1).astype(jnp.int32)) * stride
    zero, one = jnp.float32(0.0), jnp.float32(1.0)
    if room >= layout.total:  # there is room for all that is not zero
        return *mark(zero), proposed
    factor = rank_score(score, jnp.ones(score.shape, bool), jnp.int32(max(1, round(aim / stride))))
    start: tuple[jax.Array, ...] = (
        *mark(factor),
        factor,
        jnp.minimum(outlook.retreat, STRIDE),
        zero,
        one * jnp.inf,
        jnp.int32(1),
    )

    def find(search: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        search = jax.lax.while_loop(unsuited, again, search)
        _, count, _, _, low, _, _ = search
        # Where many are equal no threshold leaves some of them: rather too many, to be thinned out, than too few.
        return jax.lax.cond((count < entries) & (low > 0), lambda: (*mark(low), *search[2:]), lambda: search)

    # A loop copies what it reads, here the vector, so that it is entered only where it is needed.
    search = jax.lax.cond(unsuited(start), find, lambda s: s, start)
    return search[0], search[1], proposed


def _shortfall(count: jax.Array, slope: jax.Array, entries: int) -> jax.Array:
    filled = (count.astype(jnp.float32) + 1.0) / (MARGIN * (entries + 1.0))
    return jnp.maximum(filled, 0.01) ** slope


def encode(
    chosen: Chosen, bases: Bases, finite: jax.Array, rung: PayloadFormat, layout: Layout
) -> tuple[jax.Array, Contents]:
    """Encode what is to be sent.

    Args:
      chosen: of `choose`.
      bases: what values are coded against.
      finite: bool[], whether the vector was.
      rung: of the payload; it holds all that is used of the chosen buffers, which may be longer.
      layout: the segments.

    Returns:
      uint32[rung.words]; the contents as `decode` will see them, in buffers as long as the chosen.
    """
    capacities = (chosen.key.indices.size, chosen.sparse.indices.size)
    chosen = chosen._replace(
        key=resize(chosen.key, rung.key_capacity, layout.total),
        sparse=resize(chosen.sparse, rung.sparse_capacity, layout.total),
    )
    level = bases.level[segment_of(chosen.sparse.indices, layout)]
    used = chosen.sparse.indices < layout.total
    scale = replicated(_least_squares)(jnp.abs(chosen.sparse.values), jnp.where(used, level, 0.0))
    header = Header(finite, chosen.candidates, chosen.trim, chosen.key_scale, scale)
    contents = Contents(header, chosen.key, chosen.sparse)
    words, contents = rung.encode(contents, _entry_bases(contents, bases, layout))
    return words, _resized(contents, capacities, layout)


def _least_squares(magnitude: jax.Array, level: jax.Array) -> jax.Array:
    """Find the factor on the levels that leaves the least squared error."""
    unit = level / jnp.max(level, initial=1e-37)  # so that squares of tiny or huge gradients stay in range
    power = jnp.sum(level * unit)
    return jnp.where(power > 0, jnp.clip(jnp.sum(magnitude * unit) / power, 1e-30, 1e29), 1.0)


def decode(words: jax.Array, bases: Bases, rung: PayloadFormat, shape: PayloadFormat, layout: Layout) -> Contents:
    """Decode one device's payload.

    Args:
      words: uint32[rung.words], any.
      bases: what values are coded against.
      rung: of the payload.
      shape: of the largest payload, whose capacities the buffers get.
      layout: the segments.

    Returns:
      Contents.
    """
    key, sparse = rung.indices(words)
    contents = Contents(rung.header(words), key, sparse)
    contents = rung.decode(words, _entry_bases(contents, bases, layout))
    return _resized(contents, (shape.key_capacity, shape.sparse_capacity), layout)


def _resized(contents: Contents, capacities: tuple[int, int], layout: Layout) -> Contents:
    key, sparse = (resize(buffer, k, layout.total) for buffer, k in zip(contents[1:], capacities, strict=True))
    return contents._replace(key=key, sparse=sparse)


def _entry_bases(contents: Contents, bases: Bases, layout: Layout) -> tuple[jax.Array, jax.Array]:
    """Look up what each entry's value is coded against."""
    header = contents.header
    pairs = (
        (contents.key, bases.key * header.key_scale),
        (contents.sparse, bases.level * header.level_scale),
    )
    key, sparse = (stored(jnp.clip(base, 0.0, 1e36))[segment_of(buffer.indices, layout)] for buffer, base in pairs)
    return key, sparse
