"""Plain sparse payloads, and their exchange: positions by the shorter code, values as they are.

    header (2 words) | positions | float32 values

What every sparse baseline sends, so that they differ in what they select and in nothing else. A payload is data from
outside: whatever its words, decoding gives in-range positions and finite values.
"""

from __future__ import annotations

import dataclasses
from functools import cached_property

import jax
import jax.numpy as jnp

from gradpart_jax import accounting
from gradpart_jax.accounting import WORD_BITS
from gradpart_jax.buffers import Buffer, overwritten, scatter_add
from gradpart_jax.buffers import gather as read
from gradpart_jax.codecs import IndexCodec, index_codec
from gradpart_jax.exchange import AxisName, axis_size, gather, mean
from gradpart_jax.feedback import Sent
from gradpart_jax.payload import most_within
from gradpart_jax.scheme import Reduced, Report, Settle, dense_report
from gradpart_jax.segments import Layout, count_by_segment, segment_of
from gradpart_jax.varying import alike

HEADER_WORDS = 2


@dataclasses.dataclass(frozen=True)
class SparseFormat:
    """Static sizes of a plain payload, and its encoder and decoder.

    Attributes:
      size: length n of the vector whose positions are sent.
      capacity: entries that the payload holds.

    >>> SparseFormat(size=1_000_000, capacity=10_000).bits / 10_000
    40.5696
    """

    size: int
    capacity: int

    @cached_property
    def index(self) -> IndexCodec:
        """The code of the positions."""
        return index_codec(self.size, self.capacity)

    @property
    def words(self) -> int:
        """Length in 32-bit words."""
        return HEADER_WORDS + self.index.words + self.capacity

    @property
    def bits(self) -> int:
        """Length in bits, everything included."""
        return WORD_BITS * self.words

    def encode(self, buffer: Buffer, finite: jax.Array, candidates: jax.Array) -> jax.Array:
        """Encode a selection.

        Args:
          buffer: of this capacity.
          finite: bool[], whether the vector it was made from was finite.
          candidates: int32[], entries that were to be sent, whether they fit or not.

        Returns:
          uint32[words].
        """
        broken = (~finite).astype(jnp.uint32) << 31
        head = jnp.stack([buffer.used.astype(jnp.uint32) | broken, candidates.astype(jnp.uint32)])
        values = jax.lax.bitcast_convert_type(buffer.values, jnp.uint32)
        return jnp.concatenate([head, self.index.encode(buffer.indices, buffer.used), values])

    def summable(self, words: jax.Array) -> jax.Array:
        """Read whether all devices' vectors were finite, and any sum of their values is: bool[] of uint32[W, words]."""
        values = jnp.abs(jax.lax.bitcast_convert_type(words[:, HEADER_WORDS + self.index.words :], jnp.float32))
        most = float(jnp.finfo(jnp.float32).max) / (2 * words.shape[0])  # by half, for a sum may be rounded up
        return jnp.all(self.finite(words)) & jnp.all(values <= most)

    def finite(self, words: jax.Array) -> jax.Array:
        """Read whether the vector was finite: bool[...] of uint32[..., words]."""
        return words[..., 0] >> 31 == 0

    def candidates(self, words: jax.Array) -> jax.Array:
        """Read how many entries were to be sent: int32[...] of uint32[..., words]."""
        return (words[..., 1] & 0x7FFFFFFF).astype(jnp.int32)

    def decode(self, words: jax.Array) -> Buffer:
        """Decode a payload.

        Args:
          words: uint32[words], any.

        Returns:
          Buffer.
        """
        used = jnp.minimum(words[0] & 0x7FFFFFFF, jnp.uint32(self.capacity)).astype(jnp.int32)
        at = HEADER_WORDS + self.index.words
        indices = self.index.decode(words[HEADER_WORDS:at], used)
        values = jax.lax.bitcast_convert_type(words[at:], jnp.float32)
        return Buffer(indices, jnp.where((indices < self.size) & jnp.isfinite(values), values, 0.0), used)


def ratio_within(bits_per_element: float, elements: int, *, value_bits: float = WORD_BITS) -> float:
    """Find the largest ratio of entries whose payload is within a budget.

    Args:
      bits_per_element: budget of payload bits, everything counted.
      elements: n.
      value_bits: of a value; less than 32 for methods that code values shorter.

    Returns:
      The ratio; at least one entry's, at most 1. Leaves so small that their share is rounded up to one entry come on
      top.

    >>> round(ratio_within(0.32, 1_000_000), 4)
    0.0078
    """

    def cost(entries: int) -> float:
        return WORD_BITS * HEADER_WORDS + index_codec(elements, entries).bits + value_bits * entries

    return most_within(cost, bits_per_element * elements, elements) / max(elements, 1)


def share(
    vector: jax.Array,
    buffer: Buffer,
    candidates: jax.Array,
    layout: Layout,
    axis_name: AxisName,
    settle: Settle,
    asked: jax.Array | None = None,
) -> Reduced:
    """Send each device's own selection to all, and average what arrives.

    Args:
      vector: float32[n], what was selected from.
      buffer: the selection.
      candidates: int32[], entries that were to be sent, whether they fit or not.
      layout: the segments.
      axis_name: the mapped axis.
      settle: of the memory.
      asked: float32[S], the same on every device, for the report; None is as many as were sent.

    Returns:
      Reduced. The report's threshold is the least magnitude sent of a segment, mean over the devices that sent any.
    """
    capacity = buffer.indices.shape[0]
    shape = SparseFormat(layout.total, capacity)
    words = shape.encode(buffer, jnp.all(jnp.isfinite(vector)), candidates)
    payloads = gather(words, axis_name)
    finite = shape.summable(payloads)
    memory = settle(Sent(jnp.bool_(False), (buffer,)), finite)

    def receive(
        carry: tuple[jax.Array, jax.Array, jax.Array, jax.Array], words: jax.Array
    ) -> tuple[tuple[jax.Array, jax.Array, jax.Array, jax.Array], None]:
        total, counts, least, senders = carry
        # Else the loops that read the positions would each decode them anew.
        indices, values, _ = jax.lax.optimization_barrier(shape.decode(words))
        total = scatter_add(total, indices, jnp.where(finite, values, 0.0))
        magnitudes = jnp.where(indices < layout.total, jnp.abs(values), jnp.inf)
        lowest = jnp.full(layout.segments, jnp.inf).at[segment_of(indices, layout)].min(magnitudes)
        some = lowest < jnp.inf
        least += jnp.where(some, lowest, 0.0)
        return (total, counts + count_by_segment(indices, layout), least, senders + some), None

    nothing = jnp.zeros(layout.segments, jnp.float32)
    none = nothing.astype(jnp.int32)
    start = alike((overwritten(vector, memory.residual), none, nothing, none), payloads)
    (total, counts, least, senders), _ = jax.lax.scan(receive, start, payloads)
    devices = payloads.shape[0]
    realised = counts.astype(jnp.float32) / devices
    surplus = jnp.maximum(shape.candidates(payloads) - capacity, 0)
    report = dense_report(layout)._replace(
        sent=jnp.sum(counts).astype(jnp.float32) / devices,
        capacity=jnp.int32(capacity),
        overflow=jnp.sum(surplus).astype(jnp.float32) / devices,
        threshold=jnp.stack([least / jnp.maximum(senders, 1)] * 2, axis=-1),
        asked=realised if asked is None else asked,
        realised=realised,
    )
    wire = accounting.gathered(shape.bits, devices)
    return Reduced(total / devices, memory, finite, wire, report)


def share_at(
    vector: jax.Array,
    indices: jax.Array,
    layout: Layout,
    axis_name: AxisName,
    settle: Settle,
    factors: jax.Array | None = None,
) -> Reduced:
    """Average what all devices have at positions that they agree on: an all-reduce of the values alone.

    Args:
      vector: float32[n].
      indices: int32[C], ascending, padded with n; the same on every device. C is at least 1.
      layout: the segments.
      axis_name: the mapped axis.
      settle: of the memory.
      factors: float32[C] that values are sent multiplied by; None for 1.

    Returns:
      Reduced; its wire is that of the values, its report has no thresholds.
    """
    values = read(vector, indices)
    if factors is not None:
        values = values * factors
    # One device's NaNs in the place of its values reach all: no flag need be exchanged.
    average = mean(jnp.where(jnp.all(jnp.isfinite(vector)), values, jnp.nan), axis_name)
    finite = jnp.all(jnp.isfinite(average))
    used = jnp.sum((indices < layout.total).astype(jnp.int32))
    memory = settle(Sent(jnp.bool_(False), (Buffer(indices, values, used),)), finite)
    total = scatter_add(overwritten(vector, memory.residual), indices, jnp.where(finite, average, 0.0))
    wire = accounting.reduced(WORD_BITS * indices.shape[0], axis_size(axis_name))
    return Reduced(total, memory, finite, wire, report_at(indices, layout))


def report_at(indices: jax.Array, layout: Layout) -> Report:
    """Report on positions that all devices agree on.

    Args:
      indices: int32[C], ascending, padded with n.
      layout: the segments.

    Returns:
      A Report with no thresholds.
    """
    realised = count_by_segment(indices, layout).astype(jnp.float32)
    return dense_report(layout)._replace(
        sent=jnp.sum(realised), capacity=jnp.int32(indices.shape[0]), asked=realised, realised=realised
    )
