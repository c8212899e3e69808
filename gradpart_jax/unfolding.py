"""Muon on tensors as matrices: kernels of attention and of convolutions have more than two axes."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax import contrib

RMS = 0.2  # of what Muon changes, times the rate; that of Adam's (Liu et al., 2025, section 2.2)


def unfolded(params: Any, which: Any = None) -> Any:
    """Say how to unfold each tensor into the matrix that is nearest to a square.

    The first i axes are its rows, the others its columns, at the i that brings their numbers closest. So attention's
    kernels have all heads on one side, and those of convolutions places and inputs on one, outputs on the other.

    Args:
      params: pytree of arrays.
      which: pytree of as many booleans, or a function that makes one of params: of tensors to leave out, False. None
        leaves none out.

    Returns:
      `optax.contrib.MuonDimensionNumbers` of each tensor with two axes or more; None of others.

    >>> import jax.numpy as jnp
    >>> unfolded({"query": jnp.zeros((128, 4, 32)), "bias": jnp.zeros(4)})
    {'bias': None, 'query': MuonDimensionNumbers(reduction_axis=(0,), output_axis=(1, 2))}
    """

    def masked(node: Any) -> bool:  # as optax shows a tree of which only some leaves are meant
        return isinstance(node, optax.MaskedNode)

    def unfold(leaf: Any, wanted: bool = True) -> Any:
        if masked(leaf):
            return leaf
        if leaf.ndim < 2 or not wanted:
            return None
        cut = min(range(1, leaf.ndim), key=lambda i: abs(_log(leaf.shape[:i]) - _log(leaf.shape[i:])))
        return contrib.MuonDimensionNumbers(tuple(range(cut)), tuple(range(cut, leaf.ndim)))

    if which is None:
        return jax.tree.map(unfold, params, is_leaf=masked)
    return jax.tree.map(unfold, params, which(params) if callable(which) else which, is_leaf=masked)


def muon(learning_rate: Any, which: Any = None, **options: Any) -> optax.GradientTransformation:
    """Make optax's Muon on unfolded tensors, with changes of one scale in all leaves, its Adam's included.

    Source: Liu et al., "Muon is scalable for LLM training" (2025), section 2.2.

    Args:
      learning_rate: a number or a schedule.
      which: tensors that Muon serves, as of `unfolded`.
      **options: of `optax.contrib.muon`, over these.

    Returns:
      An `optax.GradientTransformation`.

    >>> import jax.numpy as jnp
    >>> tx, params = muon(-1.0), jnp.eye(8)
    >>> updates, _ = tx.update(params, tx.init(params), params)
    >>> round(float(jnp.sqrt(jnp.mean(updates**2))), 1)
    0.2
    """
    unfold = functools.partial(unfolded, which=which)
    return contrib.muon(learning_rate, **{"muon_weight_dimension_numbers": unfold, "consistent_rms": RMS} | options)


def kept(share: jax.Array) -> jax.Array:
    """Say how much of what a device has not sent it goes on from under Muon: more than under Adam.

    Args:
      share: s in (0, 1], of all entries that an exchange has room for.

    Returns:
      k = s^(1/4), as of `gp.local_updates`: 0.43 at 100 times fewer bytes, 0.22 at 1,000 times, which win with 4
      devices (train/STUDY.md, twelfth look).

    >>> import jax.numpy as jnp
    >>> float(kept(jnp.float32(0.0625)))
    0.5
    """
    return jnp.sqrt(jnp.sqrt(share))


def _log(shape: tuple[int, ...]) -> float:
    return math.log(max(1, math.prod(shape)))
