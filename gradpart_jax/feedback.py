"""Error feedback: what was not sent is remembered, and added to the next gradient.

Sources: Seide et al., "1-bit stochastic gradient descent" (2014) for the memory; Lin et al., "Deep gradient
compression" (ICLR 2018), sections 3.1 and 3.2, for momentum correction and masking; Richtarik, Sokolov and Fatkhullin,
"EF21" (NeurIPS 2021), algorithm 2, for an estimate in the memory's place; Page, "Continuous inspection schemes"
(Biometrika 1954), for the cumulative sum with an allowance.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gradpart_jax.buffers import Buffer, scatter_add
from gradpart_jax.checks import is_fixed
from gradpart_jax.replicated import rounded
from gradpart_jax.segments import Layout, add_tree, ravel


class Memory(NamedTuple):
    """What one device still owes; both differ from device to device."""

    residual: jax.Array  # float32[n], or [0] without error feedback: gradient not sent so far; by EF21, the estimate
    velocity: jax.Array  # float32[n], or [0] without momentum correction: already multiplied by the momentum


class Sent(NamedTuple):
    """What one device's payload decodes to: all of the vector, or the entries of disjoint buffers."""

    everything: jax.Array  # bool[]
    buffers: tuple[Buffer, ...]
    owned: jax.Array | bool = False  # bool[n]: in no buffer, for the device itself adds it up for all


def init(layout: Layout, *, enabled: bool, momentum: bool) -> Memory:
    """Start with nothing owed.

    Args:
      layout: the gradient's segments.
      enabled: whether there is a memory at all.
      momentum: whether there is momentum correction.

    Returns:
      Zeros.
    """
    return Memory(
        residual=jnp.zeros(layout.total if enabled else 0, jnp.float32),
        velocity=jnp.zeros(layout.total if momentum else 0, jnp.float32),
    )


def add(
    gradient: Any, memory: Memory, layout: Layout, allowance: float | jax.Array = 0.0
) -> tuple[jax.Array, jax.Array]:
    """Add the memory to a gradient: a = g + m, or a = (g + u) + m with momentum correction.

    Args:
      gradient: a tree.
      memory: of the step before.
      layout: the gradient's segments.
      allowance: of `accumulate`.

    Returns:
      float32[n], what the compressor is given; float32[n], g + u with momentum correction, else [0].
    """
    moving = add_tree(gradient, memory.velocity, layout) if memory.velocity.size else memory.velocity
    if not memory.residual.size:
        return ravel(gradient, layout), moving
    sum_of = jnp.add if is_fixed(allowance, 0.0) else functools.partial(accumulate, allowance=allowance)
    if moving.size:
        return sum_of(moving, memory.residual), moving
    return add_tree(gradient, memory.residual, layout, sum_of), moving


def accumulate(fresh: jax.Array, held: jax.Array, allowance: float | jax.Array) -> jax.Array:
    """Add up, but let what opposes the sum count 1 + allowance times, until it has used the sum up.

    A cumulative sum with an allowance (Page, 1954) of allowance / (2 + allowance) of each |fresh|: noise, which opposes
    itself at every second step, comes to nothing, while a drift is summed up. Products are rounded by one bit, so that
    no compiler contracts them with the sum.

    Args:
      fresh: float32[n].
      held: float32[n], the sum so far.
      allowance: at least 0.

    Returns:
      float32[n].

    >>> import jax.numpy as jnp
    >>> accumulate(jnp.float32([1, -1, -4]), jnp.float32([2, 2, 2]), allowance=1.0)
    Array([ 3.,  0., -3.], dtype=float32)
    """
    more = rounded(fresh * allowance)
    left = held - rounded(held * (allowance / (1.0 + allowance)))
    undone = jnp.where(jnp.abs(fresh + more) < jnp.abs(held), held + (fresh + more), left + fresh)
    return jnp.where((fresh < 0) == (held < 0), held + fresh, undone)


def subtract(
    vector: jax.Array,
    moving: jax.Array,
    memory: Memory,
    sent: Sent | jax.Array,
    finite: jax.Array,
    *,
    momentum: float | jax.Array | None = None,
    decay: float | jax.Array = 1.0,
) -> Memory:
    """Remember what was not sent: m' = decay (a - sent), u' = momentum (g + u) where nothing was sent, else 0.

    Where a device adds up for all, nothing waits, and momentum goes on.

    The products are stored, not added in the same expression: a compiler that contracts a multiply and an add into
    one rounding in one program and not in another would break bit-equality between pmap and vmap.

    Args:
      vector: float32[n], what `add` made.
      moving: float32[n] or [0], what `add` made besides.
      memory: as given to `add`.
      sent: what this device's payload decodes to; a dense float32[n] serves too.
      finite: bool[], the same on every device; where False the memory stays as it was.
      momentum: of momentum correction; None without.
      decay: of the memory, 1 keeps all.

    Returns:
      The memory for the next step.
    """
    residual, velocity = memory
    keep_all = is_fixed(decay, 1.0)
    if residual.size:
        if isinstance(sent, Sent):
            rest = jnp.where(sent.everything | sent.owned, 0.0, vector if keep_all else decay * vector)
            rest = jnp.where(finite, rest, residual)
            for buffer in sent.buffers:
                values = buffer.values if keep_all else decay * buffer.values
                rest = scatter_add(rest, buffer.indices, jnp.where(finite, -values, 0.0))
        else:
            rest = vector - sent
            rest = jnp.where(finite, rest if keep_all else decay * rest, residual)
        residual = rest
    if momentum is not None:
        moved = momentum * moving
        if isinstance(sent, Sent):
            moved = jnp.where(finite, jnp.where(sent.everything, 0.0, moved), velocity)
            for buffer in sent.buffers:
                masked = jnp.where(finite, buffer.indices, velocity.size)
                moved = moved.at[masked].set(0.0, mode="drop")
        else:
            moved = jnp.where(finite, jnp.where(sent != 0.0, 0.0, moved), velocity)
        velocity = moved
    return Memory(residual, velocity)


def difference(gradient: Any, memory: Memory, layout: Layout) -> jax.Array:
    """Subtract the estimate from a gradient: a = g - h, what EF21 gives a compressor.

    Args:
      gradient: a tree.
      memory: h, of the step before.
      layout: the gradient's segments.

    Returns:
      float32[n].
    """
    return add_tree(gradient, -memory.residual, layout)


def advance(vector: jax.Array, memory: Memory, sent: Sent | jax.Array, finite: jax.Array) -> Memory:
    """Bring the estimate nearer to the gradient by what was sent: h' = h + sent.

    Args:
      vector: float32[n], what `difference` made.
      memory: h.
      sent: what this device's payload decodes to; a dense float32[n] serves too.
      finite: bool[], the same on every device; where False the estimate stays as it was.

    Returns:
      h', in the residual's place.
    """
    estimate = memory.residual
    if isinstance(sent, Sent):
        moved = jnp.where(finite & (sent.everything | sent.owned), estimate + vector, estimate)
        for buffer in sent.buffers:
            moved = scatter_add(moved, buffer.indices, jnp.where(finite, buffer.values, 0.0))
    else:
        moved = jnp.where(finite, estimate + sent, estimate)
    return memory._replace(residual=moved)
