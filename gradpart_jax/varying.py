"""Types of `jax.shard_map(check_vma=True)`: over which axes of the mesh a value may vary.

There a loop refuses a start that is the same on every device, such as zeros, for a carry that is not. Anywhere else no
value has such axes, and nothing here does anything.
"""

from __future__ import annotations

from typing import Any

import jax


def axes_of(*trees: Any) -> frozenset[Any]:
    """Find the axes over which any of some arrays may vary.

    Args:
      trees: of arrays.

    Returns:
      Names of axes; none outside of `shard_map(check_vma=True)`.
    """
    return frozenset().union(*(_axes_of_type(jax.typeof(leaf)) for leaf in jax.tree.leaves(trees)))


def _axes_of_type(kind: Any) -> frozenset[Any]:
    # Before JAX 0.10 a type bore its axes itself
    return kind.manual_axis_type.varying if hasattr(kind, "manual_axis_type") else kind.vma


def alike(tree: Any, *others: Any) -> Any:
    """Let arrays vary over all axes over which they or others may.

    Args:
      tree: of arrays.
      others: trees of arrays.

    Returns:
      The same arrays.

    >>> import jax.numpy as jnp
    >>> alike(jnp.float32(1.0), jnp.float32(2.0))
    Array(1., dtype=float32)
    """
    return vary(tree, axes_of(tree, others))


def vary(tree: Any, axes: frozenset[Any]) -> Any:
    """Let arrays vary over some axes.

    Args:
      tree: of arrays.
      axes: their names.

    Returns:
      The same arrays.
    """

    def cast(leaf: jax.Array) -> jax.Array:
        missing = tuple(sorted(axes - axes_of(leaf), key=str))
        return jax.lax.pcast(leaf, missing, to="varying") if missing else leaf

    return jax.tree.map(cast, tree)
