"""QSGD: a few levels of each bucket's norm, rounded by chance (Alistarh et al., NeurIPS 2017, section 3)."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from gradpart_jax.checks import check_integer
from gradpart_jax.coded import Coded, Form, exchange_coded
from gradpart_jax.exchange import AxisName
from gradpart_jax.levels import STEP_BITS, by_chance, draws, read, signed, step_above
from gradpart_jax.reductions import alone
from gradpart_jax.scheme import Reduced, Scheme, SchemeState, Settle
from gradpart_jax.segments import Layout


def qsgd(bits: int = 4, bucket: int = 128, seed: int = 0) -> Scheme:
    """Send each value as a sign and a level of its bucket's Euclidean norm, rounded by chance.

    With s = 2^(bits - 1) - 1 levels and a step d >= |v|_2 / s, v is sent as sign(v) d (floor(|v| / d) + b), where b is
    1 with the probability of the fraction: the expectation is v. The step is rounded up to a bfloat16 number. Codes
    have a fixed width; the paper's variable-length code, which pays where most levels are 0, is not written.

    It was made for use without a memory: give `compress` error_feedback=False. With few levels what it sends is far
    from what it was given, and a memory grows.

    Args:
      bits: of a value, sign included, 2 to 8.
      bucket: values that share a norm, which costs 16 bits.
      seed: of the chance.

    Returns:
      A Scheme that sends bits + 16 / bucket bits an element, by an all-gather.

    Raises:
      TypeError: an argument is not an integer.
      ValueError: an argument is out of range.

    >>> import jax.numpy as jnp, gradpart_jax as gp
    >>> tx = gp.compress(gp.baselines.qsgd(bits=4), error_feedback=False)
    >>> _, state = tx.update(jnp.ones(1024), tx.init(jnp.zeros(1024)))
    >>> float(gp.stats(state).payload_bits) / 1024
    4.125
    """
    check_integer("bits", bits, 2, 8)
    check_integer("bucket", bucket, 1, 2**20)
    check_integer("seed", seed, 0, 2**32 - 1)
    levels = 2 ** (bits - 1) - 1

    def reduce(
        vector: jax.Array, state: SchemeState, layout: Layout, axis_name: AxisName, settle: Settle
    ) -> tuple[Reduced, SchemeState]:
        values = jnp.pad(vector, (0, -vector.size % bucket)).reshape(-1, bucket)
        norms = alone(_norms, values)
        steps = step_above(norms * (1.0 / levels))
        random = draws(values.size, seed, state.shared, axis_name).reshape(values.shape)
        level = by_chance(values, steps[:, None], levels, random)

        def decode(codes: jax.Array, steps: jax.Array) -> jax.Array:
            return read(codes.reshape(-1, bucket), steps[:, None], bits).reshape(-1)[: layout.total]

        coded = Coded(signed(level, values, bits).reshape(-1), steps)
        form = Form(values.size, bits, steps.size, STEP_BITS)
        return exchange_coded(vector, coded, decode, form, layout, axis_name, settle), SchemeState(state.shared + 1, ())

    return Scheme("QSGD", lambda layout: SchemeState(jnp.int32(0), ()), reduce, lambda layout: layout.elements)


def _norms(buckets: jax.Array) -> jax.Array:
    """Take Euclidean norms in units of each bucket's largest magnitude: squares stay in range."""
    greatest = jnp.max(jnp.abs(buckets), axis=1)
    unit = jnp.where(greatest > 0, greatest, 1.0)
    parts = buckets / unit[:, None]
    return unit * jnp.sqrt(jnp.sum(parts * parts, axis=1))
