"""Codes of static size: sorted positions by Elias-Fano or bitmap, values by sign and logarithmic level.

Sources: Elias, "Efficient storage and retrieval by content and address of static files" (J. ACM 1974); Fano, "On the
number of bits required to implement an associative memory" (1971).
"""

from __future__ import annotations

import dataclasses
from typing import TypeAlias

import jax
import jax.numpy as jnp

from gradpart_jax.bits import WORD, pack, select, unpack

LARGEST_SIZE = 2**31 - WORD
LARGEST_VALUE = 3e38
WIDEST_VALUE = 8  # bits of a value, sign included


@dataclasses.dataclass(frozen=True)
class EliasFano:
    """Code `capacity` ascending positions below `size`.

    The l low bits of each are packed; the high parts h_i stand as set bits at h_i + i of a bit vector, whose length is
    static. At l = log2(size / capacity) it is at most 0.56 bit a position over log2 of size choose capacity.

    Attributes:
      size: length n of the vector.
      capacity: positions at most.

    >>> EliasFano(size=1_000_000, capacity=10_000).bits / 10_000
    8.5632
    """

    size: int
    capacity: int

    def __post_init__(self) -> None:
        """Check the sizes."""
        _check_sizes(self.size, self.capacity)

    @property
    def low(self) -> int:
        """Bits of a position's low part, the number that makes the code shortest."""
        return min(range(32), key=self._words) if self.capacity else 0

    def _high_words(self, low: int) -> int:
        return -(-(self.capacity + (max(self.size - 1, 0) >> low)) // WORD)

    def _words(self, low: int) -> int:
        return self._high_words(low) + -(-self.capacity * low // WORD)

    @property
    def words(self) -> int:
        """Length in 32-bit words."""
        return self._words(self.low) if self.capacity and self.size else 0

    @property
    def bits(self) -> int:
        """Length in bits."""
        return WORD * self.words

    def encode(self, indices: jax.Array, count: jax.Array) -> jax.Array:
        """Encode positions.

        Args:
          indices: int32[capacity], ascending and different, below `size` up to count.
          count: int32[].

        Returns:
          uint32[words].
        """
        if not self.words:
            return jnp.zeros(0, jnp.uint32)
        slot = jnp.arange(self.capacity, dtype=jnp.int32)
        used = slot < count
        at = (indices >> self.low) + slot
        bit = jnp.where(used, jnp.uint32(1) << (at & 31).astype(jnp.uint32), jnp.uint32(0))
        length = self._high_words(self.low)
        high = jnp.zeros(length, jnp.uint32).at[jnp.where(used, at >> 5, length)].add(bit, mode="drop")
        if not self.low:
            return high
        low = jnp.where(used, indices.astype(jnp.uint32) & jnp.uint32((1 << self.low) - 1), jnp.uint32(0))
        return jnp.concatenate([high, pack(low, self.low)])

    def decode(self, words: jax.Array, count: jax.Array) -> jax.Array:
        """Decode positions.

        Args:
          words: uint32[words], any.
          count: int32[], any.

        Returns:
          int32[capacity] in 0..size: `size` from count on, and where the words are not a code.
        """
        if not self.words:
            return jnp.full(self.capacity, self.size, jnp.int32)
        length = self._high_words(self.low)
        places, _ = select(words[:length], self.capacity)
        slot = jnp.arange(self.capacity, dtype=jnp.int32)
        high = (places - slot).astype(jnp.uint32)
        found = high << self.low
        if self.low:
            found = found | unpack(words[length:], self.capacity, self.low)
        valid = (slot < count) & (places < length * WORD) & (high <= (self.size - 1) >> self.low)
        valid &= found < self.size
        return jnp.where(valid, found.astype(jnp.int32), self.size)


@dataclasses.dataclass(frozen=True)
class Bitmap:
    """Code positions below `size` by one bit for each; the shorter code where a quarter or more are sent.

    Attributes:
      size: length n of the vector.
      capacity: positions at most.
    """

    size: int
    capacity: int

    def __post_init__(self) -> None:
        """Check the sizes."""
        _check_sizes(self.size, self.capacity)

    @property
    def words(self) -> int:
        """Length in 32-bit words."""
        return -(-self.size // WORD) if self.capacity else 0

    @property
    def bits(self) -> int:
        """Length in bits."""
        return WORD * self.words

    def encode(self, indices: jax.Array, count: jax.Array) -> jax.Array:
        """Encode positions, as `EliasFano.encode` does."""
        used = jnp.arange(self.capacity, dtype=jnp.int32) < count
        bit = jnp.where(used, jnp.uint32(1) << (indices & 31).astype(jnp.uint32), jnp.uint32(0))
        return jnp.zeros(self.words, jnp.uint32).at[jnp.where(used, indices >> 5, self.words)].add(bit, mode="drop")

    def decode(self, words: jax.Array, count: jax.Array) -> jax.Array:
        """Decode positions, as `EliasFano.decode` does."""
        places, _ = select(words, self.capacity)
        valid = (jnp.arange(self.capacity, dtype=jnp.int32) < count) & (places < self.size)
        return jnp.where(valid, places, self.size)


IndexCodec: TypeAlias = EliasFano | Bitmap


def index_codec(size: int, capacity: int) -> IndexCodec:
    """Choose the shorter code for positions.

    Args:
      size: length n of the vector.
      capacity: positions at most.

    Returns:
      An EliasFano or a Bitmap.

    Raises:
      ValueError: a size is negative, or beyond what int32 indices address.

    >>> index_codec(1000, 10), index_codec(1000, 500)
    (EliasFano(size=1000, capacity=10), Bitmap(size=1000, capacity=500))
    """
    elias_fano, bitmap = EliasFano(size, capacity), Bitmap(size, capacity)
    return bitmap if bitmap.words < elias_fano.words else elias_fano


@dataclasses.dataclass(frozen=True)
class Magnitudes:
    """Code values by sign and logarithmic level against a base.

    Level j stands for magnitudes in [base r^j, base r^(j+1)), decoded to base r^(j+1/2): within a factor sqrt(r) of the
    true one, so that (r at most 4) subtracting it leaves an exact rest, by Sterbenz's lemma. Smaller magnitudes get the
    lowest level, larger ones the highest. One bit is the sign times the base.

    Attributes:
      bits: of a code, sign included, 1 to 8.
      ratio: r, above 1 and at most 4.

    >>> import jax.numpy as jnp
    >>> codec = Magnitudes(bits=3, ratio=4.0)
    >>> codec.decode(codec.encode(jnp.array([-1.0, 5.0]), jnp.ones(2)), jnp.ones(2))
    Array([-2.,  8.], dtype=float32)
    """

    bits: int
    ratio: float

    def __post_init__(self) -> None:
        """Check the arguments."""
        if not 1 <= self.bits <= WIDEST_VALUE:
            raise ValueError(f"bits={self.bits} is out of range: a value has 1 to {WIDEST_VALUE} bits, sign included")
        if not 1.0 < self.ratio <= 4.0:
            raise ValueError(f"ratio={self.ratio} is out of range: levels lie a factor above 1, at most 4, apart")

    @property
    def levels(self) -> int:
        """Number of magnitudes."""
        return 1 << (self.bits - 1)

    def encode(self, values: jax.Array, base: jax.Array) -> jax.Array:
        """Encode values.

        Args:
          values: float32[C], any.
          base: float32[C], finite and non-negative.

        Returns:
          uint32[C] below 2^bits, the sign in the lowest bit.
        """
        bounds = jnp.asarray([self.ratio**j for j in range(1, self.levels)], jnp.float32)
        reached = jnp.abs(values)[:, None] >= base[:, None] * bounds[None, :]
        level = jnp.sum(reached, axis=1, dtype=jnp.uint32)
        return level << 1 | jnp.signbit(values).astype(jnp.uint32)

    def decode(self, codes: jax.Array, base: jax.Array) -> jax.Array:
        """Decode values.

        Args:
          codes: uint32[C], any; bits above the code's width are ignored.
          base: float32[C], finite and non-negative.

        Returns:
          float32[C], finite.
        """
        half = 0.5 if self.levels > 1 else 0.0
        table = jnp.asarray([self.ratio ** (j + half) for j in range(self.levels)], jnp.float32)
        magnitude = jnp.minimum(base * table[(codes >> 1) & (self.levels - 1)], LARGEST_VALUE)
        return jnp.where(codes & 1, -magnitude, magnitude)


def _check_sizes(size: int, capacity: int) -> None:
    if not 0 <= size <= LARGEST_SIZE:
        raise ValueError(f"size={size} is out of range: int32 positions address 0 to {LARGEST_SIZE} elements")
    if capacity < 0:
        raise ValueError(f"capacity={capacity} is negative: give 0 or more")
