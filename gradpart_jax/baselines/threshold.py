"""A fixed threshold: whatever is larger is sent.

Source: Strom, "Scalable distributed DNN training using commodity GPU cloud computing" (Interspeech 2015), section 2,
with values as they are in the place of the sign times the threshold.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from gradpart_jax.bits import popcount
from gradpart_jax.checks import check_number
from gradpart_jax.exchange import AxisName
from gradpart_jax.magnitudes import entries, reaching, room
from gradpart_jax.scheme import Reduced, Scheme, SchemeState, Settle
from gradpart_jax.segments import Layout
from gradpart_jax.sparse import share


def threshold(value: float | jax.Array, *, ratio: float = 0.01) -> Scheme:
    """Send what reaches a threshold that never changes, as far as the payload holds it.

    C(a) keeps the entries with |a| >= value, a != 0. Their number is what it is: the payload's size is fixed, and of
    more than it holds a run is left for later, which is another one each step.

    Args:
      value: the threshold, above 0.
      ratio: of entries that the payload holds, in (0, 1].

    Returns:
      A Scheme.

    Raises:
      TypeError: an argument is not a number.
      ValueError: an argument is out of range.

    >>> import jax.numpy as jnp, gradpart_jax as gp
    >>> tx = gp.compress(gp.baselines.threshold(1.0, ratio=0.75))
    >>> gradient = jnp.array([3.0, -1.0, 0.5, -4.0])
    >>> tx.update(gradient, tx.init(gradient))[0]
    Array([ 3., -1.,  0., -4.], dtype=float32)
    """
    check_number("value", value, above=0.0)
    check_number("ratio", ratio, above=0.0, at_most=1.0, static=True)

    def capacity(layout: Layout) -> int:
        return room(ratio, 1.0, layout)

    def init(layout: Layout) -> SchemeState:
        return SchemeState(jnp.int32(0), ())

    def reduce(
        vector: jax.Array, state: SchemeState, layout: Layout, axis_name: AxisName, settle: Settle
    ) -> tuple[Reduced, SchemeState]:
        bounds = jnp.broadcast_to(jnp.asarray(value, jnp.float32), (layout.segments,))
        words = reaching(vector, bounds, layout)
        buffer = entries(vector, words, capacity(layout), state.shared)
        reduced = share(vector, buffer, jnp.sum(popcount(words)), layout, axis_name, settle)
        return reduced, SchemeState(state.shared + 1, ())

    return Scheme("threshold", init, reduce, capacity)
