"""Leaves as matrices, for methods that see rows and columns."""

from __future__ import annotations

import math

import jax

from gradpart_jax.segments import Layout


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """Split a leaf's axes into rows and columns.

    Of all ways to split them, the one with the fewest rows plus columns: for the kernel of a convolution, height, width
    and inputs are rows, outputs columns.

    Args:
      shape: of a leaf.

    Returns:
      Rows and columns; a leaf of fewer than two axes is one column.

    >>> matrix_shape((3, 3, 64, 128)), matrix_shape((10,)), matrix_shape(())
    ((576, 128), (10, 1), (1, 1))
    """
    if len(shape) < 2:
        return math.prod(shape), 1
    splits = [(math.prod(shape[:i]), math.prod(shape[i:])) for i in range(1, len(shape))]
    return min(splits, key=sum)


def matrix(vector: jax.Array, segment: int, layout: Layout) -> jax.Array:
    """Cut one segment out as a matrix.

    Args:
      vector: float32[n].
      segment: its number.
      layout: the segments.

    Returns:
      float32[rows, columns].
    """
    start, size = layout.starts[segment], layout.sizes[segment]
    return jax.lax.slice(vector, (start,), (start + size,)).reshape(matrix_shape(layout.shapes[segment]))
