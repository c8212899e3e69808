"""One flat float32 vector for a pytree: every leaf is a segment, aligned to whole words of 32 elements."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from gradpart_jax.prefix_sums import prefix_sum
from gradpart_jax.stored import stored

ALIGNMENT = 32
LARGEST = 2**31 - ALIGNMENT
COMPARED = 32  # segments up to which each position is compared with all of their beginnings


@dataclasses.dataclass(frozen=True)
class Layout:
    """Say where each leaf of a tree lies in the flat vector; static, hashable.

    Attributes:
      sizes: elements of each leaf, in tree order (0 for an empty leaf).
      starts: first position of each segment, a multiple of 32.
      total: length of the flat vector, padding included, a multiple of 32.
      elements: elements of the tree, padding not included.
      shapes: shape of each leaf.
    """

    sizes: tuple[int, ...]
    starts: tuple[int, ...]
    total: int
    elements: int
    shapes: tuple[tuple[int, ...], ...] = dataclasses.field(repr=False)

    @property
    def segments(self) -> int:
        """Number of leaves."""
        return len(self.sizes)


class Segmented(Protocol):
    """What a Layout and a part of one have in common: segments, one after the other."""

    @property
    def sizes(self) -> tuple[int, ...]:
        """Elements of each segment, of which empty ones are told."""

    @property
    def starts(self) -> tuple[int, ...] | jax.Array:
        """First position of each segment."""

    @property
    def total(self) -> int:
        """Length of the vector, a multiple of 32."""


def layout_of(tree: Any) -> Layout:
    """Lay a tree's leaves out, one after the other, each at a multiple of 32.

    Args:
      tree: a pytree of arrays (or anything with a shape).

    Returns:
      Its Layout.

    Raises:
      ValueError: the flat vector would not be addressable by int32 indices.

    >>> import jax.numpy as jnp
    >>> layout_of({"b": jnp.zeros(3), "w": jnp.zeros((5, 8))})
    Layout(sizes=(3, 40), starts=(0, 32), total=96, elements=43)
    """
    shapes = tuple(jnp.shape(leaf) for leaf in jax.tree.leaves(tree))
    sizes = tuple(math.prod(shape) for shape in shapes)
    ends = np.cumsum([0, *(-(-size // ALIGNMENT) * ALIGNMENT for size in sizes)], dtype=np.int64)
    if ends[-1] > LARGEST:
        raise ValueError(
            f"the tree has {sum(sizes)} elements, more than the {LARGEST} that int32 indices address: "
            "compress parts of it separately with optax.multi_transform"
        )
    return Layout(sizes, tuple(int(e) for e in ends[:-1]), int(ends[-1]), sum(sizes), shapes)


def ravel(tree: Any, layout: Layout) -> jax.Array:
    """Flatten a tree into one float32 vector, zeros between the segments.

    Args:
      tree: pytree of real arrays with the layout's leaf sizes.
      layout: of `layout_of`.

    Returns:
      float32[layout.total].
    """
    parts = []
    for leaf, size in zip(jax.tree.leaves(tree), layout.sizes, strict=True):
        if size:
            parts.append(jnp.asarray(leaf).astype(jnp.float32).reshape(-1))
    return _aligned(parts) if parts else jnp.zeros(0, jnp.float32)


def add_tree(
    tree: Any, vector: jax.Array, layout: Layout, add: Callable[[jax.Array, jax.Array], jax.Array] = jnp.add
) -> jax.Array:
    """Add a tree to a flat vector: `ravel(tree, layout) + vector`, with one array made instead of two.

    Args:
      tree: pytree of real arrays with the layout's leaf sizes.
      vector: float32[layout.total], zeros between the segments.
      layout: of `layout_of`.
      add: what stands for the sum of two elements; of zeros it is zero.

    Returns:
      float32[layout.total].
    """
    parts = [jnp.asarray(leaf).astype(jnp.float32).reshape(-1) for leaf in jax.tree.leaves(tree)]
    if len(parts) == 1 and layout.total == layout.elements:
        return add(parts[0], vector)
    # Zeros that no compiler knows for such, from a loop of no rounds: all threads meet their fresh pages, where known
    # ones would be folded into the first update, which is one thread's.
    rounds = jnp.min(jax.lax.bitcast_convert_type(vector[:ALIGNMENT], jnp.uint32) | 1) == 0
    total = jax.lax.fori_loop(0, rounds.astype(jnp.int32), lambda _, x: -x, jnp.zeros_like(vector))
    for part, start, size in zip(parts, layout.starts, layout.sizes, strict=True):
        if size:
            before = jax.lax.slice(vector, (start,), (start + size,))
            total = jax.lax.dynamic_update_slice(total, add(part, before), (start,))
    return total


def _aligned(parts: list[jax.Array]) -> jax.Array:
    return jnp.concatenate([jnp.pad(part, (0, -part.size % ALIGNMENT)) for part in parts])


def unravel(vector: jax.Array, like: Any, layout: Layout) -> Any:
    """Cut a flat vector back into a tree, each leaf in its own shape and dtype.

    Args:
      vector: float32[layout.total].
      like: pytree whose shapes, dtypes and structure the result takes.
      layout: of `layout_of(like)`.

    Returns:
      A pytree like `like`.
    """
    leaves, structure = jax.tree.flatten(like)
    cut = [
        _cast(jax.lax.slice(vector, (start,), (start + size,)).reshape(jnp.shape(leaf)), jnp.result_type(leaf))
        for leaf, start, size in zip(leaves, layout.starts, layout.sizes, strict=True)
    ]
    return jax.tree.unflatten(structure, cut)


def _cast(values: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Cast, to the largest finite value where one is beyond a narrow type: an infinite one would end a training."""
    most = float(jnp.finfo(dtype).max)
    if most < float(jnp.finfo(values.dtype).max):
        values = jnp.clip(values, -most, most)
    return values.astype(dtype)


def tighten(vector: jax.Array, layout: Layout) -> jax.Array:
    """Leave the padding between segments out.

    Args:
      vector: float32[layout.total].
      layout: the segments.

    Returns:
      float32[layout.elements].
    """
    if layout.elements == layout.total:
        return vector
    spans = zip(layout.starts, layout.sizes, strict=True)
    return jnp.concatenate([vector[start : start + size] for start, size in spans])


def loosen(vector: jax.Array, layout: Layout) -> jax.Array:
    """Put the padding back, as zeros: the inverse of `tighten`.

    Args:
      vector: float32[layout.elements].
      layout: the segments.

    Returns:
      float32[layout.total].
    """
    if layout.elements == layout.total:
        return vector
    ends = np.cumsum(layout.sizes)
    return _aligned([vector[end - size : end] for end, size in zip(ends, layout.sizes, strict=True)])


def spread(values: jax.Array, layout: Segmented) -> jax.Array:
    """Repeat one value a segment for each of the segment's words.

    Args:
      values: [S].
      layout: the segments.

    Returns:
      [layout.total / 32], the segment's value at each of its words.
    """
    if not isinstance(layout, Layout):
        return values[segment_of(jnp.arange(layout.total // ALIGNMENT, dtype=jnp.int32) * ALIGNMENT, layout)]
    # Broadcasts side by side compile to plain fills; jnp.repeat would cost a scatter and a prefix sum each step.
    parts = [jnp.broadcast_to(values[s], (-(-size // ALIGNMENT),)) for s, size in enumerate(layout.sizes) if size]
    return jnp.concatenate(parts) if parts else values[:0]


def segment_of(indices: jax.Array, layout: Segmented) -> jax.Array:
    """Find the segment that each position belongs to.

    Args:
      indices: int32[C], ascending positions in the flat vector; the sentinel `layout.total` falls to the last segment.
      layout: the segments.

    Returns:
      int32[C] in [0, S).
    """
    filled = [s for s, size in enumerate(layout.sizes) if size]
    if len(filled) < 2:
        return jnp.full(indices.shape, filled[0] if filled else 0, jnp.int32)
    if len(filled) <= COMPARED:
        steps = itertools.pairwise(filled)
        passed = [jnp.where(indices >= layout.starts[s], s - before, 0) for before, s in steps]
        return stored(sum(passed, jnp.int32(filled[0])))
    # Many segments, and more positions: segments' beginnings are marked among them, and added up from the front.
    starts = jnp.asarray(layout.starts, jnp.int32)[np.asarray(filled[1:])]
    begun = jnp.searchsorted(indices, starts, side="left")
    marked = jnp.zeros(indices.shape, jnp.int32).at[begun].add(jnp.asarray(np.diff(filled), jnp.int32), mode="drop")
    return stored(filled[0] + prefix_sum(marked))


def count_by_segment(indices: jax.Array, layout: Segmented) -> jax.Array:
    """Count the positions that fall into each segment.

    Args:
      indices: int32[C], ascending, padded with `layout.total`.
      layout: the segments.

    Returns:
      int32[S].
    """
    bounds = jnp.append(jnp.asarray(layout.starts, jnp.int32), layout.total)
    return jnp.diff(jnp.searchsorted(indices, bounds, side="left")).astype(jnp.int32)


def sample_positions(layout: Layout, most: int) -> tuple[np.ndarray, np.ndarray]:
    """Choose positions that represent every segment, at build time.

    A golden-ratio jitter inside each stride keeps the sample from falling on the same columns of a matrix.

    Args:
      layout: the segments.
      most: about how many positions in all; each segment gets its share, at least 256 or all it has.

    Returns:
      int32[M] positions, ascending, and int32[M] segments.
    """
    positions, owners = [], []
    for s, (start, size) in enumerate(zip(layout.starts, layout.sizes, strict=True)):
        share = min(size, max(256, round(most * size / max(layout.elements, 1))))
        j = np.arange(share, dtype=np.float64)
        jitter = np.modf(j * 0.6180339887498949)[0] if share < size else 0.0
        positions.append(start + np.floor((j + jitter) * size / max(share, 1)).astype(np.int64))
        owners.append(np.full(share, s))
    if not positions:
        return np.zeros(0, np.int32), np.zeros(0, np.int32)
    return np.concatenate(positions).astype(np.int32), np.concatenate(owners).astype(np.int32)


def segment_names(tree: Any) -> tuple[str, ...]:
    """Name a tree's segments by their paths, in the order of all per-segment statistics.

    Args:
      tree: the parameters (or gradients).

    Returns:
      One name a leaf.

    >>> segment_names({"dense": {"kernel": 1.0, "bias": 0.0}})
    ('dense/bias', 'dense/kernel')
    """
    paths = jax.tree_util.tree_flatten_with_path(tree)[0]
    return tuple(jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in paths)
