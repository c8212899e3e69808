"""DeMo: the largest DCT coefficients of a decaying momentum (Peng, Quesnelle and Kingma, 2024, algorithm 1)."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gradpart_jax import bits
from gradpart_jax.accounting import WORD_BITS, gathered
from gradpart_jax.checks import check_integer
from gradpart_jax.exchange import AxisName, axis_size, gather
from gradpart_jax.matrices import matrix, matrix_shape
from gradpart_jax.reductions import alone
from gradpart_jax.replicated import rounded
from gradpart_jax.scheme import Reduced, Report, Scheme, SchemeState, Settle, dense_report
from gradpart_jax.segments import Layout, loosen
from gradpart_jax.varying import alike

SHORT = 8  # sides of chunks whose transform is written out


class Tiles(NamedTuple):
    """Segments whose matrices are cut into chunks of the same shape."""

    segments: tuple[int, ...]
    grids: tuple[tuple[int, int], ...]  # chunks down and across, of each segment
    height: int
    width: int
    keep: int

    @property
    def chunks(self) -> int:
        """Number of chunks in all."""
        return sum(down * across for down, across in self.grids)

    @property
    def index_bits(self) -> int:
        """Bits of a place in a chunk."""
        return max(1, (self.height * self.width - 1).bit_length())


class Kept(NamedTuple):
    """The largest coefficients of each chunk; received ones have an axis of devices before."""

    places: jax.Array  # int32[chunks, keep]: of a chunk's coefficients, row by row
    values: jax.Array  # float32[chunks, keep]


def demo(keep: int = 32, chunk: int = 64, *, sign: bool = True) -> Scheme:
    """Send the largest coefficients of the discrete cosine transform of each chunk of each matrix.

    A leaf is a matrix (of `matrices.matrix_shape`), cut into chunks of at most chunk x chunk, zeros added at its edges.
    Of a chunk's orthonormal DCT-II the `keep` largest coefficients are sent, and averaged over the devices that sent
    the same one. The update is the inverse transform, or its sign. The paper's momentum is the memory of `compress`,
    m' = decay (m + g - sent): give it memory_decay=0.999, and an optimizer without momentum.

    Args:
      keep: coefficients of each chunk.
      chunk: its greatest height and width, at least 2.
      sign: whether the update is -1, 0 or 1, as in the paper; then the optimizer wants a small learning rate.

    Returns:
      A Scheme that sends keep (32 + 12) bits a chunk of 64 x 64, by an all-gather.

    Raises:
      TypeError: an argument is not an integer.
      ValueError: an argument is out of range.

    >>> import jax.numpy as jnp, gradpart_jax as gp
    >>> tx = gp.compress(gp.baselines.demo(keep=1, sign=False), memory_decay=0.999)
    >>> gradient = jnp.ones((64, 64))
    >>> out, state = tx.update(gradient, tx.init(gradient))
    >>> bool(jnp.allclose(out, gradient, atol=1e-5)), float(gp.stats(state).payload_bits)
    (True, 64.0)
    """
    check_integer("keep", keep, 1, 2**20)
    check_integer("chunk", chunk, 2, 1024)

    def capacity(layout: Layout) -> int:
        return sum(tiles.chunks * tiles.keep for tiles in tiles_of(layout, keep, chunk))

    def reduce(
        vector: jax.Array, state: SchemeState, layout: Layout, axis_name: AxisName, settle: Settle
    ) -> tuple[Reduced, SchemeState]:
        groups = tiles_of(layout, keep, chunk)
        finite = jnp.all(jnp.isfinite(vector))
        own = [_choose(vector, tiles, layout) for tiles in groups]
        parts = [_write(kept, tiles, finite) for kept, tiles in zip(own, groups, strict=True)]
        payloads = gather(jnp.concatenate(parts), axis_name)
        cuts = np.cumsum([0, *[part.size for part in parts]])
        received = [_read(payloads[:, at:end], t) for at, end, t in zip(cuts[:-1], cuts[1:], groups, strict=True)]
        # A device whose vector is not finite sends values that are not.
        known = jnp.all(jnp.stack([jnp.all(jnp.isfinite(kept.values)) for kept in received]))

        def decode(several: list[Kept]) -> jax.Array:
            averages = [_average(kept, known, tiles) for kept, tiles in zip(several, groups, strict=True)]
            return _restore(averages, groups, layout)

        average = decode(received)
        everywhere = known & jnp.all(jnp.isfinite(average))
        average = jnp.where(everywhere, average, 0.0)
        memory = settle(decode([_alone(kept) for kept in own]), everywhere)
        outcome = Reduced(
            mean=jnp.sign(average) if sign else average,
            memory=memory,
            finite=everywhere,
            wire=gathered(WORD_BITS * int(cuts[-1]), axis_size(axis_name)),
            report=_report(groups, layout),
        )
        return outcome, state

    return Scheme("DeMo", lambda layout: SchemeState((), ()), reduce, capacity)


def tiles_of(layout: Layout, keep: int, chunk: int) -> list[Tiles]:
    """Cut every leaf into chunks.

    Args:
      layout: the segments.
      keep: as in `demo`.
      chunk: as in `demo`.

    Returns:
      Tiles, one for each shape of chunk.
    """
    found: dict[tuple[int, int], list[int]] = {}
    for segment, size in enumerate(layout.sizes):
        if size:
            rows, columns = matrix_shape(layout.shapes[segment])
            found.setdefault((min(rows, chunk), min(columns, chunk)), []).append(segment)
    tiles = []
    for (height, width), segments in found.items():
        shapes = [matrix_shape(layout.shapes[s]) for s in segments]
        grids = tuple((-(-rows // height), -(-columns // width)) for rows, columns in shapes)
        tiles.append(Tiles(tuple(segments), grids, height, width, min(keep, height * width)))
    return tiles


def cosines(size: int) -> np.ndarray:
    """Write down the orthonormal DCT-II.

    Args:
      size: n.

    Returns:
      float64[n, n], a frequency a row; its inverse is its transpose.
    """
    frequency, place = np.arange(size)[:, None], np.arange(size)[None, :]
    rows = np.cos(np.pi * (place + 0.5) * frequency / size) * np.sqrt(2.0 / size)
    rows[0] /= np.sqrt(2.0)
    return rows


def _choose(vector: jax.Array, tiles: Tiles, layout: Layout) -> Kept:
    chunks = []
    for segment, (down, across) in zip(tiles.segments, tiles.grids, strict=True):
        leaf = matrix(vector, segment, layout)
        edges = (down * tiles.height - leaf.shape[0], across * tiles.width - leaf.shape[1])
        leaf = jnp.pad(leaf, [(0, more) for more in edges])
        cut = leaf.reshape(down, tiles.height, across, tiles.width).swapaxes(1, 2)
        chunks.append(cut.reshape(-1, tiles.height, tiles.width))
    coefficients = alone(functools.partial(_transform, tiles=tiles), jnp.concatenate(chunks))
    coefficients = coefficients.reshape(tiles.chunks, -1)
    _, places = jax.lax.top_k(jnp.abs(coefficients), tiles.keep)
    return Kept(places.astype(jnp.int32), jnp.take_along_axis(coefficients, places, axis=1))


def _basis(size: int) -> jax.Array:
    return jnp.asarray(cosines(size), jnp.float32)


def _transform(chunks: jax.Array, tiles: Tiles) -> jax.Array:
    return _twice(_basis(tiles.height), chunks, _basis(tiles.width))


def _transform_back(coefficients: jax.Array, tiles: Tiles) -> jax.Array:
    return _twice(_basis(tiles.height).T, coefficients, _basis(tiles.width).T)


def _twice(left: jax.Array, chunks: jax.Array, right: jax.Array) -> jax.Array:
    """Multiply each chunk from both sides: float32[C, H, W]."""
    # A short product, left to the compiler, is contracted with its surroundings in one program and not in another.
    if max(left.shape[0], right.shape[0]) <= SHORT:
        rows = _sum([left[None, :, h, None] * chunks[:, None, h] for h in range(left.shape[1])])
        return _sum([rows[:, :, w, None] * right[None, None, :, w] for w in range(right.shape[1])])
    return jnp.einsum("fh,chw,gw->cfg", left, chunks, right)


def _sum(products: list[jax.Array]) -> jax.Array:
    return functools.reduce(jnp.add, map(rounded, products))


def _alone(kept: Kept) -> Kept:
    return Kept(kept.places[None], kept.values[None])


def _average(kept: Kept, finite: jax.Array, tiles: Tiles) -> jax.Array:
    """Average each coefficient over those who sent it: float32[chunks, height width]."""
    chunk = jnp.arange(tiles.chunks)[:, None]

    def receive(carry: tuple[jax.Array, jax.Array], one: Kept) -> tuple[tuple[jax.Array, jax.Array], None]:
        total, count = carry
        values = jnp.where(finite, one.values, 0.0)
        return (total.at[chunk, one.places].add(values), count.at[chunk, one.places].add(1)), None

    shape = (tiles.chunks, tiles.height * tiles.width)
    start = alike((jnp.zeros(shape, jnp.float32), jnp.zeros(shape, jnp.int32)), kept)
    (total, count), _ = jax.lax.scan(receive, start, kept)
    return total / jnp.maximum(count, 1).astype(jnp.float32)


def _restore(coefficients: list[jax.Array], groups: list[Tiles], layout: Layout) -> jax.Array:
    """Transform back: float32[n]."""
    parts: dict[int, jax.Array] = {}
    for tiles, values in zip(groups, coefficients, strict=True):
        values = values.reshape(-1, tiles.height, tiles.width)
        chunks = alone(functools.partial(_transform_back, tiles=tiles), values)
        at = 0
        for segment, (down, across) in zip(tiles.segments, tiles.grids, strict=True):
            cut = chunks[at : at + down * across].reshape(down, across, tiles.height, tiles.width).swapaxes(1, 2)
            rows, columns = matrix_shape(layout.shapes[segment])
            parts[segment] = cut.reshape(down * tiles.height, -1)[:rows, :columns].reshape(-1)
            at += down * across
    return loosen(jnp.concatenate([parts[s] for s in sorted(parts)]), layout)


def _write(kept: Kept, tiles: Tiles, finite: jax.Array) -> jax.Array:
    values = jax.lax.bitcast_convert_type(jnp.where(finite, kept.values, jnp.nan), jnp.uint32)
    return jnp.concatenate(
        [bits.pack(kept.places.reshape(-1).astype(jnp.uint32), tiles.index_bits), values.reshape(-1)]
    )


def _read(payloads: jax.Array, tiles: Tiles) -> Kept:
    shape = (payloads.shape[0], tiles.chunks, tiles.keep)
    count = tiles.chunks * tiles.keep
    places = jax.vmap(lambda words: bits.unpack(words[:-count], count, tiles.index_bits))(payloads)
    # A payload is data from outside: no place may lie beyond the chunk.
    places = jnp.minimum(places.astype(jnp.int32), tiles.height * tiles.width - 1)
    values = jax.lax.bitcast_convert_type(payloads[:, -count:], jnp.float32)
    return Kept(places.reshape(shape), values.reshape(shape))


def _report(groups: list[Tiles], layout: Layout) -> Report:
    counts = np.zeros(layout.segments, np.float32)
    for tiles in groups:
        for segment, (down, across) in zip(tiles.segments, tiles.grids, strict=True):
            counts[segment] = down * across * tiles.keep
    sent = jnp.asarray(counts)
    total = int(counts.sum())
    return dense_report(layout)._replace(sent=jnp.float32(total), capacity=jnp.int32(total), asked=sent, realised=sent)
