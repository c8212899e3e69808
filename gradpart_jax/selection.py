"""From candidates to a payload and back: trim to what fits, encode, decode."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from gradpart_jax.buffers import Buffer, compact, largest, rank_score, resize
from gradpart_jax.candidates import Candidates, find
from gradpart_jax.codecs import LARGEST_VALUE
from gradpart_jax.outlook import MARGIN, Outcome, Outlook, means
from gradpart_jax.payload import Bases, Contents, Header, PayloadFormat
from gradpart_jax.replicated import replicated
from gradpart_jax.scheme import Report
from gradpart_jax.segments import Segmented, segment_of
from gradpart_jax.stored import stored


class Chosen(NamedTuple):
    """This device's selection, before its values are coded."""

    key: Buffer
    sparse: Buffer
    candidates: jax.Array  # int32[]
    trim: jax.Array  # float32[]
    key_scale: jax.Array  # float32[]


def choose(
    vector: jax.Array, outlook: Outlook, turn: jax.Array, shape: PayloadFormat, layout: Segmented, spare: int = 0
) -> tuple[Chosen, jax.Array]:
    """Read the vector once, gather what lies above the thresholds, trim it to what the payload holds.

    Args:
      vector: float32[n].
      outlook: as in `candidates.find`.
      turn: int32[], a step counter.
      shape: of the payload.
      layout: the segments, of the whole vector or of a share.
      spare: as in `candidates.find`.

    Returns:
      What is to be sent; bool[], whether the vector is finite.
    """
    candidates, finite = find(vector, outlook, turn, shape.entries, layout, spare)
    return trim(candidates, outlook, turn, shape, layout), finite


def trim(candidates: Candidates, outlook: Outlook, turn: jax.Array, shape: PayloadFormat, layout: Segmented) -> Chosen:
    """Keep of the candidates what the payload holds, and part it into the regions.

    Args:
      candidates: of `candidates.find`.
      outlook: what they were found by.
      turn: int32[], a step counter.
      shape: of the payload.
      layout: the segments, of the whole vector or of a share.

    Returns:
      What is to be sent.
    """
    positions, values, found, marked, proposed = candidates
    entries, room = shape.entries, positions.shape[0]
    segment = segment_of(positions, layout)
    score = jnp.abs(values) / outlook.regions.sparse[segment]
    filled = jnp.arange(room, dtype=jnp.int32) < found
    flagged, cut = largest(score, filled, entries, turn)
    # A sample's exact threshold is that of the same share of it.
    rank = jnp.maximum(entries * (found.astype(jnp.float32) / marked), 1.0).astype(jnp.int32)
    cut = jax.lax.cond(marked > room, lambda: rank_score(score, filled, rank), lambda: cut)
    used = jnp.minimum(found, entries)
    # Both regions are filled alike, so that a few entries fit into a small payload.
    share = jnp.ceil(used * (shape.key_capacity / entries)).astype(jnp.int32)
    share = jnp.where(used < entries, jnp.minimum(share, shape.key_capacity), shape.key_capacity)
    is_key, key_scale = largest(jnp.abs(values) / outlook.regions.key[segment], flagged, share, turn)
    # Who sends nothing knows nothing of the threshold, and has a voice in the mean over devices all the same.
    key_scale = jnp.where(share > 0, key_scale, 1.0)
    key = compact(positions, values, is_key, shape.key_capacity, layout.total)
    sparse = compact(positions, values, flagged & ~is_key, shape.sparse_capacity, layout.total)
    # A payload that is not full says nothing of the exact threshold but that it is lower: by about what is missing.
    short = replicated(_shortfall)(used, outlook.slope, entries=entries)
    cut = jnp.where(used < entries, short, cut)
    factors = [jnp.clip(factor, 1e-30, 1e29) for factor in (cut, key_scale)]
    return Chosen(key, sparse, proposed, *factors)


def _shortfall(count: jax.Array, slope: jax.Array, entries: int) -> jax.Array:
    filled = (count.astype(jnp.float32) + 1.0) / (MARGIN * (entries + 1.0))
    return jnp.maximum(filled, 0.01) ** slope


def encode(
    chosen: Chosen, bases: Bases, finite: jax.Array, rung: PayloadFormat, layout: Segmented
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


def report_of(
    headers: Header, outlook: Outlook, realised: jax.Array, capacity: int, parts: int = 1
) -> tuple[Report, Outcome]:
    """Sum up what the payloads' headers tell all devices.

    Args:
      headers: of [P] payloads, the same on every device.
      outlook: thresholds.
      realised: float32[S], entries that were sent.
      capacity: entries that a device could send.
      parts: into which these were divided.

    Returns:
      Report, and how good the forecast was.
    """
    regions = outlook.regions
    fullness = jnp.maximum(headers.candidates, 1).astype(jnp.float32) / (capacity // parts)
    # Candidates are those above thresholds that were lowered to have MARGIN times as many
    above = jnp.floor(headers.candidates.astype(jnp.float32) / MARGIN)
    (cut, key_cut, _), (log_trim, _, surplus) = replicated(means)(headers.trim, headers.key_scale, fullness)
    report = Report(
        sent=jnp.sum(realised),
        capacity=jnp.int32(capacity),
        overflow=parts * jnp.mean(jnp.maximum(above - capacity // parts, 0.0)),
        # The factor that fits one segment, all at once 1e30 times as large, may be beyond all numbers for another
        threshold=jnp.minimum(jnp.stack([regions.sparse * cut, regions.key * key_cut], axis=-1), LARGEST_VALUE),
        asked=regions.asked,
        realised=realised,
        segment_entropy=outlook.entropy,
        forecast_error=log_trim,
    )
    return report, Outcome(log_trim, surplus)


def _least_squares(magnitude: jax.Array, level: jax.Array) -> jax.Array:
    """Find the factor on the levels that leaves the least squared error."""
    unit = level / jnp.max(level, initial=1e-37)  # so that squares of tiny or huge gradients stay in range
    power = jnp.sum(level * unit)
    return jnp.where(power > 0, jnp.clip(jnp.sum(magnitude * unit) / power, 1e-30, 1e29), 1.0)


def decode(words: jax.Array, bases: Bases, rung: PayloadFormat, shape: PayloadFormat, layout: Segmented) -> Contents:
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
    contents = rung.positions(words)
    contents = rung.decode(words, contents, _entry_bases(contents, bases, layout))
    return _resized(contents, (shape.key_capacity, shape.sparse_capacity), layout)


def _resized(contents: Contents, capacities: tuple[int, int], layout: Segmented) -> Contents:
    key, sparse = (resize(buffer, k, layout.total) for buffer, k in zip(contents[1:], capacities, strict=True))
    return contents._replace(key=key, sparse=sparse)


def _entry_bases(contents: Contents, bases: Bases, layout: Segmented) -> tuple[jax.Array, jax.Array]:
    """Look up what each entry's value is coded against."""
    header = contents.header
    pairs = (
        (contents.key, bases.key * header.key_scale),
        (contents.sparse, bases.level * header.level_scale),
    )
    key, sparse = (stored(jnp.clip(base, 0.0, 1e36))[segment_of(buffer.indices, layout)] for buffer, base in pairs)
    return key, sparse
