"""Scores on the test split, computed by all devices together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from gradpart_jax import accounting
from train import step
from train.data import Split
from train.network import Network

BATCH = 512


class Evaluator(NamedTuple):
    """Compiled once for a network."""

    test: Callable[..., Any]
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
    return Evaluator(
        jax.jit(network.test), jax.jit(lambda stats: jax.tree.map(lambda x: jnp.mean(x, axis=0), stats)), mesh
    )


def run(evaluator: Evaluator, state: step.State, split: Split) -> tuple[float, float]:
    """Score a state; batch statistics are averaged over devices first.

    Args:
      evaluator: of `make`.
      state: placed on the mesh.
      split: to score on.

    Returns:
      Mean loss in nats, and accuracy.
    """
    devices = evaluator.mesh.size
    size = -(-min(BATCH, split.size) // devices) * devices
    stats = evaluator.average(state.batch_stats)
    sums = []
    for start in range(0, split.size, size):
        numbers = np.arange(start, start + size)
        batch = split.read(np.minimum(numbers, split.size - 1)) | {"weight": (numbers < split.size).astype(np.float32)}
        sums.append(evaluator.test(state.params, stats, step.place(batch, 0, evaluator.mesh)))
    loss, accuracy = (float(sum(float(scores[k]) for scores in sums) / split.size) for k in (0, 1))
    return loss, accuracy


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
