"""Bytes: what one device hands to collectives, and what leaves it on the wire.

Payload bits are a collective's operand. Link bits are what its algorithm sends from one device of W: a ring
all-gather (W - 1) times the payload, a ring all-reduce 2 (W - 1) / W times the buffer, an all-to-all (W - 1) / W times
the buffer. With one device there is no wire, and link bits are 0.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from gradpart_jax.segments import Layout

WORD_BITS = 32


class Wire(NamedTuple):
    """Bits of one step, on one device; float32, exact below 2**29 bits."""

    payload_bits: jax.Array  # float32[]: operands of the collectives
    link_bits: jax.Array  # float32[]: what leaves the device by their algorithms


def nothing() -> Wire:
    """Account for no collective at all."""
    return Wire(jnp.float32(0.0), jnp.float32(0.0))


def gathered(bits: int, devices: int) -> Wire:
    """Account for a ring all-gather.

    Args:
      bits: of one device's operand.
      devices: W.

    Returns:
      bits, and (W - 1) bits on the link.

    >>> [float(b) for b in gathered(64, devices=4)]
    [64.0, 192.0]
    """
    return Wire(jnp.float32(bits), jnp.float32(bits * (devices - 1)))


def reduced(bits: int, devices: int) -> Wire:
    """Account for a ring all-reduce.

    Args:
      bits: of one device's operand.
      devices: W.

    Returns:
      bits, and 2 (W - 1) / W bits on the link.

    >>> [float(b) for b in reduced(64, devices=4)]
    [64.0, 96.0]
    """
    return Wire(jnp.float32(bits), jnp.float32(2 * bits * (devices - 1) / devices))


def dealt(bits: int, devices: int) -> Wire:
    """Account for an all-to-all.

    Args:
      bits: of one device's operand, what it has for itself included.
      devices: W.

    Returns:
      bits, and (W - 1) / W bits on the link.

    >>> [float(b) for b in dealt(64, devices=4)]
    [64.0, 48.0]
    """
    return Wire(jnp.float32(bits), jnp.float32(bits * (devices - 1) / devices))


def add(*wires: Wire) -> Wire:
    """Add up collectives of the same step."""
    return jax.tree.map(lambda *bits: sum(bits, start=jnp.float32(0.0)), *wires)


def dense(layout: Layout, devices: int) -> Wire:
    """Account for what uncompressed training would send: a float32 all-reduce of the gradient.

    Args:
      layout: the gradient's segments; padding is not counted, dense training has none.
      devices: W.

    Returns:
      32 bits an element, as payload and on the link.
    """
    return reduced(WORD_BITS * layout.elements, devices)
