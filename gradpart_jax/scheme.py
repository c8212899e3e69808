"""The one interface of every compressor: a pair of pure functions over a flat vector."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import chex
import jax
import jax.numpy as jnp

from gradpart_jax.accounting import Wire, nothing
from gradpart_jax.exchange import AxisName
from gradpart_jax.feedback import Memory, Sent
from gradpart_jax.segments import Layout


class SchemeState(NamedTuple):
    """A compressor's own state, split by who holds it."""

    shared: Any  # the same on every device, bit for bit
    local: Any  # differs per device


class Report(NamedTuple):
    """What a compressor says of one step; the same on every device. S segments; regions are (sparse, key)."""

    sent: jax.Array  # float32[]: entries sent, mean over devices
    capacity: jax.Array  # int32[]: entries that fit into the payload
    overflow: jax.Array  # float32[]: entries over the forecast thresholds that did not fit, mean over devices
    threshold: jax.Array  # float32[S, 2]: magnitude above which a region begins, mean over devices
    asked: jax.Array  # float32[S]: entries asked for
    realised: jax.Array  # float32[S]: entries sent, mean over devices
    segment_entropy: jax.Array  # float32[S]: of the forecast magnitude distribution, bits
    forecast_error: jax.Array  # float32[]: log of the factor from forecast to exact thresholds, 0 is exact


class Reduced(NamedTuple):
    """One step's outcome."""

    mean: jax.Array  # float32[n]: average of all devices' decoded payloads, the same on every device
    memory: Memory  # of what was not sent, as `settle` gave it
    finite: jax.Array  # bool[]: whether every device's vector was finite, agreed by all
    wire: Wire
    report: Report


# From what this device's payload decodes to, and whether every device's vector is finite, to the memory.
Settle: TypeAlias = Callable[[Sent | jax.Array, jax.Array], Memory]


class Scheme(NamedTuple):
    """A compressor. `reduce(vector, state, layout, axis_name, settle)` gives `(Reduced, new state)`.

    `init(layout)` makes the first state; `capacity(layout)` says how many entries fit into a payload. `reduce` calls
    `settle` once, best before it decodes: then the vector is of no more use, and its buffer can be the mean's. Shapes
    and dtypes are those of `Reduced`, and of the state that `init` gives; `update` raises TypeError at others.
    """

    name: str
    init: Callable[[Layout], SchemeState]
    reduce: Callable[[jax.Array, SchemeState, Layout, AxisName, Settle], tuple[Reduced, SchemeState]]
    capacity: Callable[[Layout], int]


def dense_report(layout: Layout) -> Report:
    """Report that every element was sent; whoever sends less replaces what differs.

    Args:
      layout: the segments.

    Returns:
      A Report with no thresholds.
    """
    sizes = jnp.asarray(layout.sizes, jnp.float32)
    return Report(
        sent=jnp.float32(layout.elements),
        capacity=jnp.int32(layout.elements),
        overflow=jnp.float32(0.0),
        threshold=jnp.zeros((layout.segments, 2), jnp.float32),
        asked=sizes,
        realised=sizes,
        segment_entropy=jnp.zeros(layout.segments, jnp.float32),
        forecast_error=jnp.float32(0.0),
    )


def hold(name: str, reduced: Reduced, state: SchemeState, before: SchemeState, layout: Layout) -> None:
    """Hold a compressor to its contract, while it is traced: all that it gives has static shapes and dtypes.

    Args:
      name: of the compressor.
      reduced: what it gave; its memory, which is `settle`'s, is not looked at.
      state: what it gave.
      before: the state that it was given.
      layout: the segments.

    Raises:
      TypeError: a structure, shape or dtype is another.
    """

    def contract() -> Reduced:
        mean = jnp.zeros(layout.total, jnp.float32)
        return Reduced(mean, reduced.memory, jnp.bool_(True), nothing(), dense_report(layout))

    for what, found, wanted in (("Reduced", reduced, jax.eval_shape(contract)), ("state", state, before)):
        message = f"the scheme {name!r} gave the {what} first, and its contract asks for the other"
        chex.assert_trees_all_equal_shapes_and_dtypes(found, wanted, custom_message=message, exception_type=TypeError)


def early(step: jax.Array, steps: int) -> jax.Array:
    """Say whether a step is one of the first, and of those once only: a counter wraps after 2^31 of them.

    Args:
      step: int32[], from 0 on.
      steps: how many are first.

    Returns:
      bool[].

    >>> import jax.numpy as jnp
    >>> early(jnp.int32([0, 2, 3, -5]), 3).tolist()
    [True, True, False, False]
    """
    return (step >= 0) & (step < steps)
