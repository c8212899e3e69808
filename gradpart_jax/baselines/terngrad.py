"""TernGrad: minus, nothing or plus each tensor's greatest, by chance (Wen et al., NeurIPS 2017, section 3)."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from gradpart_jax.checks import check_integer, check_number
from gradpart_jax.coded import Coded, Form, exchange_coded
from gradpart_jax.exchange import AxisName
from gradpart_jax.levels import by_chance, draws, read, signed
from gradpart_jax.moments import greatest_magnitude
from gradpart_jax.reductions import per_element, segment_deviations
from gradpart_jax.scheme import Reduced, Scheme, SchemeState, Settle
from gradpart_jax.segments import Layout

BITS = 2


def terngrad(clip: float | None = 2.5, seed: int = 0) -> Scheme:
    """Send -s, 0 or s for each value, where s is the greatest magnitude in its tensor.

    A value v, first clipped to `clip` standard deviations of its tensor (taken about 0, so that a tensor of one element
    has one), is sent as sign(v) s with probability |v| / s. The expectation is the clipped value. It was made for use
    without a memory: give `compress` error_feedback=False.

    Args:
      clip: standard deviations; None does not clip, and the expectation is then the gradient itself.
      seed: of the chance.

    Returns:
      A Scheme that sends 2 bits an element and 32 a tensor, by an all-gather.

    Raises:
      TypeError: an argument is not a number.
      ValueError: an argument is out of range.

    >>> import jax.numpy as jnp, gradpart_jax as gp
    >>> tx = gp.compress(gp.baselines.terngrad(), error_feedback=False)
    >>> tx.update(jnp.array([3.0, -3.0, 0.0]), tx.init(jnp.zeros(3)))[0]
    Array([ 3., -3.,  0.], dtype=float32)
    """
    check_number("clip", clip, above=0.0, optional=True)
    check_integer("seed", seed, 0, 2**32 - 1)

    def reduce(
        vector: jax.Array, state: SchemeState, layout: Layout, axis_name: AxisName, settle: Settle
    ) -> tuple[Reduced, SchemeState]:
        scales = greatest_magnitude(vector, layout)
        if clip is not None:
            unit = jnp.where((scales > 0) & (scales < jnp.inf), scales, 1.0)  # of which squares stay in range
            deviations = unit * segment_deviations(vector / per_element(unit, layout), layout)
            scales = jnp.minimum(scales, clip * deviations)
        # A scale whose reciprocal is infinite would make its tensor nothing but noise.
        scales = jnp.where(scales >= jnp.finfo(jnp.float32).tiny, scales, 0.0)
        wide = per_element(scales, layout)
        random = draws(layout.total, seed, state.shared, axis_name)
        level = by_chance(jnp.clip(vector, -wide, wide), wide, 1, random)

        def decode(codes: jax.Array, scales: jax.Array) -> jax.Array:
            return read(codes, per_element(scales, layout), BITS)

        coded = Coded(signed(level, vector, BITS), scales)
        form = Form(layout.total, BITS, layout.segments)
        return exchange_coded(vector, coded, decode, form, layout, axis_name, settle), SchemeState(state.shared + 1, ())

    return Scheme("TernGrad", lambda layout: SchemeState(jnp.int32(0), ()), reduce, lambda layout: layout.elements)
