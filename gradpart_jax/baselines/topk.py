"""Top-k: of each leaf the largest magnitudes.

Source: Aji and Heafield, "Sparse communication for distributed gradient descent" (EMNLP 2017), section 3, with the
exact rank in place of a sampled one; Stich, Cordonnier and Jaggi, "Sparsified SGD with memory" (NeurIPS 2018).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from gradpart_jax.checks import check_number
from gradpart_jax.exchange import AxisName
from gradpart_jax.magnitudes import entries, quotas, top
from gradpart_jax.scheme import Reduced, Scheme, SchemeState, Settle
from gradpart_jax.segments import Layout
from gradpart_jax.sparse import share


def topk(ratio: float = 0.01) -> Scheme:
    """Send the largest magnitudes of each leaf, exactly as many as asked for.

    Of a leaf with d elements, C(a) keeps the k = max(1, round(ratio d)) entries of largest |a|; of equal ones those
    that come first. It is a contraction: |a - C(a)|^2 <= (1 - k / d) |a|^2.

    Args:
      ratio: of entries to send, in (0, 1].

    Returns:
      A Scheme.

    Raises:
      TypeError: ratio is not a number.
      ValueError: ratio is out of range.

    >>> import jax.numpy as jnp, gradpart_jax as gp
    >>> tx = gp.compress(gp.baselines.topk(0.5))
    >>> gradient = jnp.array([3.0, -1.0, 0.5, -4.0])
    >>> tx.update(gradient, tx.init(gradient))[0]
    Array([ 3.,  0.,  0., -4.], dtype=float32)
    """
    check_number("ratio", ratio, above=0.0, at_most=1.0, static=True)

    def capacity(layout: Layout) -> int:
        return sum(quotas(ratio, layout))

    def reduce(
        vector: jax.Array, state: SchemeState, layout: Layout, axis_name: AxisName, settle: Settle
    ) -> tuple[Reduced, SchemeState]:
        ranks = jnp.asarray(quotas(ratio, layout), jnp.int32)
        count = jnp.int32(capacity(layout))
        buffer = entries(vector, top(vector, ranks, layout), capacity(layout), jnp.int32(0))
        return share(vector, buffer, count, layout, axis_name, settle, ranks.astype(jnp.float32)), state

    return Scheme("topk", lambda layout: SchemeState((), ()), reduce, capacity)
