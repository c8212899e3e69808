"""No compression, or half of it: the mean of the gradients, accounted for like every other method."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from gradpart_jax.accounting import WORD_BITS, Wire, reduced
from gradpart_jax.coded import merge_by_owners
from gradpart_jax.exchange import AxisName, axis_size, mean
from gradpart_jax.feedback import Sent
from gradpart_jax.scheme import Reduced, Scheme, SchemeState, Settle, dense_report
from gradpart_jax.segments import Layout, loosen, tighten

DTYPES = ("float32", "bfloat16")
HALF = 16


def dense(dtype: str = "float32") -> Scheme:
    """Average all gradients, in float32 by an all-reduce, or rounded to bfloat16.

    In bfloat16 each device owns a part of the vector: it is dealt every device's numbers there, adds them up in
    float32, rounds their mean and gives it to all. On the link that is half a float32 all-reduce, the sum is rounded
    once, and the bits are the same on every backend; not all can reduce bfloat16 itself. What rounding the gradient
    loses is remembered, what rounding the mean loses is not.

    Args:
      dtype: float32 or bfloat16.

    Returns:
      A Scheme, in float32 with nothing to remember.

    Raises:
      ValueError: another dtype.

    >>> import jax.numpy as jnp, gradpart_jax as gp
    >>> tx = gp.compress(gp.baselines.dense())
    >>> state = tx.init(jnp.zeros(3))
    >>> tx.update(jnp.ones(3), state)[0]
    Array([1., 1., 1.], dtype=float32)
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r} is not exchanged: give one of {', '.join(DTYPES)}")
    half = dtype == "bfloat16"

    def reduce(
        vector: jax.Array, state: SchemeState, layout: Layout, axis_name: AxisName, settle: Settle
    ) -> tuple[Reduced, SchemeState]:
        rounded = _round(vector) if half else vector
        average, wire = (_half_mean if half else _mean)(tighten(rounded, layout), axis_name)
        # A non-finite value anywhere makes the mean non-finite everywhere: no flag need be exchanged.
        finite = jnp.all(jnp.isfinite(average))
        outcome = Reduced(
            mean=jnp.where(finite, loosen(average, layout), 0.0),
            memory=settle(rounded if half else Sent(jnp.bool_(True), ()), finite),
            finite=finite,
            wire=wire,
            report=dense_report(layout),
        )
        return outcome, state

    return Scheme(f"dense {dtype}", lambda layout: SchemeState((), ()), reduce, lambda layout: layout.elements)


def _mean(values: jax.Array, axis_name: AxisName) -> tuple[jax.Array, Wire]:
    return mean(values, axis_name), reduced(WORD_BITS * values.size, axis_size(axis_name))


def _half_mean(values: jax.Array, axis_name: AxisName) -> tuple[jax.Array, Wire]:
    devices = axis_size(axis_name)
    parts = jnp.pad(values, (0, -values.size % devices)).reshape(devices, -1)
    halves, wire = merge_by_owners(
        _halves(parts), lambda dealt: _halves(_round(jnp.sum(_widened(dealt), axis=0) / devices)), axis_name
    )
    return _widened(halves).reshape(-1)[: values.size], wire


def _round(values: jax.Array) -> jax.Array:
    """Round to the values of bfloat16; a compiler may drop a cast there and back, not this."""
    return jax.lax.reduce_precision(values, exponent_bits=8, mantissa_bits=7)


def _halves(values: jax.Array) -> jax.Array:
    return (jax.lax.bitcast_convert_type(values, jnp.uint32) >> HALF).astype(jnp.uint16)


def _widened(halves: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(halves.astype(jnp.uint32) << HALF, jnp.float32)
