"""One training step over all devices, under pmap: local gradients in, equal replicas out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import gradpart_jax as gp
from train.config import Config

AXIS = "devices"


class State(NamedTuple):
    """All that a step changes."""

    params: Any  # replicated
    opt_state: Any  # the compressor's memory per device, the rest replicated


def optimizer(config: Config, compressed: bool) -> optax.GradientTransformation:
    """Chain clip, exchange and optimizer.

    Args:
      config: filled.
      compressed: whether the exchange is.

    Returns:
      The transformation.
    """
    assert config.steps is not None
    assert config.learning_rate is not None
    rise = max(1, config.steps // 20)
    if config.schedule == "cosine":
        rate = optax.warmup_cosine_decay_schedule(0.0, config.learning_rate, rise, max(config.steps, rise + 1))
    else:
        rate = optax.linear_schedule(0.0, config.learning_rate, rise)
    if compressed:
        exchange = gp.partition_compress(
            AXIS,
            ratio=config.ratio,
            warmup_steps=config.warmup_steps,
            momentum=config.momentum_correction,
            family=config.family,
            entropy_rule=config.entropy_rule,
        )
    else:
        exchange = gp.dense_mean(AXIS)
    local = compressed and config.momentum_correction is not None
    inner = {
        "sgd": lambda: optax.sgd(rate, momentum=None if local else 0.9),
        "adam": lambda: optax.adam(rate),
        "adamw": lambda: optax.adamw(rate),
    }[config.optimizer or "sgd"]()
    return optax.chain(optax.clip_by_global_norm(config.clip), exchange, inner)


def losses(model: nn.Module, params: Any, batch: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """Score a batch.

    Args:
      model: from inputs to logits.
      params: of the model.
      batch: input and label.

    Returns:
      Mean cross-entropy in nats, and accuracy.
    """
    logits = model.apply({"params": params}, batch["input"])
    assert isinstance(logits, jax.Array)
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
    return jnp.mean(loss), jnp.mean(jnp.argmax(logits, -1) == batch["label"])


def mesh_of(devices: int) -> Mesh:
    """Put so many devices on a mesh whose axis is the exchange's."""
    return jax.make_mesh((devices,), (AXIS,), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices])


def spread_out(state: State, axes: State, devices: int) -> State:
    """Give one device's fresh state its device axis, where there is one.

    Args:
      state: of one device.
      axes: of `axes_of`.
      devices: their number.

    Returns:
      State.
    """
    return jax.tree.map(
        lambda x, axis: x if axis is None else jnp.broadcast_to(x, (devices, *x.shape)),
        state,
        axes,
        is_leaf=lambda x: x is None,
    )


def axes_of(state: State) -> State:
    """Say which leaves of a state have a device axis.

    Args:
      state: any.

    Returns:
      0 or None for every leaf.
    """
    return State(jax.tree.map(lambda _: None, state.params), gp.state_axes(state.opt_state))


def place(tree: Any, axes: Any, mesh: Mesh) -> Any:
    """Place arrays on the mesh as the step wants them, so that it is traced once.

    Args:
      tree: arrays.
      axes: 0 for a device axis, None for a replica; a prefix of the tree.
      mesh: of `mesh_of`.

    Returns:
      The arrays, placed.
    """
    if axes is None or isinstance(axes, int):
        axes = jax.tree.map(lambda _: axes, tree)

    def put(axis: int | None, x: Any) -> jax.Array:
        # A copy of its own: equal leaves of a fresh state may share a buffer, which cannot be donated twice.
        spec = PartitionSpec() if axis is None else PartitionSpec(AXIS)
        return jax.device_put(np.array(x), NamedSharding(mesh, spec))

    return jax.tree.map(put, axes, tree, is_leaf=lambda x: x is None)


def make_step(
    model: nn.Module, tx: optax.GradientTransformation, axes: State, mesh: Mesh
) -> Callable[[State, dict[str, jax.Array]], tuple[State, dict[str, jax.Array]]]:
    """Compile a step.

    Args:
      model: from inputs to logits.
      tx: of `optimizer`.
      axes: of `axes_of`.
      mesh: of `mesh_of`.

    Returns:
      A function of (state, batch with a leading device axis) to (state, loss and accuracy); the state is donated.
    """

    def step(state: State, batch: dict[str, jax.Array]) -> tuple[State, dict[str, jax.Array]]:
        score = jax.value_and_grad(lambda params: losses(model, params, batch), has_aux=True)
        (loss, accuracy), gradient = score(state.params)
        updates, opt_state = tx.update(gradient, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = {"loss": jax.lax.pmean(loss, AXIS), "accuracy": jax.lax.pmean(accuracy, AXIS)}
        return State(params, opt_state), metrics

    mapped = jax.pmap(
        step,
        AXIS,
        in_axes=(axes, 0),
        out_axes=(axes, None),
        devices=list(mesh.devices.flat),
        donate_argnums=0,
    )
    return lambda state, batch: mapped(state, batch)
