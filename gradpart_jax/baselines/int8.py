"""Eight bits a value, in blocks scaled by their greatest (Dettmers, ICLR 2016, section 2, with linear levels)."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from gradpart_jax.checks import check_integer
from gradpart_jax.coded import Coded, Form, exchange_coded
from gradpart_jax.exchange import AxisName
from gradpart_jax.levels import STEP_BITS, nearest, read, signed, step_above
from gradpart_jax.scheme import Reduced, Scheme, SchemeState, Settle
from gradpart_jax.segments import Layout

BITS = 8
LEVELS = 127


def int8(block: int = 256) -> Scheme:
    """Send each value as an 8-bit integer, a multiple of a step that its block shares.

    With a step d >= max|v| / 127, v is sent as d round(v / d): at most half a step off. The step is rounded up to a
    bfloat16 number. What rounding loses is remembered, if there is a memory.

    Args:
      block: values that share a step, which costs 16 bits.

    Returns:
      A Scheme that sends 8 + 16 / block bits an element, by an all-gather.

    Raises:
      TypeError: block is not an integer.
      ValueError: block is out of range.

    >>> import jax.numpy as jnp, gradpart_jax as gp
    >>> tx = gp.compress(gp.baselines.int8())
    >>> tx.update(jnp.array([-127.0, 64.2, 0.4]), tx.init(jnp.zeros(3)))[0]
    Array([-127.,   64.,    0.], dtype=float32)
    """
    check_integer("block", block, 1, 2**20)

    def reduce(
        vector: jax.Array, state: SchemeState, layout: Layout, axis_name: AxisName, settle: Settle
    ) -> tuple[Reduced, SchemeState]:
        values = jnp.pad(vector, (0, -vector.size % block)).reshape(-1, block)
        steps = step_above(jnp.max(jnp.abs(values), axis=1) * (1.0 / LEVELS))
        level = nearest(values, steps[:, None], LEVELS)

        def decode(codes: jax.Array, steps: jax.Array) -> jax.Array:
            return read(codes.reshape(-1, block), steps[:, None], BITS).reshape(-1)[: layout.total]

        coded = Coded(signed(level, values, BITS).reshape(-1), steps)
        form = Form(values.size, BITS, steps.size, STEP_BITS)
        return exchange_coded(vector, coded, decode, form, layout, axis_name, settle), state

    return Scheme("8-bit", lambda layout: SchemeState((), ()), reduce, lambda layout: layout.elements)
