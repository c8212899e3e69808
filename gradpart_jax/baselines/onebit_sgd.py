"""1-bit SGD: signs, with two values for each column of a matrix (Seide et al., Interspeech 2014, section 3)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from gradpart_jax.coded import Coded, Form, exchange_coded
from gradpart_jax.exchange import AxisName
from gradpart_jax.matrices import matrix, matrix_shape
from gradpart_jax.reductions import alone
from gradpart_jax.scheme import Reduced, Scheme, SchemeState, Settle
from gradpart_jax.segments import Layout, loosen


def onebit_sgd() -> Scheme:
    """Send whether each value is below 0, and for each column the mean of those that are and of those that are not.

    Those two means are what the bits of a column decode to: the values that leave the least squared rest. A leaf of one
    axis is one column. It needs the memory, which `compress` keeps by default.

    Returns:
      A Scheme that sends 1 bit an element and 64 a column, by an all-gather.

    >>> import jax.numpy as jnp, gradpart_jax as gp
    >>> tx = gp.compress(gp.baselines.onebit_sgd())
    >>> tx.update(jnp.array([3.0, 1.0, -5.0]), tx.init(jnp.zeros(3)))[0]
    Array([ 2.,  2., -5.], dtype=float32)
    """

    def reduce(
        vector: jax.Array, state: SchemeState, layout: Layout, axis_name: AxisName, settle: Settle
    ) -> tuple[Reduced, SchemeState]:
        filled = [s for s, size in enumerate(layout.sizes) if size]
        shapes = [matrix_shape(layout.shapes[s]) for s in filled]
        ends = np.cumsum([columns for _, columns in shapes])

        def measure(vector: jax.Array) -> jax.Array:
            means = [_two_means(matrix(vector, s, layout)) for s in filled]
            return jnp.concatenate(means, axis=1).reshape(-1)

        def decode(codes: jax.Array, scales: jax.Array) -> jax.Array:
            parts = []
            for s, (_, columns), end in zip(filled, shapes, ends, strict=True):
                above, below = (scales.reshape(2, -1)[i : i + 1, end - columns : end] for i in (0, 1))
                parts.append(jnp.where(matrix(codes, s, layout) > 0, below, above).reshape(-1))
            return loosen(jnp.concatenate(parts), layout)

        coded = Coded((vector < 0).astype(jnp.uint32), alone(measure, vector))
        form = Form(layout.total, 1, 2 * int(ends[-1]))
        return exchange_coded(vector, coded, decode, form, layout, axis_name, settle), state

    return Scheme("1-bit SGD", lambda layout: SchemeState((), ()), reduce, lambda layout: layout.elements)


def _two_means(values: jax.Array) -> jax.Array:
    """Mean of what is not below 0, and of what is, in each column: float32[2, columns], 0 where there is none."""
    below = values < 0
    halves = [jnp.where(below, 0.0, values), jnp.where(below, values, 0.0)]
    counts = [jnp.sum(chosen.astype(jnp.float32), axis=0) for chosen in (~below, below)]
    return jnp.stack([jnp.sum(h, axis=0) / jnp.maximum(c, 1.0) for h, c in zip(halves, counts, strict=True)])
