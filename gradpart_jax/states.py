"""What an optimizer's state says of its exchanges: their statistics, and which leaves differ per device."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from gradpart_jax.accounting import Wire
from gradpart_jax.feedback import Memory
from gradpart_jax.scheme import SchemeState

SENT = ("payload_bits", "link_bits", "inner_bits")  # of `Stats`: what an exchange costs
DENSE = ("dense_payload_bits", "dense_link_bits")  # and what dense training would have cost


class Stats(NamedTuple):
    """Statistics of the last step, the same on every device. S segments (leaves); regions are (sparse, key).

    Bits are float32, and 0 before the first step. With one device there is no wire: link bits are 0, link_ratio 1.
    """

    payload_bits: jax.Array  # float32[]: handed to collectives by one device, everything counted
    link_bits: jax.Array  # float32[]: leaving one device by the collectives' algorithms
    dense_payload_bits: jax.Array  # float32[]: what a float32 all-reduce would have been handed
    dense_link_bits: jax.Array  # float32[]: what would have left the device in it
    payload_ratio: jax.Array  # float32[]: dense_payload_bits / payload_bits
    link_ratio: jax.Array  # float32[]: dense_link_bits / link_bits
    inner_bits: jax.Array  # float32[]: leaving one device on the inner axis and the model axis; in no figure above
    sent: jax.Array  # float32[]: entries sent, mean over devices
    capacity: jax.Array  # int32[]: entries that fit
    overflow: jax.Array  # float32[]: entries over the forecast thresholds that did not fit, mean over devices
    nonfinite: jax.Array  # int32[]: steps so far in which a gradient was not finite, and nothing was done
    entropy: jax.Array  # float32[]: of the forecasts, bits, mean over elements
    forecast_error: jax.Array  # float32[]: log of the factor from forecast to exact thresholds
    threshold: jax.Array  # float32[S, 2]: magnitude at which each region begins
    asked: jax.Array  # float32[S]: entries asked for
    realised: jax.Array  # float32[S]: entries sent, mean over devices
    segment_entropy: jax.Array  # float32[S]: bits


class CompressState(NamedTuple):
    """State of `compress`; `state_axes` says which of it differs per device."""

    memory: Memory
    scheme: SchemeState
    stats: Stats
    estimate: jax.Array  # float32[n], or [0] without EF21: mean of the devices' estimates, the same on every device


def stats(opt_state: Any) -> Stats:
    """Read the statistics of the last step out of an optimizer's state.

    Args:
      opt_state: any pytree that holds the state of one `compress` (or `partition_compress`), however deep.

    Returns:
      Its Stats, with the bits of `gp.agreeing` among them. Bits of a step in which `optax.MultiSteps` only adds up are
      0; all else is of the last exchange.

    Raises:
      ValueError: there is none, or there are several (then pass the part of the state that is meant).
    """
    last = Stats(*jax.tree.leaves(find_state(opt_state).stats))  # flax's nnx wraps each array
    waits = _adds_up(opt_state)
    if waits is False:
        return last
    return last._replace(**{bits: jnp.where(waits, 0.0, getattr(last, bits)) for bits in SENT + DENSE})


def _adds_up(opt_state: Any) -> jax.Array | bool:
    """Say whether the last step was one of `optax.MultiSteps` that calls no `compress` within: bool[]."""
    waits: jax.Array | bool = False
    for node in states_of(opt_state, optax.MultiStepsState):
        if states_of(node.inner_opt_state, CompressState):
            waits |= (node.mini_step > 0) | _adds_up(node.inner_opt_state)
    return waits


def state_axes(opt_state: Any) -> Any:
    """Say which leaves of an optimizer's state differ per device: 0, and which are replicated: None.

    Use it as in_axes and out_axes of pmap, or of `gp.over_devices`, which is pmap by shard_map.

    Args:
      opt_state: any pytree.

    Returns:
      The same structure with 0 or None in every leaf's place. The memory of `compress` differs, the accumulated
      gradients of `optax.MultiSteps`, and what `gp.local` and `gp.local_updates` hold.

    >>> import jax.numpy as jnp, gradpart_jax as gp
    >>> state = gp.compress(gp.baselines.dense()).init(jnp.zeros(2))
    >>> gp.state_axes(state).memory
    Memory(residual=0, velocity=0)
    """

    def mark(node: Any) -> Any:
        if hasattr(node, "device_axes"):
            return node.device_axes()
        if isinstance(node, CompressState):
            scheme = SchemeState(shared=fill(node.scheme.shared, None), local=fill(node.scheme.local, 0))
            return fill(node, None)._replace(memory=fill(node.memory, 0), scheme=scheme)
        if isinstance(node, optax.MultiStepsState):
            inner = state_axes(node.inner_opt_state)
            return fill(node, None)._replace(inner_opt_state=inner, acc_grads=fill(node.acc_grads, 0))
        return None

    return jax.tree.map(mark, opt_state, is_leaf=_is_marked)


def _is_marked(node: Any) -> bool:
    return isinstance(node, CompressState | optax.MultiStepsState) or hasattr(node, "device_axes")


def fill(tree: Any, axis: int | None) -> Any:
    """Give every leaf of a tree the same axis: 0 where it differs per device, None where it does not."""
    return jax.tree.map(lambda _: axis, tree)


def states_of(opt_state: Any, kind: type) -> list[Any]:
    """List the states of one kind in an optimizer's state.

    Args:
      opt_state: any pytree.
      kind: a class of nodes.

    Returns:
      The nodes, in the tree's order.
    """
    nodes = jax.tree.leaves(opt_state, is_leaf=lambda node: isinstance(node, kind))
    return [node for node in nodes if isinstance(node, kind)]


def find_state(opt_state: Any) -> CompressState:
    """Find the one state of `compress` in an optimizer's state.

    Args:
      opt_state: any pytree.

    Returns:
      The CompressState.

    Raises:
      ValueError: there is none, or there are several.
    """
    found = states_of(opt_state, CompressState)
    if len(found) != 1:
        remedy = "pass the part that is meant"
        if not found:
            remedy = (
                "chain gp.partition_compress into the optimizer; of an nnx.Optimizer pass opt_state, for nnx.state and "
                "nnx.split tell nothing of it"
            )
        raise ValueError(f"opt_state holds {len(found)} states of gp.compress, not one: {remedy}")
    return found[0]


def is_compressed(node: Any) -> bool:
    """Say whether a node of an optimizer's state is that of `compress`."""
    return isinstance(node, CompressState)


def exchanged(opt_state: Any) -> jax.Array | bool:
    """Say whether the last step exchanged anything: bool[]."""
    met: jax.Array | bool = False
    for node in states_of(opt_state, CompressState):
        met |= node.stats.payload_bits > 0
    return met


def add_bits(opt_state: Any, wire: Wire, period: Wire) -> Any:
    """Add what an optimizer has sent besides to its exchanges' statistics of the same step.

    Args:
      opt_state: any pytree, after an update.
      wire: what was sent besides, in this step.
      period: the same since the exchange before this step's, which ratios go by.

    Returns:
      The same; of a step without an exchange a ratio stays that of the last one.
    """

    def add(node: Any) -> Any:
        if not is_compressed(node):
            return node
        stats = node.stats
        payload, link = stats.payload_bits, stats.link_bits
        payload_ratio = ratio(stats.dense_payload_bits, payload + period.payload_bits)
        link_ratio = ratio(stats.dense_link_bits, link + period.link_bits)
        stats = stats._replace(
            payload_bits=payload + wire.payload_bits,
            link_bits=link + wire.link_bits,
            payload_ratio=jnp.where(payload > 0, payload_ratio, stats.payload_ratio),
            link_ratio=jnp.where(link > 0, link_ratio, stats.link_ratio),
        )
        return node._replace(stats=stats)

    return jax.tree.map(add, opt_state, is_leaf=is_compressed)


def ratio(dense: jax.Array, used: jax.Array) -> jax.Array:
    """Say how many times fewer bits were used; 1 where there is no wire."""
    return jnp.where(used > 0, dense / jnp.maximum(used, 1.0), 1.0)
