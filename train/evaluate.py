"""Scores on the test split, computed by all devices together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

import gradpart_jax as gp
from gradpart_jax import accounting
from train import hosts, step
from train.data import Split
from train.network import Network
from train.placing import AXIS, over_devices, place

BATCH = 512


class Evaluator(NamedTuple):
    """Compiled once for a network."""

    test: Callable[..., jax.Array]  # to float32[W, 2]: sums of each device's losses and right answers
    average: Callable[[Any], Any]
    mesh: Mesh


def make(network: Network, mesh: Mesh) -> Evaluator:
    """Prepare to evaluate.

    Args:
      network: to score.
      mesh: of the devices.

    Returns:
      Evaluator.
    """

    def test(params: Any, batch_stats: Any, batch: dict[str, jax.Array]) -> jax.Array:
        return jax.lax.all_gather(jnp.stack(network.test(params, batch_stats, batch)), AXIS)

    def average(batch_stats: Any) -> Any:
        return jax.tree.map(lambda x: jax.lax.pmean(x, AXIS), batch_stats)

    return Evaluator(over_devices(test, mesh, (None, None, 0), None), over_devices(average, mesh, (0,), None), mesh)


def run(evaluator: Evaluator, state: step.State, split: Split) -> tuple[float, float]:
    """Score the parameters that all devices share; batch statistics are averaged over devices first.

    Args:
      evaluator: of `make`.
      state: placed on the mesh.
      split: to score on.

    Returns:
      Mean loss in nats, and accuracy.
    """
    devices = evaluator.mesh.size
    size = -(-min(BATCH, split.size) // devices) * devices
    share = size // hosts.count()
    stats = evaluator.average(state.batch_stats)
    params = gp.agreed(state.params, state.opt_state)
    sums = []
    for start in range(share * hosts.index(), split.size + share * hosts.index(), size):
        numbers = np.arange(start, start + share)
        batch = split.read(np.minimum(numbers, split.size - 1)) | {"weight": (numbers < split.size).astype(np.float32)}
        batch = {key: x.reshape(devices // hosts.count(), -1, *x.shape[1:]) for key, x in batch.items()}
        sums.append(evaluator.test(params, stats, place(batch, 0, evaluator.mesh)))
    loss, accuracy = np.sum([np.asarray(each, np.float64) for each in sums], axis=(0, 1)) / split.size
    return float(loss), float(accuracy)


def cost(state: step.State, devices: int) -> tuple[float, float]:
    """Count the bytes of averaging batch statistics.

    Args:
      state: placed on the mesh.
      devices: their number.

    Returns:
      Payload and link bytes of one device.
    """
    elements = sum(x.size // devices for x in jax.tree.leaves(state.batch_stats))
    wire = accounting.reduced(accounting.WORD_BITS * elements, devices)
    return float(wire.payload_bits) / 8, float(wire.link_bits) / 8
