"""Going on with another number of devices: what each device owed is owed by the new ones, all of it."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import optax

import gradpart_jax as gp
from gradpart_jax.placement import each_leaf
from train.parts import devices_of
from train.step import State


def redistribute(state: State, axes: State, devices: int) -> tuple[State, str | None]:
    """Give a state that was saved by one number of devices to another number.

    Memories are dealt out so that their sum over devices stays the same: fewer devices each take several over, more
    devices begin with nothing owed. Where memories are added, what float32 cannot hold on one device is handed to the
    next, so that the sum is exact but for the last one's rounding. All else that differs per device is averaged:
    running batch statistics, moments of local optimizers, and parameters between two exchanges.

    Args:
      state: numpy arrays, with the device axis they were saved with.
      axes: of `step.axes_of`.
      devices: to go on with.

    Returns:
      The state for the new devices, and what was done in words; None where the number is the same.
    """
    before = devices_of(state, axes) or devices
    if before == devices:
        return state, None

    def deal(x: np.ndarray, axis: int | None, owed: bool = False) -> np.ndarray:
        if axis is None:
            return x
        if owed and x.size:
            return share(x, devices)
        mean = x.mean(axis=0, dtype=np.float64) if x.size else x[0]
        return np.broadcast_to(mean.astype(x.dtype), (devices, *x.shape[1:]))

    owed = _owed(state.opt_state)
    opt_state = jax.tree.map(deal, state.opt_state, axes.opt_state, owed, is_leaf=lambda x: x is None)
    params, batch_stats = each_leaf(deal, (state.params, state.batch_stats), (axes.params, axes.batch_stats))
    way = (
        f"each takes over the memories of up to {-(-before // devices)}"
        if devices < before
        else f"{devices - before} of them begin with an empty one"
    )
    return (
        State(params, opt_state, batch_stats, state.key),
        f"{before} devices became {devices}: {way}; the sum of memories is the same, and each batch divides anew",
    )


def share(x: np.ndarray, devices: int) -> np.ndarray:
    """Deal rows out to another number of rows with the same sum.

    Args:
      x: float[W, ...].
      devices: rows wanted.

    Returns:
      float[devices, ...].

    >>> share(np.float32([[1], [2], [3]]), 2).tolist()
    [[4.0], [2.0]]
    >>> share(np.float32([[1], [2]]), 3).tolist()
    [[1.0], [2.0], [0.0]]
    """
    if devices >= len(x):
        return np.concatenate([x, np.zeros((devices - len(x), *x.shape[1:]), x.dtype)])
    rows = []
    rest = np.zeros(x.shape[1:], np.float64)
    for device in range(devices):
        owed = x[device::devices].sum(axis=0, dtype=np.float64) + rest
        rows.append(owed.astype(x.dtype))
        rest = owed - rows[-1]
    return np.stack(rows)


def _owed(opt_state: Any) -> Any:
    """Mark what is owed to the others: memories of exchanges, and gradients accumulated for one."""

    def mark(node: Any) -> Any:
        if isinstance(node, optax.MultiStepsState):
            outer = jax.tree.map(lambda _: False, node._replace(inner_opt_state=(), acc_grads=()))
            owed = jax.tree.map(lambda _: True, node.acc_grads)
            return outer._replace(inner_opt_state=_owed(node.inner_opt_state), acc_grads=owed)
        return jax.tree.map(lambda _: isinstance(node, gp.CompressState), node)

    marked = gp.CompressState | optax.MultiStepsState
    return jax.tree.map(mark, opt_state, is_leaf=lambda node: isinstance(node, marked))
