"""EF-signSGD: signs, scaled by each tensor's mean magnitude (Karimireddy et al., ICML 2019, algorithm 1)."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from gradpart_jax.coded import Coded, Form, exchange_coded
from gradpart_jax.exchange import AxisName
from gradpart_jax.reductions import cleared, per_element, segment_means
from gradpart_jax.scheme import Reduced, Scheme, SchemeState, Settle
from gradpart_jax.segments import Layout


def ef_signsgd() -> Scheme:
    """Send each value's sign, and each tensor's mean magnitude.

    A tensor p of d elements is sent as (|p|_1 / d) sign(p). It needs the memory, which `compress` keeps by default.

    Returns:
      A Scheme that sends 1 bit an element and 32 a tensor, by an all-gather.

    >>> import jax.numpy as jnp, gradpart_jax as gp
    >>> tx = gp.compress(gp.baselines.ef_signsgd())
    >>> out, state = tx.update(jnp.array([3.0, -1.0]), tx.init(jnp.zeros(2)))
    >>> out, state.memory.residual[:2]
    (Array([ 2., -2.], dtype=float32), Array([1., 1.], dtype=float32))
    """

    def reduce(
        vector: jax.Array, state: SchemeState, layout: Layout, axis_name: AxisName, settle: Settle
    ) -> tuple[Reduced, SchemeState]:
        def decode(codes: jax.Array, scales: jax.Array) -> jax.Array:
            scale = per_element(scales, layout)
            return cleared(jnp.where(codes > 0, -scale, scale), layout)

        coded = Coded((vector < 0).astype(jnp.uint32), segment_means(jnp.abs(vector), layout))
        form = Form(layout.total, 1, layout.segments)
        return exchange_coded(vector, coded, decode, form, layout, axis_name, settle), state

    return Scheme("EF-signSGD", lambda layout: SchemeState((), ()), reduce, lambda layout: layout.elements)
