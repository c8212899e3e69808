"""A Scheme as an optax gradient transformation, with its memory, statistics and per-device state."""

from __future__ import annotations

import functools
import numbers
import reprlib
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gradpart_jax import accounting, feedback, meshes
from gradpart_jax.checks import check_number, check_state, is_fixed
from gradpart_jax.exchange import AxisName, axis_size
from gradpart_jax.scheme import Reduced, Report, Scheme, dense_report, hold
from gradpart_jax.segments import Layout, layout_of, segment_names, unravel
from gradpart_jax.states import CompressState, Stats, ratio

EF21 = "ef21"
P = ParamSpec("P")
R = TypeVar("R")


def compress(
    scheme: Scheme,
    axis_name: AxisName = None,
    *,
    inner_axis: AxisName = None,
    model_axis: AxisName = None,
    error_feedback: bool | str = True,
    momentum: float | jax.Array | None = None,
    memory_decay: float | jax.Array = 1.0,
    memory_allowance: float | jax.Array = 0.0,
) -> optax.GradientTransformationExtraArgs:
    """Exchange gradients by a compression scheme: local gradients in, their decompressed mean out.

    With gradient g, memory m and scheme C, on each of W devices: a = g + m; every device receives the mean of C(a) over
    devices; m' = decay (a - C(a)). With momentum correction (Lin et al., ICLR 2018), u' = momentum u + g takes g's
    place, and u' is cleared where an entry was sent.

    With EF21 (Richtarik et al., NeurIPS 2021) each device keeps an estimate h of its gradient in place of m, and sends
    what that lacks: h' = h + C(g - h); every device receives the mean of h' over devices, and keeps that too. It wants
    a scheme that contracts, such as top-k or PowerSGD, and large batches.

    With an inner axis, g is first averaged over it, in float32: all chips of a host then compress the same vector and
    hold the same memory, and only hosts exchange payloads. With a model axis each device holds a shard of every
    parameter (or other parameters), compresses that alone, and exchanges it over axis_name with the devices that hold
    the same shard; a non-finite gradient in one shard makes all of them skip the step.

    Chain it after clipping of the local gradient and before the optimizer. Pass *local* gradients: under
    `jax.shard_map(check_vma=True)` gradients with respect to unvarying parameters arrive already summed, and
    compressing them is wrong and saves nothing; cure it with `jax.lax.pcast(params, axis, to="varying")` before
    `jax.grad` (over the inner axis too), or with check_vma=False. Under either, `gp.state_specs` gives the state's
    in_specs and out_specs. Parameters sharded over the chips of a host (FSDP), which are gathered for computing and
    whose gradients are scattered with `psum_scatter`, have that axis as their model axis.

    Where one device's gradient is not finite, all skip the step by themselves. What decides on each device whether to
    update at all (`optax.apply_if_finite`, `optax.skip_not_finite` of `optax.MultiSteps`) belongs behind this, not
    around it: devices that go different ways wait for one another for ever. Undo a loss scale before: memory is of one.

    Args:
      scheme: what is sent and how, such as `gp.baselines.dense()`.
      axis_name: the mapped axis (or tuple of axes) of pmap, vmap or shard_map; None is one device alone, with a
        warning where pmap or shard_map have several.
      inner_axis: a fast axis (or axes), such as the chips of a host, averaged over uncompressed; axis_name is then the
        slow one, of hosts.
      model_axis: the axis (or axes) over which parameters are sharded. Statistics that are one number are averaged
        over it, those of segments are the shard's own, and no leaf of the scheme's state is a scalar.
      error_feedback: whether what is not sent is remembered; "ef21" for an estimate in place of a memory.
      momentum: of momentum correction, in [0, 1); None for none. Then use an optimizer without momentum of its own.
      memory_decay: what the memory is multiplied by each step, in (0, 1].
      memory_allowance: how many times more than once what opposes the memory counts, until that is used up; at least 0.
        Noise then comes to nothing in place of waiting, while what is consistent is summed up and sent: a cumulative
        sum with an allowance (Page, Biometrika 1954). Of use where entries wait for hundreds of steps; 0.2 is mild.

    Returns:
      An `optax.GradientTransformationExtraArgs`; extra arguments are ignored.

    Raises:
      TypeError: scheme is not a Scheme, an axis no name, (in init) a leaf is not real floating point, or (in update)
        the state is another transformation's.
      ValueError: momentum, memory_decay or memory_allowance out of range, or not of use with this error_feedback; an
        axis given twice.
      NameError: (in update) an axis is not mapped.

    >>> import jax, jax.numpy as jnp, gradpart_jax as gp
    >>> tx = gp.compress(gp.baselines.dense(), axis_name="w")
    >>> states = jax.vmap(lambda _: tx.init(jnp.zeros(2)))(jnp.arange(4))
    >>> gradients = jnp.arange(8.0).reshape(4, 2)
    >>> jax.vmap(lambda g, s: tx.update(g, s)[0], axis_name="w")(gradients, states)[0]
    Array([3., 4.], dtype=float32)
    """
    if not isinstance(scheme, Scheme):
        raise TypeError(f"scheme={scheme!r} is not a Scheme: give one such as gp.baselines.dense()")
    meshes.check_apart(axis_name, inner_axis, model_axis)
    check_number("momentum", momentum, at_least=0.0, below=1.0, optional=True)
    check_number("memory_decay", memory_decay, above=0.0, at_most=1.0)
    check_number("memory_allowance", memory_allowance, at_least=0.0, below=float("inf"))
    if not isinstance(error_feedback, bool | np.bool_) and error_feedback != EF21:
        raise ValueError(f"error_feedback={error_feedback!r} is no feedback: give True, False or {EF21!r}")
    by_estimate = error_feedback == EF21
    lossless = is_fixed(memory_decay, 1.0) and is_fixed(memory_allowance, 0.0)
    if by_estimate and (momentum is not None or not lossless):
        raise ValueError(
            "EF21 keeps an estimate, not a memory: leave momentum=None, memory_decay=1.0 and memory_allowance=0.0, "
            "and name them in optax.inject_hyperparams's static_args"
        )
    if momentum is not None and not error_feedback:
        raise ValueError("momentum correction stands on the memory: leave error_feedback on, or momentum=None")

    @_narrow
    def init(params: Any) -> CompressState:
        _check_leaves(params)
        layout = layout_of(params)
        state = CompressState(
            memory=feedback.init(layout, enabled=bool(error_feedback), momentum=momentum is not None),
            scheme=meshes.widen(scheme.init(layout), model_axis),
            stats=_first_stats(layout, scheme),
            estimate=jnp.zeros(layout.total if by_estimate else 0, jnp.float32),
        )
        # To each leaf a buffer of its own, so that a fresh state can be donated.
        return jax.tree.map(jnp.copy, state)

    def update(updates: Any, state: CompressState, params: Any = None, **extra_args: Any) -> tuple[Any, CompressState]:
        del params, extra_args
        layout = layout_of(updates)
        _check_state(state, init, updates)
        if layout.elements == 0:
            return updates, state
        mean, state = exchange(updates, state, layout)
        return unravel(mean, updates, layout), state

    @_narrow
    def exchange(updates: Any, state: CompressState, layout: Layout) -> tuple[jax.Array, CompressState]:
        meshes.check_mapped(axis_name, inner_axis, model_axis)  # collectives do not say what to do
        gradients, inner = meshes.average(updates, inner_axis)
        if by_estimate:
            vector, moving = feedback.difference(gradients, state.memory, layout), state.memory.velocity
        else:
            vector, moving = feedback.add(gradients, state.memory, layout, memory_allowance)
        vector, agreed = meshes.spoil(vector, model_axis)

        def settle(sent: feedback.Sent | jax.Array, finite: jax.Array) -> feedback.Memory:
            if by_estimate:
                return feedback.advance(vector, state.memory, sent, finite)
            return feedback.subtract(vector, moving, state.memory, sent, finite, momentum=momentum, decay=memory_decay)

        before = meshes.narrow(state.scheme, jax.eval_shape(lambda: scheme.init(layout)))
        reduced, scheme_state = scheme.reduce(vector, before, layout, axis_name, settle)
        hold(scheme.name, reduced, scheme_state, before, layout)
        reduced, entropy, told = _across_shards(reduced, layout, model_axis)
        scheme_state = jax.tree.map(lambda new, old: jnp.where(reduced.finite, new, old), scheme_state, before)
        inside = accounting.add(inner, agreed, told).link_bits
        dense = accounting.dense(layout, axis_size(axis_name))
        skipped = state.stats.nonfinite + (~reduced.finite).astype(jnp.int32)
        stats = _stats(reduced.wire, dense, reduced.report, entropy, inside, skipped)
        mean, estimate = reduced.mean, state.estimate
        if by_estimate:
            mean = jnp.where(reduced.finite, estimate + mean, 0.0)
            estimate = jnp.where(reduced.finite, mean, estimate)
        fresh = meshes.widen(scheme_state, model_axis)
        return mean, CompressState(reduced.memory, fresh, stats, estimate)

    return optax.GradientTransformationExtraArgs(init, update)


def _check_leaves(params: Any) -> None:
    for name, leaf in zip(segment_names(params), jax.tree.leaves(params), strict=True):
        if not (isinstance(leaf, numbers.Number) or (hasattr(leaf, "dtype") and hasattr(leaf, "shape"))):
            raise TypeError(
                f"leaf {name!r} is {reprlib.repr(leaf)}, which is no array: leave it out with optax.masked, or make a "
                "class of your own a pytree (jax.tree_util.register_dataclass)"
            )
        dtype = jnp.result_type(leaf)
        if not jnp.issubdtype(dtype, jnp.floating):
            raise TypeError(
                f"leaf {name!r} is {dtype}, and only real floating point can be compressed: "
                "leave it out with optax.masked"
            )


def _check_state(state: CompressState, init: Callable[[Any], CompressState], updates: Any) -> None:
    """Refuse a state that was made for another tree, or by other arguments: of a memory too many nobody would hear."""
    check_state("gp.compress", state, CompressState)
    found, wanted = (_shapes(tree) for tree in (state, jax.eval_shape(init, updates)))
    for name in wanted | found:
        if found.get(name) != wanted.get(name):
            raise ValueError(
                f"state's {name} has the shape {found.get(name)}, and should have {wanted.get(name)}: call init with "
                "the same tree and the same arguments as update"
            )


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): jnp.shape(leaf) for path, leaf in leaves}


def _narrow(function: Callable[P, R]) -> Callable[P, R]:
    """Trace with types of 32 bits where the program has 64, and by JAX's usual promotion of types."""

    @functools.wraps(function)
    def narrow(*arguments: P.args, **named: P.kwargs) -> R:
        with jax.enable_x64(False), jax.numpy_dtype_promotion("standard"):
            return function(*arguments, **named)

    return narrow


def _across_shards(
    reduced: Reduced, layout: Layout, model_axis: AxisName
) -> tuple[Reduced, jax.Array, accounting.Wire]:
    """Make what is one number the same on every shard; the entropy too, and what that carried."""
    report = reduced.report
    sizes = jnp.asarray(layout.sizes, jnp.float32)
    entropy = jnp.sum(report.segment_entropy * sizes) / max(layout.elements, 1)
    if model_axis is None:
        return reduced, entropy, accounting.nothing()
    # Of what went wrong and not of what went right: a mean of ones is not 1 for 41 shards, one of zeros is 0 for any.
    broken = (~reduced.finite).astype(jnp.float32)
    single = [*reduced.wire, report.sent, report.overflow, report.forecast_error, entropy, broken]
    (payload, link, sent, overflow, error, entropy, broken), carried = meshes.share(single, model_axis)
    report = report._replace(sent=sent, overflow=overflow, forecast_error=error)
    shared = reduced._replace(wire=accounting.Wire(payload, link), report=report, finite=broken == 0.0)
    return shared, entropy, carried


def _stats(
    wire: accounting.Wire,
    dense: accounting.Wire,
    report: Report,
    entropy: jax.Array,
    inner_bits: jax.Array,
    nonfinite: jax.Array,
) -> Stats:
    return Stats(
        payload_bits=wire.payload_bits,
        link_bits=wire.link_bits,
        dense_payload_bits=dense.payload_bits,
        dense_link_bits=dense.link_bits,
        payload_ratio=ratio(dense.payload_bits, wire.payload_bits),
        link_ratio=ratio(dense.link_bits, wire.link_bits),
        inner_bits=inner_bits,
        sent=report.sent,
        capacity=report.capacity,
        overflow=report.overflow,
        nonfinite=nonfinite,
        entropy=entropy,
        forecast_error=report.forecast_error,
        threshold=report.threshold,
        asked=report.asked,
        realised=report.realised,
        segment_entropy=report.segment_entropy,
    )


def _first_stats(layout: Layout, scheme: Scheme) -> Stats:
    nothing = accounting.nothing()
    report = jax.tree.map(jnp.zeros_like, dense_report(layout))
    report = report._replace(capacity=jnp.int32(scheme.capacity(layout)))
    return _stats(nothing, nothing, report, jnp.float32(0.0), jnp.float32(0.0), jnp.int32(0))
