"""All of what one device sends in a step: one array of words, of static length.

    header (6 words) | key indices | key values | sparse indices | sparse values

A payload is data from outside: whatever its words, decoding gives in-range indices and finite values.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import cached_property
from typing import NamedTuple

import jax
import jax.numpy as jnp

from gradpart_jax.bits import WORD, pack, unpack
from gradpart_jax.buffers import Buffer
from gradpart_jax.codecs import IndexCodec, Magnitudes, index_codec

HEADER_WORDS = 6
LEVEL_RATIO = 2.0**0.5  # between neighbouring magnitude levels, at most: decoded values stay within 2^(1/4)
OCTAVES = 4.0  # that the levels of wider values divide among themselves
LARGEST_BASE = 1e30


class Header(NamedTuple):
    """What a payload says of itself besides its entries."""

    finite: jax.Array  # bool[]: whether the vector it was made from was finite
    candidates: jax.Array  # int32[]: estimate, by a sample of them, of entries over the proposed thresholds
    trim: jax.Array  # float32[]: factor on the forecast's sparse thresholds that filled the payload exactly
    key_scale: jax.Array  # float32[]: factor on the forecast's key thresholds, likewise
    level_scale: jax.Array  # float32[]: factor on the forecast's sparse levels that fits this device's values best


class Contents(NamedTuple):
    """A decoded payload."""

    header: Header
    key: Buffer
    sparse: Buffer


class Bases(NamedTuple):
    """What values are coded against: the same on every device, from the forecast."""

    key: jax.Array  # float32[S]: threshold of the key region
    level: jax.Array  # float32[S]: mean magnitude in the sparse region


@dataclasses.dataclass(frozen=True)
class PayloadFormat:
    """Static sizes of a payload, and its encoder and decoder.

    Attributes:
      size: length n of the vector whose positions are sent.
      key_capacity: entries that the key buffer holds.
      sparse_capacity: entries that the sparse buffer holds.
      key_bits: of a key value, sign included.
      sparse_bits: of a sparse value, sign included; 1 is the sign times the region's level.

    >>> PayloadFormat(size=32_000, key_capacity=100, sparse_capacity=300).words * 32 / 32_000
    0.143
    """

    size: int
    key_capacity: int
    sparse_capacity: int
    key_bits: int = 4
    sparse_bits: int = 1

    @property
    def level_ratio(self) -> float:
        """The factor between neighbouring levels of key values."""
        return float(min(LEVEL_RATIO, 2.0 ** (OCTAVES / 2 ** (self.key_bits - 1))))

    @cached_property
    def _parts(self) -> tuple[tuple[IndexCodec, Magnitudes, int], ...]:
        return tuple(
            (index_codec(self.size, capacity), Magnitudes(bits, self.level_ratio), capacity)
            for capacity, bits in (
                (self.key_capacity, self.key_bits),
                (self.sparse_capacity, self.sparse_bits),
            )
        )

    @cached_property
    def _spans(self) -> tuple[tuple[slice, slice], ...]:
        """Where each region's positions and values lie."""
        start, spans = HEADER_WORDS, []
        for index, values, capacity in self._parts:
            middle = start + index.words
            end = middle + -(-capacity * values.bits // WORD)
            spans.append((slice(start, middle), slice(middle, end)))
            start = end
        return tuple(spans)

    @property
    def entries(self) -> int:
        """How many entries the payload holds."""
        return self.key_capacity + self.sparse_capacity

    def smaller(self, factor: int) -> PayloadFormat:
        """Make the format of a payload with so many times fewer entries, rounded up."""
        key, sparse = (-(-k // factor) for k in (self.key_capacity, self.sparse_capacity))
        return dataclasses.replace(self, key_capacity=key, sparse_capacity=sparse)

    @property
    def words(self) -> int:
        """Length of the payload in 32-bit words."""
        return int(self._spans[-1][1].stop)

    @property
    def bits(self) -> int:
        """Length of the payload in bits, everything included."""
        return WORD * self.words

    def encode(self, contents: Contents, bases: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, Contents]:
        """Encode one device's selection.

        Args:
          contents: header, and buffers of true values.
          bases: float32[C] of each entry of the key and the sparse buffer, what its value is coded against.

        Returns:
          uint32[words], and the contents as `decode` will see them (values quantised).
        """
        header = contents.header
        blocks, decoded = [self.head(header, contents.key.used, contents.sparse.used)], []
        buffers = (contents.key, contents.sparse)
        for (index, values, _), buffer, base in zip(self._parts, buffers, bases, strict=True):
            codes = values.encode(buffer.values, base)
            blocks += [index.encode(buffer.indices, buffer.used), pack(codes, values.bits)]
            kept = jnp.where(buffer.indices < self.size, values.decode(codes, base), 0.0)
            decoded.append(buffer._replace(values=kept))
        return jnp.concatenate(blocks), Contents(header, *decoded)

    def head(self, header: Header, key: jax.Array, sparse: jax.Array) -> jax.Array:
        """Write a header.

        Args:
          header: to write.
          key: int32[], entries used of the key buffer.
          sparse: int32[], entries used of the sparse buffer.

        Returns:
          uint32[HEADER_WORDS].
        """
        broken = (~header.finite).astype(jnp.uint32) << 31
        factors = [jax.lax.bitcast_convert_type(factor, jnp.uint32) for factor in header[2:]]
        counts = [count.astype(jnp.uint32) for count in (key, sparse, header.candidates)]
        return jnp.stack([counts[0] | broken, *counts[1:], *factors])

    def header(self, words: jax.Array) -> Header:
        """Read payloads' headers.

        Args:
          words: uint32[..., words], any.

        Returns:
          Header of [...], its factors finite and positive.
        """

        def factor(bits: jax.Array) -> jax.Array:
            value = jax.lax.bitcast_convert_type(bits, jnp.float32)
            return jnp.where((value > 0) & (value < LARGEST_BASE), value, 1.0)

        return Header(
            finite=words[..., 0] >> 31 == 0,
            candidates=(words[..., 2] & 0x7FFFFFFF).astype(jnp.int32),
            trim=factor(words[..., 3]),
            key_scale=factor(words[..., 4]),
            level_scale=factor(words[..., 5]),
        )

    def positions(self, words: jax.Array) -> Contents:
        """Read what a payload tells before its values can be: by the positions, what these are coded against is found.

        Args:
          words: uint32[words], any.

        Returns:
          Contents with values 0.
        """
        counts, found = (words[0] & 0x7FFFFFFF, words[1]), []
        for (index, _, capacity), (span, _), count in zip(self._parts, self._spans, counts, strict=True):
            used = jnp.minimum(count, jnp.uint32(capacity)).astype(jnp.int32)
            found.append(Buffer(index.decode(words[span], used), jnp.zeros(capacity, jnp.float32), used))
        return Contents(self.header(words), *found)

    def decode(self, words: jax.Array, read: Contents, bases: tuple[jax.Array, jax.Array]) -> Contents:
        """Decode one device's payload.

        Args:
          words: uint32[words], any.
          read: of `positions`.
          bases: float32[C] of each entry, as in `encode`; clipped to finite.

        Returns:
          Contents.
        """
        regions, decoded = zip(self._parts, self._spans, (read.key, read.sparse), bases, strict=True), []
        for (_, values, capacity), (_, span), buffer, base in regions:
            codes = unpack(words[span], capacity, values.bits)
            kept = jnp.where(buffer.indices < self.size, values.decode(codes, base), 0.0)
            decoded.append(buffer._replace(values=kept))
        return Contents(read.header, *decoded)


def fit_format(
    size: int, bits: float, *, key_share: float, key_bits: int, sparse_bits: int, most: int
) -> PayloadFormat:
    """Find the largest payload within a number of bits.

    Args:
      size: length of the vector.
      bits: budget, header and padding included.
      key_share: of the entries, those that the key region holds, 0 to 1.
      key_bits: of a key value.
      sparse_bits: of a sparse value.
      most: entries there may be.

    Returns:
      The format that holds most entries; at least one entry, even where that is over the budget.
    """

    def build(entries: int) -> PayloadFormat:
        key = min(max(round(key_share * entries), 1), entries)
        return PayloadFormat(size, key, entries - key, key_bits, sparse_bits)

    return build(most_within(lambda entries: build(entries).bits, bits, most))


def most_within(cost: Callable[[int], float], budget: float, most: int) -> int:
    """Find the largest number whose cost is within a budget.

    Args:
      cost: of a number from 1 on; it rises with it.
      budget: of the cost.
      most: the largest number there is.

    Returns:
      The number; 1 where even that is over the budget.

    >>> most_within(lambda number: 3.0 * number, 10.0, most=100)
    3
    """
    low, high = 1, max(most, 1)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if cost(middle) <= budget else (low, middle - 1)
    return low
