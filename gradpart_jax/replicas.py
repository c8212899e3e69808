"""Parameters that are each device's own for a while, and those that all devices share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from gradpart_jax.local_steps import LocalUpdatesState
from gradpart_jax.states import states_of


def apply_updates(params: Any, updates: Any, opt_state: Any) -> Any:
    """Apply updates as optax does, and make replicas bit-equal after an exchange of `local_updates`.

    p + (a - p) need not round to a: here the anchor itself takes the parameters' place. Call it where update is called,
    inside of the mapped function.

    Args:
      params: as given to update.
      updates: as returned by it.
      opt_state: as returned by it; where it holds no state of `local_updates`, this is `optax.apply_updates`.

    Returns:
      The parameters for the next step.

    Raises:
      ValueError: opt_state holds several states of `local_updates`.
    """
    applied = optax.apply_updates(params, updates)
    found = _find(opt_state)
    if found is None:
        return applied
    return _overlay(found.anchor, applied, lambda a, p: jnp.where(found.met, a, p))


def agreed(params: Any, opt_state: Any) -> Any:
    """Give the parameters that all devices share: those to evaluate, and to keep.

    Running statistics of batch normalisation do not fit them, for they are of the parameters that a device went on
    from: take them anew from some training batches before evaluating (Wu and Johnson, 2021, section 3).

    Args:
      params: of this device.
      opt_state: that belongs to them.

    Returns:
      The parameters after the last exchange of `local_updates`; params themselves where there is none in the state.

    Raises:
      ValueError: opt_state holds several states of `local_updates`.
    """
    found = _find(opt_state)
    return params if found is None else _overlay(found.anchor, params, lambda a, _: a)


def params_axis(opt_state: Any) -> int | None:
    """Say whether parameters differ per device: what pmap's in_axes and out_axes take for them.

    Args:
      opt_state: any pytree.

    Returns:
      0 with `local_updates` in it, for between two exchanges each device has its own; else None.
    """
    return None if _find(opt_state) is None else 0


def _find(opt_state: Any) -> LocalUpdatesState | None:
    found = states_of(opt_state, LocalUpdatesState)
    if len(found) > 1:
        raise ValueError(f"opt_state holds {len(found)} states of gp.local_updates, not one: use one for all leaves")
    return found[0] if found else None


def _overlay(anchor: Any, params: Any, choose: Callable[[Any, Any], Any]) -> Any:
    """Choose leaf by leaf; of leaves that `optax.masked` keeps from `local_updates`, the parameters."""

    def masked(node: Any) -> bool:
        return isinstance(node, optax.MaskedNode)

    kept, (given, structure) = jax.tree.leaves(anchor, is_leaf=masked), jax.tree.flatten(params)
    if len(kept) == len(given):  # flax's nnx wraps an optimizer's leaves otherwise than a model's
        chosen = [p if masked(a) else choose(a, p) for a, p in zip(kept, given, strict=True)]
        return jax.tree.unflatten(structure, chosen)
    return jax.tree.map(lambda a, p: p if masked(a) else choose(a, p), anchor, params, is_leaf=masked)
