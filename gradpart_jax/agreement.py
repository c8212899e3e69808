"""How much devices' gradients agree, block by block: what Adam on each device has to know of the others.

Of entries in a block, let c be the correlation of two devices' gradients, which is the signal's share; the rest is the
noise of each device's own batch. Adam on a device divides by the root of E[g^2], behind the mean of W devices by that
of E[mean(g)^2], which is

    c + (1 - c) / W

times as large. To measure c, each device tells the sign of a random sum of a block, the same sum on every device: for
jointly normal numbers the mean product of two devices' signs is 2 / pi arcsin(c) (Van Vleck and Middleton, "The
spectrum of clipped noise", 1966). Counts of positive signs are added up on the way, in fields so wide that they hold W.
"""

from __future__ import annotations

import math
from itertools import accumulate
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gradpart_jax import accounting
from gradpart_jax.accounting import WORD_BITS, Wire
from gradpart_jax.exchange import AxisName, axis_size
from gradpart_jax.replicated import replicated, seeded
from gradpart_jax.sums import add_codes, words_added

BLOCK = 128  # neighbouring entries of a leaf that are taken to agree alike
MEMORY = 200  # steps that a mean reaches back over
FEWEST = 50  # measurements in a mean, at least, once there have been so many


class Agreement(NamedTuple):
    """What is known of B blocks, the same on every device."""

    products: jax.Array  # float32[B]: mean product of two devices' signs
    measured: jax.Array  # float32[]: measurements so far; the first is taken to have found all agreed
    step: jax.Array  # int32[]


def start(tree: Any) -> Agreement:
    """Begin with all devices agreed.

    Args:
      tree: of parameters.

    Returns:
      Agreement.
    """
    count = sum(map(_blocks, jax.tree.leaves(tree)))
    return Agreement(jnp.ones(count, jnp.float32), jnp.float32(1.0), jnp.int32(0))


def period(blocks: int, elements: int, bits_per_element: float, devices: int) -> int:
    """Say how often a budget allows of a measurement.

    Args:
      blocks: B.
      elements: of the gradient.
      bits_per_element: the most payload bits for each of them and step.
      devices: W.

    Returns:
      Steps from one to the next.

    >>> period(512, 65536, 0.016, devices=4)
    2
    """
    bits = WORD_BITS * words_added(blocks, devices.bit_length())
    return max(1, math.ceil(bits / (bits_per_element * max(elements, 1))))


def measure(
    gradients: Any, agreement: Agreement, axis_name: AxisName, bits_per_element: float
) -> tuple[Agreement, Wire]:
    """Measure, if it is time.

    Args:
      gradients: of this device; where one is not finite, on any device, nothing is learnt.
      agreement: of the step before.
      axis_name: the mapped axis.
      bits_per_element: budget of payload bits.

    Returns:
      Agreement, the same on every device, bit for bit; and what was sent.
    """
    devices, blocks = axis_size(axis_name), agreement.products.size
    if devices == 1 or not blocks:
        return agreement, accounting.nothing()
    elements = sum(leaf.size for leaf in jax.tree.leaves(gradients))
    every = period(blocks, elements, bits_per_element, devices)

    def ask() -> tuple[jax.Array, jax.Array, Wire]:
        signs = jax.random.rademacher(jax.random.fold_in(seeded(0), agreement.step), (BLOCK,), jnp.float32)
        sums = jnp.concatenate([_block_sums(leaf, signs) for leaf in jax.tree.leaves(gradients)])
        # Where no device has a gradient all tell the same: they agree, and steps stay as they are
        signed, finite = (sums > 0).astype(jnp.uint32), jnp.all(jnp.isfinite(sums))
        counts, everywhere, wire = add_codes(signed, devices.bit_length(), finite, axis_name)
        share = min(every / MEMORY, 1 / FEWEST)
        fresh = replicated(_follow)(agreement.products, agreement.measured, counts, devices=devices, share=share)
        products, measured = (jnp.where(everywhere, new, old) for new, old in zip(fresh, agreement[:2], strict=True))
        return products, measured, wire

    def wait() -> tuple[jax.Array, jax.Array, Wire]:
        return agreement.products, agreement.measured, accounting.nothing()

    products, measured, wire = jax.lax.cond(agreement.step % every == 0, ask, wait)
    return Agreement(products, measured, agreement.step + 1), wire


def agreement_ratio(agreement: Agreement, axis_name: AxisName) -> jax.Array:
    """Find E[mean(g)^2] / E[g^2] of each block.

    Args:
      agreement: of this step.
      axis_name: the mapped axis.

    Returns:
      float32[B] in [1 / W, 1].
    """
    return replicated(_ratio)(agreement.products, devices=axis_size(axis_name))


def scale_blocks(tree: Any, factors: jax.Array) -> Any:
    """Multiply each block by a factor of its own.

    Args:
      tree: of the gradient's shapes.
      factors: float32[B].

    Returns:
      The same tree, in its own dtypes.

    Raises:
      ValueError: there are not B blocks in the tree.

    >>> import jax.numpy as jnp
    >>> scale_blocks({"bias": jnp.ones(2), "kernel": jnp.ones((1, 2))}, jnp.array([2.0, 3.0]))
    {'bias': Array([2., 2.], dtype=float32), 'kernel': Array([[3., 3.]], dtype=float32)}
    """
    leaves, structure = jax.tree.flatten(tree)
    bounds = list(accumulate(map(_blocks, leaves), initial=0))
    if factors.size != bounds[-1]:
        raise ValueError(
            f"{factors.size} blocks were measured, and updates have {bounds[-1]}: "
            "measure the gradient of the same leaves as are scaled"
        )

    def scaled(leaf: jax.Array, begin: int, end: int) -> jax.Array:
        own = factors[begin:end]
        each = jnp.broadcast_to(own[:, None], (own.size, BLOCK)).reshape(-1)[: leaf.size].reshape(leaf.shape)
        return (leaf * each).astype(leaf.dtype)

    return jax.tree.unflatten(structure, map(scaled, leaves, bounds, bounds[1:]))


def _follow(
    products: jax.Array, measured: jax.Array, positive: jax.Array, *, devices: int, share: float
) -> tuple[jax.Array, jax.Array]:
    """Let means of products take in a measurement: at first all weigh alike, later the newest weighs its share."""
    surplus = 2.0 * positive.astype(jnp.float32) - devices
    product = (surplus * surplus - devices) / (devices * (devices - 1))
    weight = jnp.maximum(share, 1.0 / (measured + 1.0))
    return products + weight * (product - products), measured + 1.0


def _ratio(products: jax.Array, *, devices: int) -> jax.Array:
    correlation = jnp.sin(jnp.pi / 2 * jnp.clip(products, 0.0, 1.0))
    return correlation + (1.0 - correlation) / devices


def _blocks(leaf: jax.Array) -> int:
    return -(-jnp.size(leaf) // BLOCK)


def _block_sums(leaf: jax.Array, signs: jax.Array) -> jax.Array:
    flat = jnp.pad(leaf.reshape(-1).astype(jnp.float32), (0, -leaf.size % BLOCK))
    return jnp.sum(flat.reshape(-1, BLOCK) * signs[None, :], axis=1)
