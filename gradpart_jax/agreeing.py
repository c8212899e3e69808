"""Optimizers that know how much devices' gradients agree: a wrapper that measures it, and a scale that uses it."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from gradpart_jax import accounting, agreement
from gradpart_jax.accounting import Wire
from gradpart_jax.agreement import Agreement
from gradpart_jax.checks import check_axes, check_number, check_state, check_transformation
from gradpart_jax.exchange import AxisName
from gradpart_jax.states import CompressState, add_bits, exchanged, fill, state_axes, states_of

BITS_PER_ELEMENT = 0.016  # a twentieth of what 100 times leaves


class AgreeingState(NamedTuple):
    """State of `agreeing`."""

    inner: Any  # of the wrapped transformation: `state_axes` says what of it differs
    agreement: Agreement  # the same on every device
    spent: Wire  # since the last exchange, the same on every device

    def device_axes(self) -> AgreeingState:
        """Say for `state_axes` what of it differs per device."""
        return fill(self, None)._replace(inner=state_axes(self.inner))


def agreeing(
    tx: optax.GradientTransformation, axis_name: AxisName = None, *, bits_per_element: float = BITS_PER_ELEMENT
) -> optax.GradientTransformationExtraArgs:
    """Measure how much devices' gradients agree, and tell a transformation, for `scale_by_agreement` in it.

    In each block of 128 neighbouring entries E[mean(g)^2] / E[g^2] is found from one bit a device (see
    `gradpart_jax.agreement`), as often as the budget allows, and kept over about 200 steps. Collectives do not bear
    standing in what each device does by itself, so that the measurement is taken out here.

    Args:
      tx: fed with local gradients, with what exchanges in it, such as `gp.local_updates(optax.chain(
        optax.scale_by_adam(), gp.scale_by_agreement(), optax.scale(-1e-3)), ...)`. `optax.MultiSteps` belongs around
        all of it: what agrees in the gradients that the optimizer sees is what counts.
      axis_name: the mapped axis; None or one device measures nothing.
      bits_per_element: most payload bits that it may cost, for each entry and step; counted in `gp.stats`.

    Returns:
      An `optax.GradientTransformationExtraArgs`.

    Raises:
      TypeError: tx is no transformation, axis_name no name, or (in update) the state is another transformation's.
      ValueError: bits_per_element is out of range; (in init) tx accumulates by `optax.MultiSteps`, or has an axis and
        no `gp.compress` in it, whose statistics could count what is measured.

    >>> import jax.numpy as jnp, optax, gradpart_jax as gp
    >>> own = gp.local(optax.chain(optax.scale_by_adam(), gp.scale_by_agreement()))
    >>> tx = gp.agreeing(optax.chain(own, gp.partition_compress()))
    >>> updates, _ = tx.update(jnp.ones(2), tx.init(jnp.zeros(2)))
    >>> updates.round(3).tolist()
    [1.0, 1.0]
    """
    check_transformation("tx", tx)
    check_axes(axis_name=axis_name)
    check_number("bits_per_element", bits_per_element, above=0.0, static=True)
    tx = optax.with_extra_args_support(tx)

    def init(params: Any) -> AgreeingState:
        inner = tx.init(params)
        if states_of(inner, optax.MultiStepsState):
            raise ValueError(
                "gp.agreeing stands around optax.MultiSteps and would measure other gradients than the optimizer sees: "
                "put MultiSteps around gp.agreeing"
            )
        if axis_name is not None and not states_of(inner, CompressState):
            raise ValueError(
                "gp.agreeing stands around no exchange whose gp.stats could count what it sends: put it around the "
                "whole optimizer, gp.partition_compress (or gp.dense_mean) included; or give a recipe agreement=0"
            )
        return AgreeingState(inner, agreement.start(params), jax.tree.map(jnp.copy, accounting.nothing()))

    def update(updates: Any, state: AgreeingState, params: Any = None, **extra_args: Any) -> tuple[Any, AgreeingState]:
        check_state("gp.agreeing", state, AgreeingState)
        known, wire = agreement.measure(updates, state.agreement, axis_name, bits_per_element)
        ratio = agreement.agreement_ratio(known, axis_name)
        stepped, inner = tx.update(updates, state.inner, params, agreement_ratio=ratio, **extra_args)
        spent, met = accounting.add(state.spent, wire), exchanged(inner)

        def left(bits: jax.Array) -> jax.Array:
            return jnp.where(met, 0.0, bits)

        return stepped, AgreeingState(add_bits(inner, wire, spent), known, jax.tree.map(left, spent))

    return optax.GradientTransformationExtraArgs(init, update)


def scale_by_agreement() -> optax.GradientTransformationExtraArgs:
    """Divide by the root of E[mean(g)^2] / E[g^2], so that Adam on a device steps as Adam behind the mean would.

    It stands behind `optax.scale_by_adam`, or whatever else divides by a root of the mean square of own gradients,
    within `agreeing`. Steps become up to sqrt(W) times as large, where devices see little but noise: the learning rate
    of dense training is right then.

    Returns:
      An `optax.GradientTransformationExtraArgs`, without state.

    Raises:
      ValueError: (in update) it does not stand within `agreeing`, or not on the same leaves.
    """

    def update(
        updates: Any, state: Any, params: Any = None, *, agreement_ratio: jax.Array | None = None, **extra_args: Any
    ) -> tuple[Any, Any]:
        del params, extra_args
        if agreement_ratio is None:
            raise ValueError("gp.scale_by_agreement knows of no agreement: wrap the whole optimizer by gp.agreeing")
        return agreement.scale_blocks(updates, jax.lax.rsqrt(agreement_ratio)), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
