"""signSGD with majority vote (Bernstein et al., ICLR 2019, algorithm 1)."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from gradpart_jax.coded import Coded, Form, exchange_coded
from gradpart_jax.exchange import AxisName
from gradpart_jax.scheme import Reduced, Scheme, SchemeState, Settle
from gradpart_jax.segments import Layout


def signsgd() -> Scheme:
    """Send each value's sign; the update is the sign that most devices sent, or 0 where they are equally divided.

    A sign has one bit, so that 0 counts as plus; a device whose gradient is 0 everywhere does not vote. Nothing is
    owed: a sign is no approximation of a value, and a memory stays empty. Its updates have magnitude 1: give the
    optimizer a small learning rate. The paper's momentum on each device is `optax.trace` before `compress`.

    Returns:
      A Scheme that sends 1 bit an element and 32 in all, by an all-gather.

    >>> import jax.numpy as jnp, gradpart_jax as gp
    >>> tx = gp.compress(gp.baselines.signsgd(), error_feedback=False)
    >>> tx.update(jnp.array([3.0, -0.1]), tx.init(jnp.zeros(2)))[0]
    Array([ 1., -1.], dtype=float32)
    """

    def reduce(
        vector: jax.Array, state: SchemeState, layout: Layout, axis_name: AxisName, settle: Settle
    ) -> tuple[Reduced, SchemeState]:
        def decode(codes: jax.Array, scales: jax.Array) -> jax.Array:
            return jnp.where(codes > 0, -scales[0], scales[0])

        votes = jnp.any(vector != 0).astype(jnp.float32)[None]
        coded, form = Coded((vector < 0).astype(jnp.uint32), votes), Form(layout.total, 1, 1)
        reduced = exchange_coded(vector, coded, decode, form, layout, axis_name, settle, owed=False)
        return reduced._replace(mean=jnp.sign(reduced.mean)), state

    return Scheme("signSGD", lambda layout: SchemeState((), ()), reduce, lambda layout: layout.elements)
