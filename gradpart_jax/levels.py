"""Whole numbers of steps in place of real numbers, up to chance or to the nearest.

A step is a bfloat16 number. The product of a level of at most 16 bits and a step is then exact in float32: no compiler
that contracts it with a sum, or does not, changes a bit.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from gradpart_jax.exchange import AxisName, position
from gradpart_jax.replicated import seeded

STEP_BITS = 16
FRACTION_BITS = 16
LARGEST_LEVEL = 255


def draws(size: int, seed: int, step: jax.Array, axis_name: AxisName) -> jax.Array:
    """Draw random bits, other ones on each device and in each step.

    Args:
      size: how many.
      seed: of the run.
      step: int32[].
      axis_name: the mapped axis.

    Returns:
      uint32[size].
    """
    key = jax.random.fold_in(jax.random.fold_in(seeded(seed), step), position(axis_name))
    return jax.random.bits(key, (size,), jnp.uint32)


def step_above(lengths: jax.Array) -> jax.Array:
    """Round up to the next number that bfloat16 has.

    Args:
      lengths: float32[...], at least 0.

    Returns:
      float32[...]; subnormal numbers become 0.
    """
    bits = jax.lax.bitcast_convert_type(lengths, jnp.uint32)
    above = jax.lax.bitcast_convert_type((bits + 0xFFFF) & jnp.uint32(0xFFFF0000), jnp.float32)
    return jnp.where(lengths >= jnp.finfo(jnp.float32).tiny, above, 0.0)


def nearest(values: jax.Array, steps: jax.Array, most: int) -> jax.Array:
    """Count the steps in each magnitude, to the nearest whole number.

    Args:
      values: float32[...].
      steps: float32, of the same shape or one that broadcasts; nothing is counted where it is 0.
      most: levels above this become it.

    Returns:
      uint32[...].
    """
    return jnp.clip(jnp.rint(_ratio(values, steps)), 0, most).astype(jnp.uint32)


def by_chance(values: jax.Array, steps: jax.Array, most: int, random: jax.Array) -> jax.Array:
    """Count the steps in each magnitude; a part of a step counts as one with a probability as large as itself.

    The expectation is the magnitude, within 2^-15 of a step: the fraction has 16 bits.

    Args:
      values: float32[...], of at most LARGEST_LEVEL steps.
      steps: as in `nearest`.
      most: levels above this become it.
      random: uint32[...], of the shape of values.

    Returns:
      uint32[...].
    """
    fixed = jnp.clip(jnp.rint(_ratio(values, steps) * 2.0**FRACTION_BITS), 0, LARGEST_LEVEL << FRACTION_BITS)
    return jnp.minimum((fixed.astype(jnp.uint32) + (random >> (32 - FRACTION_BITS))) >> FRACTION_BITS, most)


def signed(levels: jax.Array, values: jax.Array, width: int) -> jax.Array:
    """Put a sign above a level.

    Args:
      levels: uint32[...], below 2^(width - 1).
      values: float32[...], whose signs are taken.
      width: bits of a code.

    Returns:
      uint32[...].
    """
    return levels | ((values < 0).astype(jnp.uint32) << (width - 1))


def read(codes: jax.Array, steps: jax.Array, width: int) -> jax.Array:
    """Give the numbers that signed levels stand for.

    Args:
      codes: uint32[...], of `signed`.
      steps: float32, of the same shape or one that broadcasts.
      width: bits of a code.

    Returns:
      float32[...], finite where the steps are.
    """
    top, most = jnp.uint32(1) << (width - 1), float(jnp.finfo(jnp.float32).max)
    size = jnp.clip((codes & (top - 1)).astype(jnp.float32) * steps, -most, most)
    return jnp.where(codes & top > 0, -size, size)


def _ratio(values: jax.Array, steps: jax.Array) -> jax.Array:
    # Written as a product, for some programs make one of a division and others do not.
    return jnp.abs(values) * jnp.where(steps > 0, 1.0 / jnp.where(steps > 0, steps, 1.0), 0.0)
