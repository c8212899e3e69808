"""Where an optimizer's state lies on a mesh, and a training step over its devices."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gradpart_jax.agreement import Agreement
from gradpart_jax.checks import check_axes
from gradpart_jax.exchange import AxisName, names
from gradpart_jax.states import CompressState, state_axes


def state_specs(opt_state: Any, axis_name: AxisName, *, model_axis: AxisName = None, param_specs: Any = None) -> Any:
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
      TypeError: an axis is no name, nor a tuple of names.
      ValueError: a number that differs per device has no dimension to lie along.

    >>> import jax.numpy as jnp, gradpart_jax as gp
    >>> from jax.sharding import PartitionSpec as P
    >>> state = gp.compress(gp.baselines.topk(0.01), "hosts").init(jnp.zeros(64))
    >>> specs = gp.state_specs(state, "hosts")
    >>> specs.memory.residual == P("hosts"), specs.stats.sent == P()
    (True, True)
    """
    check_axes(axis_name=axis_name, model_axis=model_axis)
    shards = names(model_axis)
    own, nowhere = _along((*names(axis_name), *shards)), PartitionSpec()
    structure = None if param_specs is None else jax.tree.structure(param_specs, is_leaf=_is_spec)

    def is_params(node: Any) -> bool:
        if structure is None or jax.tree.structure(node) != structure:
            return False
        specs = jax.tree.leaves(param_specs, is_leaf=_is_spec)
        return all(jnp.ndim(leaf) >= len(spec) for leaf, spec in zip(jax.tree.leaves(node), specs, strict=True))

    def place(axis: int | None, leaf: Any) -> PartitionSpec | None:
        if leaf is None:  # no leaf, but a place that is left empty, as Equinox has them
            return None
        if axis is not None and not jnp.ndim(leaf):
            raise ValueError(
                "a number in opt_state differs per device: map by gp.over_devices, with gp.state_axes in place of specs"
            )
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


def over_devices(
    function: Callable[..., Any],
    mesh: Mesh,
    axis_name: AxisName,
    in_axes: int | tuple[Any, ...] | None = 0,
    out_axes: Any = 0,
    donate_argnums: int | tuple[int, ...] = (),
) -> Any:
    """Map a function over the devices of a mesh, under jit: `jax.pmap` by `jax.shard_map`.

    Arrays may span the devices of many processes, and a state may hold numbers that differ per device, such as the
    counts of an optimizer that each device runs by itself: they are stacked, as pmap has them.

    Args:
      function: of one device's part of each argument.
      mesh: whose axis, or axes, are named here; along others of its axes the function is given all.
      axis_name: that of collectives in the function.
      in_axes: of each argument: 0 for a device axis, None for what is the same on every device; prefixes of arguments,
        such as `gp.state_axes(opt_state)`. One that is no tuple is that of all arguments.
      out_axes: of the result, likewise; what is called the same has to be so, for that is not checked.
      donate_argnums: of arguments whose buffers may be reused.

    Returns:
      The function of whole arrays, compiled by `jax.jit`.

    Raises:
      TypeError: mesh is no mesh; axis_name is no name, nor a tuple of names.
      ValueError: axis_name is none of the mesh's; an axis is neither 0 nor None; (when called) an argument with a
        device axis has other than one row for each device.

    >>> import jax, jax.numpy as jnp, gradpart_jax as gp
    >>> mesh = jax.make_mesh((1,), ("hosts",), devices=jax.devices()[:1])
    >>> mean = gp.over_devices(lambda x: jax.lax.pmean(x, "hosts"), mesh, "hosts", in_axes=(0,), out_axes=None)
    >>> mean(jnp.ones((1, 3))).shape
    (3,)
    """
    check_axes(axis_name=axis_name)
    if not isinstance(mesh, Mesh):
        raise TypeError(f"mesh={reprlib.repr(mesh)} is no mesh: give jax.make_mesh((devices,), (axis_name,))")
    if axis_name is None or not set(names(axis_name)) <= set(mesh.axis_names):
        raise ValueError(f"axis_name={axis_name!r} is no axis of the mesh: give one of {mesh.axis_names}, or a tuple")
    own, everywhere = _along(names(axis_name)), PartitionSpec()
    devices = math.prod(mesh.shape[name] for name in names(axis_name))
    in_axes = tuple(in_axes) if isinstance(in_axes, list) else in_axes
    mesh = Mesh(mesh.devices, mesh.axis_names)  # shard_map would not place arguments on axes that are explicit

    def spec(axis: Any) -> PartitionSpec:
        if axis not in (0, None):
            raise ValueError(f"{axis} in in_axes or out_axes: give 0, a device axis is the first; or None for none")
        return everywhere if axis is None else own

    def specs(axes: Any) -> Any:
        return jax.tree.map(spec, axes, is_leaf=lambda axis: axis is None)

    def row(x: Any, axis: int | None) -> Any:
        return x if axis is None else jax.lax.squeeze(x, [0])

    def check(x: Any, axis: int | None) -> None:
        if axis is not None and jnp.shape(x)[:1] != (devices,):
            raise ValueError(f"an argument of shape {jnp.shape(x)} on {devices} devices: stack one row for each device")

    def one_device(*arguments: Any) -> Any:
        result = function(*each_leaf(row, arguments, in_axes))
        return each_leaf(lambda x, axis: x if axis is None else x[None], result, out_axes)

    made = specs(out_axes)
    mapped = jax.shard_map(one_device, mesh=mesh, in_specs=specs(in_axes), out_specs=made, check_vma=False)

    def whole(*arguments: Any) -> Any:
        if isinstance(in_axes, tuple) and len(in_axes) != len(arguments):
            raise ValueError(f"{len(in_axes)} in_axes for {len(arguments)} arguments: give one for each")
        each_leaf(check, arguments, in_axes)
        return mapped(*arguments)

    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), made, is_leaf=_is_spec)
    return jax.jit(whole, out_shardings=shardings, donate_argnums=donate_argnums)


def each_leaf(function: Callable[[Any, int | None], Any], tree: Any, axes: Any) -> Any:
    """Call a function of each leaf and its axis.

    Args:
      function: of a leaf, and 0 or None.
      tree: any.
      axes: 0 for a device axis, None for what is the same on every device; a prefix of the tree.

    Returns:
      The tree of results.
    """
    return jax.tree.map(
        lambda axis, part: jax.tree.map(lambda x: function(x, axis), part), axes, tree, is_leaf=lambda x: x is None
    )


def _along(axes: tuple[Any, ...]) -> PartitionSpec:
    return PartitionSpec(axes if len(axes) > 1 else axes[0] if axes else None)


def _is_spec(node: Any) -> bool:
    return isinstance(node, PartitionSpec)
