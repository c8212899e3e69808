"""Debts of owners, where a run goes on with another number of devices or another way of exchange."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import gradpart_jax as gp
from gradpart_jax.segments import Layout
from gradpart_jax.shares import scatter_share


def release(opt_state: Any, like: Any, layout: Layout, first: int, devices: int) -> Any:
    """Turn what devices owe as owners of sums into memories, where shares have changed.

    An owner's debt is one of the mean over devices; as a memory of one device it weighs as many times more. So nothing
    is lost: the sum of memories and of all devices times the debts stays the same.

    Args:
      opt_state: as restored, numpy arrays, with rows of some of the saved devices.
      like: a fresh one, whose shares are those to go on with.
      layout: of the parameters.
      first: number of the device whose row is the first.
      devices: that the state was saved by.

    Returns:
      The state, its debts paid and of the new length wherever that differs.
    """

    def settle(node: Any, fresh: Any) -> Any:
        if not isinstance(node, gp.CompressState):
            return node
        owed = node.scheme.local
        if not isinstance(owed, np.ndarray) or owed.shape[1:] == fresh.scheme.local.shape[1:]:
            return node
        residual: Any = node.memory.residual
        if owed.size and residual.size:
            residual = np.stack(
                [
                    row + devices * np.asarray(scatter_share(jnp.asarray(debt), layout, devices, jnp.int32(first + i)))
                    for i, (row, debt) in enumerate(zip(residual, owed, strict=True))
                ]
            )
        local = np.zeros((len(owed), *fresh.scheme.local.shape[1:]), np.float32)
        return node._replace(memory=node.memory._replace(residual=residual), scheme=node.scheme._replace(local=local))

    return jax.tree.map(settle, opt_state, like, is_leaf=lambda node: isinstance(node, gp.CompressState))
