"""No compression: the mean of the gradients, accounted for like every other method."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from gradpart_jax.accounting import WORD_BITS, reduced
from gradpart_jax.exchange import AxisName, axis_size, mean
from gradpart_jax.feedback import Sent
from gradpart_jax.scheme import Reduced, Scheme, SchemeState, Settle, dense_report
from gradpart_jax.segments import Layout, loosen, tighten


def dense() -> Scheme:
    """Average all gradients, in float32, by an all-reduce.

    Returns:
      A Scheme with nothing to remember.

    >>> import jax.numpy as jnp, gradpart_jax as gp
    >>> tx = gp.compress(gp.baselines.dense())
    >>> state = tx.init(jnp.zeros(3))
    >>> tx.update(jnp.ones(3), state)[0]
    Array([1., 1., 1.], dtype=float32)
    """

    def reduce(
        vector: jax.Array, state: SchemeState, layout: Layout, axis_name: AxisName, settle: Settle
    ) -> tuple[Reduced, SchemeState]:
        average = loosen(mean(tighten(vector, layout), axis_name), layout)
        # A non-finite value anywhere makes the mean non-finite everywhere: no flag need be exchanged.
        finite = jnp.all(jnp.isfinite(average))
        outcome = Reduced(
            mean=jnp.where(finite, average, 0.0),
            memory=settle(Sent(jnp.bool_(True), ()), finite),
            finite=finite,
            wire=reduced(WORD_BITS * layout.elements, axis_size(axis_name)),
            report=dense_report(layout),
        )
        return outcome, state

    return Scheme("dense", lambda layout: SchemeState((), ()), reduce, lambda layout: layout.elements)
