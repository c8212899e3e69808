"""One training step over the devices of all processes: local gradients in, equal replicas out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

import gradpart_jax as gp
from gradpart_jax.local_steps import LocalUpdatesState
from gradpart_jax.states import states_of
from train.network import Network
from train.placing import AXIS


class State(NamedTuple):
    """All that a step changes."""

    params: Any  # replicated; per device between two exchanges of local steps
    opt_state: Any  # the compressor's memory per device, and what stands before it; the rest replicated
    batch_stats: Any  # per device
    key: Any  # uint32[2], replicated: of what is random in the model


class Metrics(NamedTuple):
    """Of one step, over all devices."""

    loss: jax.Array  # float32[]
    accuracy: jax.Array  # float32[]
    memory_norm: jax.Array  # float32[]: root of the mean square norm
    signal: jax.Array  # float32[]: of the system, that some process has heard; 0 for none
    skipped: jax.Array  # float32[]: local steps that a device left out so far, summed over devices


def start(network: Network, tx: optax.GradientTransformation, seed: int) -> State:
    """Make one device's fresh state.

    Args:
      network: to train.
      tx: of `optimizer.build`.
      seed: of all that is random.

    Returns:
      State.
    """
    params, batch_stats = network.init(seed)
    return State(params, tx.init(params), batch_stats, jax.random.key_data(jax.random.key(seed + 1)))


def axes_of(state: State) -> State:
    """Say which leaves of a state have a device axis.

    Args:
      state: any.

    Returns:
      0 or None for every leaf.
    """
    return State(
        jax.tree.map(lambda _: gp.params_axis(state.opt_state), state.params),
        gp.state_axes(state.opt_state),
        jax.tree.map(lambda _: 0, state.batch_stats),
        None,
    )


def gradient_of(
    network: Network, state: State, batch: dict[str, jax.Array], key: jax.Array
) -> tuple[Any, jax.Array, jax.Array, Any]:
    """Average one device's gradient over the parts of its batch, one after the other.

    Args:
      network: to train.
      state: of this device.
      batch: with a leading axis of parts.
      key: of what is random in the model.

    Returns:
      Gradient, loss, accuracy, new batch statistics.
    """
    grad = jax.value_and_grad(network.train, has_aux=True)
    parts = next(iter(batch.values())).shape[0]
    if parts == 1:
        (loss, (accuracy, stats)), gradient = grad(
            state.params, state.batch_stats, jax.tree.map(lambda x: x[0], batch), key
        )
        return gradient, loss, accuracy, stats

    def add(carry: Any, part: Any) -> tuple[Any, None]:
        total, stats = carry
        piece, number = part
        (loss, (accuracy, stats)), gradient = grad(state.params, stats, piece, jax.random.fold_in(key, number))
        return (jax.tree.map(jnp.add, total, (gradient, loss, accuracy)), stats), None

    nothing = (jax.tree.map(jnp.zeros_like, state.params), jnp.float32(0.0), jnp.float32(0.0))
    (total, stats), _ = jax.lax.scan(add, (nothing, state.batch_stats), (batch, jnp.arange(parts)))
    gradient, loss, accuracy = jax.tree.map(lambda x: x / parts, total)
    return gradient, loss, accuracy, stats


class Step:
    """A step, compiled when first used, and traced once.

    Args:
      mapped: of `gp.over_devices`.
    """

    def __init__(self, mapped: Any) -> None:
        self._mapped = mapped
        self._compiled: Callable[[State, dict[str, jax.Array], jax.Array], tuple[State, Metrics]] | None = None

    def compile(self, state: State, batch: dict[str, jax.Array], signals: jax.Array) -> bool:
        """Compile for arguments like these, if that was not done yet, and say whether it was not."""
        if self._compiled is not None:
            return False
        self._compiled = self._mapped.lower(state, batch, signals).compile()
        return True

    def __call__(self, state: State, batch: dict[str, jax.Array], signals: jax.Array) -> tuple[State, Metrics]:
        """Advance; the state is donated.

        Args:
          state: placed.
          batch: with leading axes of devices and parts.
          signals: float32[W]: of the system, that the devices' processes have heard; 0 for none.

        Returns:
          State and Metrics.
        """
        self.compile(state, batch, signals)
        assert self._compiled is not None
        return self._compiled(state, batch, signals)


def make_step(network: Network, tx: optax.GradientTransformation, axes: State, mesh: Mesh) -> Step:
    """Make the step of all devices.

    Args:
      network: to train.
      tx: of `optimizer.build`.
      axes: of `axes_of`.
      mesh: of `mesh_of`.

    Returns:
      Step.
    """

    def step(state: State, batch: dict[str, jax.Array], signal: jax.Array) -> tuple[State, Metrics]:
        carried, used = jax.random.split(jax.random.wrap_key_data(state.key))
        own = jax.random.fold_in(used, jax.lax.axis_index(AXIS))
        gradient, loss, accuracy, batch_stats = gradient_of(network, state, batch, own)
        updates, opt_state = tx.update(gradient, state.opt_state, state.params)
        params = gp.apply_updates(state.params, updates, opt_state)
        memories = [node.memory.residual for node in states_of(opt_state, gp.CompressState)]
        owed = sum((jnp.sum(x * x) for x in memories), start=jnp.float32(0.0))
        skipped = sum((node.skipped for node in states_of(opt_state, LocalUpdatesState)), start=jnp.int32(0))
        # Gathered, not summed on the way: in which order a network sums is its own affair
        each = jax.lax.all_gather(jnp.stack([loss, accuracy, owed, signal, skipped.astype(jnp.float32)]), AXIS)
        means = jnp.mean(each, axis=0)
        fresh = State(params, opt_state, batch_stats, jax.random.key_data(carried))
        return fresh, Metrics(means[0], means[1], jnp.sqrt(means[2]), jnp.max(each[:, 3]), jnp.sum(each[:, 4]))

    return Step(gp.over_devices(step, mesh, AXIS, (axes, 0, 0), (axes, None), donate_argnums=0))
