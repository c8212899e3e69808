"""Words of 32 bits: masks, ranks, selection and fixed-width packing, all by whole words and without a sort.

Rank and select over popcounts: Jacobson, "Space-efficient static trees and graphs" (FOCS 1989); Vigna, "Broadword
implementation of rank/select queries" (WEA 2008).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from gradpart_jax.prefix_sums import prefix_sum
from gradpart_jax.stored import stored
from gradpart_jax.varying import alike

WORD = 32
BLOCK = 8  # words between two ranks that `select` stores
THINNINGS = 16  # binary digits of the share of bits that `thin` keeps


def bitmask(flags: jax.Array) -> jax.Array:
    """Pack flags into words, the first flag in the lowest bit.

    Args:
      flags: bool[n], n a multiple of 32.

    Returns:
      uint32[n / 32].

    Raises:
      ValueError: n is not a multiple of 32.

    >>> import jax.numpy as jnp
    >>> int(bitmask(jnp.arange(32) < 3)[0])
    7
    """
    if flags.shape[-1] % WORD:
        raise ValueError(f"flags has {flags.shape[-1]} elements, not a multiple of {WORD}: pad it with False")
    powers = jnp.uint32(1) << jnp.arange(WORD, dtype=jnp.uint32)
    return jnp.sum(jnp.where(flags.reshape(-1, WORD), powers[None, :], jnp.uint32(0)), axis=1, dtype=jnp.uint32)


def popcount(words: jax.Array) -> jax.Array:
    """Count the set bits of each word.

    Args:
      words: uint32[...].

    Returns:
      int32[...].
    """
    return jax.lax.population_count(words).astype(jnp.int32)


def prefix(words: jax.Array) -> jax.Array:
    """Count the set bits before each word.

    Args:
      words: uint32[w].

    Returns:
      int32[w], exclusive prefix sum of popcounts.
    """
    counts = popcount(words)
    return prefix_sum(counts) - counts


def nth_bit(words: jax.Array, n: jax.Array) -> jax.Array:
    """Find the place of the n-th set bit in each word, by five halvings.

    Args:
      words: uint32[...].
      n: int32[...], from 0; where a word has no more than n set bits the result is of no use, but in 0..31.

    Returns:
      int32[...] in 0..31.
    """
    place = jnp.zeros_like(n)
    for half in (16, 8, 4, 2, 1):
        low = (words >> place.astype(jnp.uint32)) & jnp.uint32((1 << half) - 1)
        count = popcount(low)
        beyond = n >= count
        n = jnp.where(beyond, n - count, n)
        place = jnp.where(beyond, place + half, place)
    return place


def select(words: jax.Array, capacity: int) -> tuple[jax.Array, jax.Array]:
    """List the positions of the first set bits.

    A slot's block of words is the number of blocks that end at or before it: ends are counted by slot and summed up.
    The word within the block is found by comparing ranks, the bit within the word by halving.

    Args:
      words: uint32[w].
      capacity: how many positions at most.

    Returns:
      int32[capacity], ascending, padded with 32 w; int32[], how many bits are set in all, capped or not.

    >>> import jax.numpy as jnp
    >>> positions, count = select(jnp.array([0b101, 0b10], jnp.uint32), capacity=4)
    >>> positions.tolist(), int(count)
    ([0, 2, 33, 64], 3)
    """
    size = words.shape[0] * WORD
    if words.shape[0] == 0 or capacity == 0:
        return jnp.full(capacity, size, jnp.int32), jnp.sum(popcount(words))
    blocks = jnp.pad(words, (0, -words.shape[0] % BLOCK))
    counts = jnp.sum(popcount(blocks.reshape(-1, BLOCK)), axis=1)
    ends = stored(prefix_sum(counts))
    block = prefix_sum(jnp.zeros(capacity, jnp.int32).at[ends].add(1, mode="drop", indices_are_sorted=True))
    block = stored(jnp.minimum(block, counts.shape[0] - 1))
    slot = jnp.arange(capacity, dtype=jnp.int32)
    rank = slot - (ends - counts)[block]
    place, word, before, seen = block * BLOCK, blocks[block * BLOCK], jnp.zeros_like(slot), jnp.zeros_like(slot)
    for i in range(1, BLOCK):
        seen += popcount(blocks[block * BLOCK + i - 1])
        beyond = rank >= seen
        place += beyond
        word = jnp.where(beyond, blocks[block * BLOCK + i], word)
        before = jnp.where(beyond, seen, before)
    place = stored(place) * WORD + nth_bit(stored(word), stored(rank - before))
    return stored(jnp.where(slot < ends[-1], place, size)), ends[-1]


def keep(words: jax.Array, capacity: int | jax.Array, turn: jax.Array) -> jax.Array:
    """Clear surplus bits, so that no position is starved.

    Where more than `capacity` bits are set, a cyclic run of set bits is cleared whose start moves with `turn`.

    Args:
      words: uint32[w].
      capacity: how many set bits may stay.
      turn: int32[], a step counter.

    Returns:
      uint32[w] with min(count, capacity) set bits.
    """
    if words.shape[0] == 0:
        return words
    count, turn = jnp.sum(popcount(words)), alike(turn, words)

    def drop(words: jax.Array) -> jax.Array:
        before = prefix(words)
        # Multiples of the golden ratio: successive turns start far apart, and no start is far from any.
        fraction = (turn.astype(jnp.uint32) * jnp.uint32(0x9E3779B1) >> 8).astype(jnp.float32) * 2.0**-24
        start = jnp.minimum((fraction * count.astype(jnp.float32)).astype(jnp.int32), count - 1)
        end = start + count - capacity
        wrapped = end - count
        straight = lowest(words, start - before) | (words & ~lowest(words, end - before))
        cyclic = lowest(words, start - before) & ~lowest(words, wrapped - before)
        return jnp.where(wrapped > 0, cyclic, straight)

    return jax.lax.cond(count > capacity, drop, lambda w: w, words)


def scramble(size: int, turn: jax.Array, width: int = WORD) -> jax.Array:
    """Draw a number for each place, other ones in each turn.

    Args:
      size: n, at most 2^width.
      turn: int32[], a step counter.
      width: bits of a number, 17 to 32.

    Returns:
      uint32[n], below 2^width, all different.
    """
    most = jnp.uint32(2**width - 1)
    x = jax.lax.iota(jnp.uint32, size) * jnp.uint32(0x9E3779B1) + turn.astype(jnp.uint32) & most
    for shift, factor in ((16, 0x21F0AAAD), (15, 0x735A2D97), (15, 1)):  # a bijective mixer of as many bits
        x = (x ^ (x >> shift)) * jnp.uint32(factor) & most
    return x


def thin(words: jax.Array, capacity: int, turn: jax.Array) -> jax.Array:
    """Keep a random sample of the set bits, about as many as fit, where more are set.

    A sample that favours no position stands for all: what is learnt from it is true of what was left out, and nothing
    is starved. Each bit stays with probability 0.9 capacity / count, to a precision of 2^-16.

    Args:
      words: uint32[w].
      capacity: how many set bits should stay; `keep` makes sure.
      turn: int32[], a step counter.

    Returns:
      uint32[w].
    """
    count, turn = jnp.sum(popcount(words)), alike(turn, words)

    def sample(words: jax.Array) -> jax.Array:
        rate = jnp.maximum(0.9 * capacity / count.astype(jnp.float32) * 2.0**THINNINGS, 1.0).astype(jnp.uint32)

        def halve(i: jax.Array, mask: jax.Array) -> jax.Array:
            # From the rate's lowest digit on: a one brings the share of set bits half-way to 1, a zero to 0.
            drawn = scramble(words.shape[0], turn * THINNINGS + i)
            digit = rate >> jnp.asarray(i, jnp.uint32) & 1  # under jax.disable_jit() i is an int
            return jnp.where(digit, mask | drawn, mask & drawn)

        return words & jax.lax.fori_loop(0, THINNINGS, halve, jnp.zeros_like(words))

    return jax.lax.cond(count > capacity, sample, lambda w: w, words)


def lowest(words: jax.Array, n: jax.Array) -> jax.Array:
    """Keep the n lowest set bits of each word.

    Args:
      words: uint32[...].
      n: int32[...]; at most 0 keeps none, at least the word's popcount keeps all.

    Returns:
      uint32[...].
    """
    below = (jnp.uint32(1) << nth_bit(words, jnp.maximum(n, 0)).astype(jnp.uint32)) - 1
    return jnp.where(n <= 0, jnp.uint32(0), jnp.where(n >= popcount(words), words, words & below))


def pack(codes: jax.Array, width: int) -> jax.Array:
    """Pack codes of a fixed width, one after the other from the lowest bit on.

    Args:
      codes: uint32[k], each below 2^width.
      width: bits of a code, 1 to 32.

    Returns:
      uint32[ceil(k width / 32)].

    >>> import jax.numpy as jnp
    >>> int(pack(jnp.array([1, 2, 3], jnp.uint32), width=4)[0]) == 0x321
    True
    """
    _check_width(width)
    if WORD % width == 0:
        return pack_apart(codes, width)
    size = codes.shape[0]
    # Thirty-two codes make `width` whole words; a word gathers the few codes that reach into it. One gather compiles
    # to one small kernel, where 32 slices with static shifts would compile to as many large ones.
    word = jnp.arange(-(-size * width // WORD), dtype=jnp.int32)[:, None]
    group, bit = word // width, WORD * (word % width)
    code = bit // width + jnp.arange((WORD - 2) // width + 2, dtype=jnp.int32)[None, :]
    at = code * width - bit
    reaches = (at < WORD) & (code < WORD)
    values = codes.at[jnp.where(reaches, group * WORD + code, size)].get(mode="fill", fill_value=0)
    right = (values >> jnp.clip(-at, 0, 31).astype(jnp.uint32)) << jnp.clip(at, 0, 31).astype(jnp.uint32)
    return jnp.sum(right, axis=1, dtype=jnp.uint32)


def unpack(words: jax.Array, size: int, width: int) -> jax.Array:
    """Unpack codes of a fixed width: the inverse of `pack`.

    Args:
      words: uint32[ceil(size width / 32)].
      size: how many codes.
      width: bits of a code, 1 to 32.

    Returns:
      uint32[size].
    """
    _check_width(width)
    if WORD % width == 0:
        return unpack_apart(words, size, width)
    index = jnp.arange(size, dtype=jnp.int32)
    bit = index % WORD * width
    at, shift = index // WORD * width + bit // WORD, (bit % WORD).astype(jnp.uint32)
    following = words.at[at + 1].get(mode="fill", fill_value=0)
    following = jnp.where(shift > 0, following << (WORD - jnp.maximum(shift, 1)), jnp.uint32(0))
    return (words[at] >> shift | following) & jnp.uint32((1 << width) - 1)


def pack_apart(codes: jax.Array, width: int) -> jax.Array:
    """Pack codes of a fixed width so that none lies in two words: such words can be added up, as long as codes fit.

    A sum of words does not carry into the next word, so that of `pack` only widths that divide 32 bear adding up.

    Args:
      codes: uint32[k], each below 2^width.
      width: bits of a code, 1 to 32.

    Returns:
      uint32[ceil(k / floor(32 / width))].

    >>> import jax.numpy as jnp
    >>> (3 * pack_apart(jnp.full(6, 9, jnp.uint32), width=5)).tolist() == pack_apart(
    ...     jnp.full(6, 27, jnp.uint32), width=5).tolist()
    True
    """
    _check_width(width)
    each = WORD // width
    shifts = jnp.arange(each, dtype=jnp.uint32) * width
    return jnp.sum(
        jnp.pad(codes, (0, -codes.size % each)).reshape(-1, each) << shifts[None, :], axis=1, dtype=jnp.uint32
    )


def unpack_apart(words: jax.Array, size: int, width: int) -> jax.Array:
    """Unpack codes of a fixed width: the inverse of `pack_apart`.

    Args:
      words: uint32[ceil(size / floor(32 / width))].
      size: how many codes.
      width: bits of a code, 1 to 32.

    Returns:
      uint32[size].
    """
    _check_width(width)
    shifts = jnp.arange(WORD // width, dtype=jnp.uint32) * width
    return ((words[:, None] >> shifts[None, :]) & jnp.uint32((1 << width) - 1)).reshape(-1)[:size]


def words_apart(size: int, width: int) -> int:
    """Say how many words `pack_apart` makes of so many codes.

    >>> words_apart(100, 9), words_apart(100, 8)
    (34, 25)
    """
    return -(-size // (WORD // width))


def _check_width(width: int) -> None:
    if not 1 <= width <= WORD:
        raise ValueError(f"width={width} is out of range: codes have 1 to {WORD} bits")
