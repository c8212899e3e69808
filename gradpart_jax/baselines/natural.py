"""Natural compression: the nearest powers of two, by chance (Horvath et al., 2019, section 2)."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from gradpart_jax.checks import check_integer
from gradpart_jax.coded import Coded, Form, exchange_coded
from gradpart_jax.exchange import AxisName
from gradpart_jax.levels import draws
from gradpart_jax.scheme import Reduced, Scheme, SchemeState, Settle
from gradpart_jax.segments import Layout

BITS = 9  # a sign and an exponent
MANTISSA = 23
LARGEST_EXPONENT = 254


def natural(seed: int = 0) -> Scheme:
    """Send each value's sign and a power of two: the one below it or the one above.

    With 2^a <= |v| < 2^(a + 1), 2^(a + 1) is sent with probability |v| / 2^a - 1, else 2^a: the expectation is v, and
    the variance at most v^2 / 8. In float32 that is a random number added to the mantissa, of which the carry is kept.
    Below 2^-126 nothing is sent.

    Args:
      seed: of the chance.

    Returns:
      A Scheme that sends 9 bits an element, by an all-gather.

    Raises:
      TypeError: seed is not an integer.
      ValueError: seed is out of range.

    >>> import jax.numpy as jnp, gradpart_jax as gp
    >>> tx = gp.compress(gp.baselines.natural(), error_feedback=False)
    >>> tx.update(jnp.array([-4.0, 0.5, 0.0]), tx.init(jnp.zeros(3)))[0]
    Array([-4. ,  0.5,  0. ], dtype=float32)
    """
    check_integer("seed", seed, 0, 2**32 - 1)

    def reduce(
        vector: jax.Array, state: SchemeState, layout: Layout, axis_name: AxisName, settle: Settle
    ) -> tuple[Reduced, SchemeState]:
        raw = jax.lax.bitcast_convert_type(vector, jnp.uint32)
        random = draws(layout.total, seed, state.shared, axis_name) >> (32 - MANTISSA)
        exponent = jnp.minimum(((raw & 0x7FFFFFFF) + random) >> MANTISSA, LARGEST_EXPONENT)
        tiny = jnp.abs(vector) < jnp.finfo(jnp.float32).tiny
        codes = (raw >> 31 << (BITS - 1)) | jnp.where(tiny, 0, exponent)

        def decode(codes: jax.Array, scales: jax.Array) -> jax.Array:
            exponent = jnp.minimum(codes & 0xFF, LARGEST_EXPONENT)
            power = jax.lax.bitcast_convert_type(exponent << MANTISSA, jnp.float32)
            signed = jnp.where(codes >> (BITS - 1) > 0, -power, power)
            return jnp.where(scales[0] > 0, signed, 0.0)

        # The one scale says only whether the vector is finite.
        coded, form = Coded(codes, jnp.ones(1)), Form(layout.total, BITS, 1)
        return exchange_coded(vector, coded, decode, form, layout, axis_name, settle), SchemeState(state.shared + 1, ())

    return Scheme("natural", lambda layout: SchemeState(jnp.int32(0), ()), reduce, lambda layout: layout.elements)
