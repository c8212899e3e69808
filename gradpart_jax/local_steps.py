"""Optimizers that run on each device by itself: a wrapper that says so, and local steps between exchanges."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax

from gradpart_jax.accounting import WORD_BITS
from gradpart_jax.checks import check_axes, check_integer, check_number, check_state, check_transformation
from gradpart_jax.exchange import AxisName, axis_size, position
from gradpart_jax.outlook import GradpartState
from gradpart_jax.replicated import replicated
from gradpart_jax.segments import Layout, layout_of, unravel
from gradpart_jax.shares import scatter_share
from gradpart_jax.states import DENSE, SENT, CompressState, fill, find_state, is_compressed, state_axes, states_of
from gradpart_jax.varying import alike

KEPT = 0.5  # of what a device has not sent, it goes on from that much at most
AMONG, AT_MOST = 1.4, 2.0  # over W: the same by the usual rule, and by any (train/STUDY.md, fourteenth look)

Kept: TypeAlias = float | Callable[[jax.Array], jax.Array] | None


class LocalState(NamedTuple):
    """State of `local`."""

    inner: Any  # differs per device

    def device_axes(self) -> LocalState:
        """Say for `state_axes` that all of it differs per device."""
        return fill(self, 0)


class LocalUpdatesState(NamedTuple):
    """State of `local_updates`."""

    anchor: Any  # parameters after the last exchange, the same on every device, bit for bit
    inner: Any  # differs per device
    exchange: Any  # of the exchange: `state_axes` says what of it differs
    outer: Any  # the same on every device
    step: jax.Array  # int32[]: local steps since the last exchange
    met: jax.Array  # bool[]: whether every device's parameters are the anchor now
    begun: jax.Array  # bool[]: whether a step has been taken: until then whatever parameters come are the anchor
    skipped: jax.Array  # int32[]: local steps left out because this device's gradient or update was not finite

    def device_axes(self) -> LocalUpdatesState:
        """Say for `state_axes` what of it differs per device."""
        return fill(self, None)._replace(inner=fill(self.inner, 0), exchange=state_axes(self.exchange), skipped=0)


def local(tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Mark a transformation that stands before the exchange: its state differs per device.

    `state_axes` then says so. A gradient that is not finite goes through as it is, so that the exchange behind sees it
    and no device takes the step, and leaves the state untouched.

    Args:
      tx: fed with local gradients, such as `optax.scale_by_adam()`.

    Returns:
      An `optax.GradientTransformationExtraArgs`.

    Raises:
      TypeError: tx is no transformation, or (in update) the state is another's.

    >>> import jax.numpy as jnp, optax, gradpart_jax as gp
    >>> tx = optax.chain(gp.local(optax.scale_by_adam()), gp.partition_compress(), optax.scale(-1e-3))
    >>> gp.state_axes(tx.init(jnp.zeros(2)))[0].inner.mu
    0
    """
    check_transformation("tx", tx)
    tx = optax.with_extra_args_support(tx)

    def update(updates: Any, state: LocalState, params: Any = None, **extra_args: Any) -> tuple[Any, LocalState]:
        check_state("gp.local", state, LocalState)
        stepped, inner, finite = _guarded(tx, updates, state.inner, params, extra_args)
        return _choose(finite, stepped, updates), LocalState(inner)

    return optax.GradientTransformationExtraArgs(lambda params: LocalState(tx.init(params)), update)


def local_updates(
    inner: optax.GradientTransformation,
    *,
    every: int,
    exchange: optax.GradientTransformation,
    outer: optax.GradientTransformation | None = None,
    keep_own: Kept = None,
    axis_name: AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    """Let each device take optimizer steps of its own, and exchange what has changed.

    With parameters p_i on device i and the anchor a, which all devices share: every step p_i' = p_i + inner(g_i). After
    each `every` of them, the change since the last exchange goes through the exchange in a gradient's place, with its
    memory m_i and its bytes, and all devices receive the mean d; a' = a - d, or a' = a + outer(d). Then p_i = a', as in
    DiLoCo (Douillard et al., 2023), with compression and memory as in SparseLoCo (Sarfi et al., 2025); or, with
    `keep_own` k, p_i = a' - k m_i: a device goes on from what it has not sent yet, in place of waiting for it, as in
    CSER (Xie et al., NeurIPS 2020). Gradients are fresher for it, most where little is sent at every step. Where owners
    sum (exchange="reduce_scatter"), an owner knows what of the mean it has not passed on, o_i, in its share: with an
    axis name, p_i = a' - k m_i - o_i.

    The first step goes on from the parameters that it is given; those that are changed by anything else afterwards, by
    a transformation behind this one or by clipping, are not what devices share. To load others, call `init` anew.

    Parameters differ per device between exchanges, and with `keep_own` always: keep them so (`gp.params_axis`), apply
    updates by `gp.apply_updates`, which makes them bit-equal after an exchange, and evaluate and save `gp.agreed`.

    Args:
      inner: a whole optimizer, clipping and learning rate included, fed with local gradients; where one is not finite,
        or what is made of it, its device leaves the step out.
      every: local steps to an exchange, at least 1.
      exchange: such as `gp.partition_compress("devices", ratio=25)`: bytes are `every` times fewer than it says.
      outer: an optimizer of the mean change, such as `optax.sgd(0.7, momentum=0.9, nesterov=True)`; None takes the mean
        as it is.
      keep_own: k in [0, 1], the share of what a device has not sent that it goes on from: of the mean over devices, it
        is the best guess that a device has, and a worse one the longer it waits, and the more devices there are. Among
        W of them None takes 0.5, or 2 / W, whichever is less; and where every is 1 and an exchange has room for a share
        s of all entries no more than s^(1/3), or 1.4 / W: among four 0.3 at 100 times fewer bytes, 0.13 at 1,000
        times. It is 0 for an exchange that remembers nothing, or has several memories. A function of s takes the last
        two's place.
      axis_name: the exchange's, for an owner to find its share by, and to know W; None: a device does not go on from
        what it owes, and W is taken for 1.

    Returns:
      An `optax.GradientTransformationExtraArgs`, whose update needs the parameters. In steps without an exchange all
      bits of `gp.stats` are 0; dense bits at an exchange, and ratios, are those of a whole period.

    Raises:
      TypeError: every is not an integer, axis_name no name, inner, exchange or outer no transformation, or (in update)
        the state is another transformation's.
      ValueError: every or keep_own is out of range, or (in init) keep_own is given and exchange has not one memory, or
        (in update) its memory is not of all leaves.

    >>> import jax, jax.numpy as jnp, optax, gradpart_jax as gp
    >>> tx = gp.local_updates(optax.sgd(0.1), every=2, exchange=gp.dense_mean("w"))
    >>> def step(gradient, state, params):
    ...     updates, state = tx.update(gradient, state, params)
    ...     return gp.apply_updates(params, updates, state), state
    >>> params, gradients = jnp.ones((4, 2)), jnp.arange(8.0).reshape(4, 2)
    >>> state = jax.vmap(tx.init)(params)
    >>> for _ in range(2):
    ...     params, state = jax.vmap(step, axis_name="w")(gradients, state, params)
    >>> bool(jnp.all(params == params[:1])), gp.stats(state).payload_ratio.tolist()
    (True, [2.0, 2.0, 2.0, 2.0])
    """
    check_integer("every", every, 1, 2**31 - 1)
    check_axes(axis_name=axis_name)
    check_transformation("inner", inner)
    check_transformation("exchange", exchange)
    if outer is not None:
        check_transformation("outer", outer)
    inner, exchange = optax.with_extra_args_support(inner), optax.with_extra_args_support(exchange)
    outer = optax.sgd(1.0) if outer is None else outer
    fixed, rule = (None, keep_own) if callable(keep_own) else (keep_own, None)
    check_number("keep_own", fixed, at_least=0.0, at_most=1.0, optional=True, static=True)

    def keeps(exchanged: Any) -> bool:
        """Say whether a device goes on from what is owed: not where nothing is remembered, or in several memories."""
        found = states_of(exchanged, CompressState)
        # EF21's is an estimate, and nothing that is owed
        remembers = len(found) == 1 and found[0].memory.residual.size > 0 and not found[0].estimate.size
        if fixed and not remembers:
            raise ValueError(
                f"keep_own={fixed:g} goes on from what is remembered: give an exchange with one memory, and leave "
                "error_feedback on in it"
            )
        return remembers and fixed != 0.0

    def start(anchor: Any, exchanged: Any) -> Any:
        """Give the parameters that a device goes on from after an exchange."""
        if not keeps(exchanged):
            return anchor
        wide, state = _wide(anchor), find_state(exchanged)
        layout = layout_of(wide)
        if state.memory.residual.size != layout.total:
            raise ValueError("exchange leaves some leaves out: put optax.masked around local_updates, or keep_own=0")
        share: float | jax.Array
        if fixed is not None:
            share = fixed
        else:
            devices = axis_size(axis_name)
            share = min(KEPT, AT_MOST / devices)
            if every == 1:
                usual = replicated(_kept)(state.stats.capacity, elements=layout.elements, rule=rule, devices=devices)
                share = jnp.minimum(share, usual)
        ahead = share * state.memory.residual + _owned(state, layout, axis_name)
        return _cast(jax.tree.map(jnp.subtract, wide, unravel(ahead, wide, layout)), anchor)

    def init(params: Any) -> LocalUpdatesState:
        exchanged = exchange.init(_wide(params))  # before the optimizer, for it names what no optimizer takes
        state = LocalUpdatesState(
            anchor=params,
            inner=inner.init(params),
            exchange=exchanged,
            outer=outer.init(_wide(params)),
            step=jnp.int32(0),
            met=jnp.bool_(True),
            begun=jnp.bool_(False),
            skipped=jnp.int32(0),
        )
        keeps(state.exchange)
        # To each leaf a buffer of its own, so that a fresh state can be donated beside the parameters.
        return jax.tree.map(jnp.copy, state)

    def update(
        updates: Any, state: LocalUpdatesState, params: Any = None, **extra_args: Any
    ) -> tuple[Any, LocalUpdatesState]:
        check_state("gp.local_updates", state, LocalUpdatesState)
        if params is None:
            raise ValueError("gp.local_updates needs the parameters: call update(updates, state, params)")
        # Parameters may have been loaded after `init`
        before = _choose(state.begun, state.anchor, params)
        stepped, own, finite = _guarded(inner, updates, state.inner, params, extra_args)
        # In parameters that nobody else sees, what is not finite would stay for good; an exchange leaves it out.
        sound = _all_finite(stepped) if every > 1 else jnp.bool_(True)

        def moved() -> Any:
            return _choose(sound, optax.apply_updates(params, stepped), params)

        def meet(exchanged: Any, outside: Any) -> tuple[Any, Any, Any]:
            if every == 1:  # nothing but this step has changed since
                change = jax.tree.map(jnp.negative, _wide(stepped))
            else:
                change = jax.tree.map(jnp.subtract, _wide(start(before, exchanged)), _wide(moved()))
            mean, exchanged = exchange.update(change, exchanged, _wide(before))
            taken, outside = outer.update(mean, outside, _wide(before))
            return _cast(optax.apply_updates(_wide(before), taken), before), _restated(exchanged, every), outside

        def go_on(exchanged: Any, outside: Any) -> tuple[Any, Any, Any]:
            return before, _restated(exchanged, 0), outside

        due = state.step + 1 == every
        if every == 1:
            anchor, exchanged, outside = meet(state.exchange, state.outer)
            params_next = start(anchor, exchanged)
        else:
            anchor, exchanged, outside = jax.lax.cond(due, meet, go_on, state.exchange, state.outer)
            params_next = _choose(due, start(anchor, exchanged), moved())
        fresh = LocalUpdatesState(
            anchor=anchor,
            inner=own,
            exchange=exchanged,
            outer=outside,
            step=jnp.where(due, 0, state.step + 1),
            met=due & (not keeps(exchanged)),
            begun=jnp.bool_(True),
            skipped=state.skipped + (~(finite & sound)).astype(jnp.int32),
        )
        return jax.tree.map(jnp.subtract, params_next, params), fresh

    return optax.GradientTransformationExtraArgs(init, update)


def _kept(
    capacity: jax.Array, *, elements: int, rule: Callable[[jax.Array], jax.Array] | None, devices: int
) -> jax.Array:
    sent = capacity / elements
    return rule(sent) if rule else jnp.minimum(jnp.cbrt(sent), AMONG / devices)


def _owned(state: CompressState, layout: Layout, axis_name: AxisName) -> jax.Array:
    """Give what this device owes of the mean as an owner of sums, in its places; 0 where nobody owns."""
    sums = state.scheme.local
    if axis_name is None or not (isinstance(state.scheme.shared, GradpartState) and sums.size):
        return jnp.float32(0.0)
    return scatter_share(sums, layout, axis_size(axis_name), position(axis_name))


def _guarded(
    tx: optax.GradientTransformationExtraArgs, updates: Any, state: Any, params: Any, extra_args: dict[str, Any]
) -> tuple[Any, Any, jax.Array]:
    """Update, if the gradient is finite; else give zeros and leave the state as it is.

    A branch, where a choice between the new and the old state would have both in memory.

    Returns:
      Updates, state, and bool[], whether the gradient is finite.
    """
    finite = _all_finite(updates)

    def go() -> tuple[Any, Any]:
        stepped, fresh = tx.update(updates, state, params, **extra_args)
        return alike((stepped, _cast(fresh, state)), updates, state, params)

    like, _ = jax.eval_shape(go)

    def skip() -> tuple[Any, Any]:
        return alike((jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like), state), updates, state, params)

    made = jax.lax.cond(finite, go, skip)
    return *made, finite


def _restated(exchanged: Any, steps: int) -> Any:
    """Let an exchange's statistics be those of so many steps of dense training; of 0, where nothing was sent."""

    def restate(node: Any) -> Any:
        if not is_compressed(node):
            return node
        stats = node.stats
        factors: dict[str, Any] = dict.fromkeys(DENSE, steps) if steps else dict.fromkeys(DENSE + SENT, 0)
        if steps:
            # Without a wire a ratio is 1
            factors["payload_ratio"] = jnp.where(stats.payload_bits > 0, steps, 1)
            factors["link_ratio"] = jnp.where(stats.link_bits > 0, steps, 1)
        changed = {k: getattr(stats, k) * jnp.float32(by) for k, by in factors.items()}
        return node._replace(stats=stats._replace(**changed))

    return jax.tree.map(restate, exchanged, is_leaf=is_compressed)


def _wide(tree: Any) -> Any:
    """Give floats at least 32 bits; an exchange refuses other leaves by name."""

    def widen(x: Any) -> Any:
        kind = getattr(x, "dtype", None)
        short = kind is not None and jnp.issubdtype(kind, jnp.floating) and jnp.finfo(kind).bits < WORD_BITS
        return jnp.asarray(x, jnp.float32) if short else x

    return jax.tree.map(widen, tree)


def _cast(tree: Any, like: Any) -> Any:
    """Give leaves the types of others; keys of random numbers have one alone."""
    return jax.tree.map(lambda x, leaf: x if x.dtype == leaf.dtype else x.astype(leaf.dtype), tree, like)


def _all_finite(tree: Any) -> jax.Array:
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(tree)] or [jnp.bool_(True)]))


def _choose(condition: jax.Array, yes: Any, no: Any) -> Any:
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), yes, no)
