"""Where an optimizer's state lies on a mesh."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from gradpart_jax.agreement import Agreement
from gradpart_jax.exchange import AxisName, names
from gradpart_jax.states import CompressState, state_axes


def state_specs(
    opt_state: Any, axis_name: AxisName, *, model_axis: AxisName = None, param_specs: Any | None = None
) -> Any:
    """Say how an optimizer's state is sharded: in_specs and out_specs for `jax.shard_map`, or for placing it.

    What differs per device lies side by side along the first dimension, so that each device finds the state that
    `init` makes in its shard: nothing is stacked or squeezed. Make the state where it lives:

        specs = gp.state_specs(jax.eval_shape(tx.init, params), "hosts")
        state = jax.jit(jax.shard_map(tx.init, mesh=mesh, in_specs=P(), out_specs=specs, check_vma=False))(params)

    Args:
      opt_state: any pytree, of arrays or their shapes, as one device has it.
      axis_name: the compressor's, over which payloads are exchanged. An inner axis is not named: chips of a host hold
        the same.
      model_axis: the compressor's, over which parameters are sharded.
      param_specs: of the parameters, a tree of PartitionSpec; parts of the state with the parameters' structure, such
        as moments, are sharded so. Without, they are replicated.

    Returns:
      The same structure of PartitionSpec.

    Raises:
      ValueError: a number that differs per device has no dimension to lie along.

    >>> import jax.numpy as jnp, gradpart_jax as gp
    >>> from jax.sharding import PartitionSpec as P
    >>> state = gp.compress(gp.baselines.topk(0.01), "hosts").init(jnp.zeros(64))
    >>> specs = gp.state_specs(state, "hosts")
    >>> specs.memory.residual == P("hosts"), specs.stats.sent == P()
    (True, True)
    """
    shards = names(model_axis)
    axes = (*names(axis_name), *shards)
    own, nowhere = PartitionSpec(axes if len(axes) > 1 else axes[0] if axes else None), PartitionSpec()
    structure = None if param_specs is None else jax.tree.structure(param_specs, is_leaf=_is_spec)

    def is_params(node: Any) -> bool:
        if structure is None or jax.tree.structure(node) != structure:
            return False
        specs = jax.tree.leaves(param_specs, is_leaf=_is_spec)
        return all(jnp.ndim(leaf) >= len(spec) for leaf, spec in zip(jax.tree.leaves(node), specs, strict=True))

    def place(axis: int | None, leaf: Any) -> PartitionSpec:
        if axis is not None and not jnp.ndim(leaf):
            raise ValueError("a number in opt_state differs per device: stack the state as gp.state_axes says instead")
        return nowhere if axis is None else own

    def refine(node: Any, specs: Any) -> Any:
        if isinstance(node, CompressState | Agreement) and shards:
            return jax.tree.map(
                lambda spec, leaf: PartitionSpec(shards) if spec == nowhere and jnp.ndim(leaf) else spec,
                specs,
                node,
                is_leaf=_is_spec,
            )
        return param_specs if is_params(node) and own not in jax.tree.leaves(specs, is_leaf=_is_spec) else specs

    specs = jax.tree.map(place, state_axes(opt_state), opt_state, is_leaf=lambda axis: axis is None)
    return jax.tree.map(
        refine, opt_state, specs, is_leaf=lambda node: isinstance(node, CompressState | Agreement) or is_params(node)
    )


def _is_spec(node: Any) -> bool:
    return isinstance(node, PartitionSpec)
