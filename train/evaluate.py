"""The model that devices share, and its scores on the test split, computed by all of them together.

Running batch statistics are those of the parameters that each device went on from, and of all that it came through.
What devices share are other parameters, and activations under them have other means and variances, tens of times larger
or smaller in the first half of a training. So statistics are taken anew, at the shared parameters, from some batches of
the training split, as by Wu and Johnson, "Rethinking 'Batch' in BatchNorm" (2021), section 3.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import serialization
from jax.sharding import Mesh

import gradpart_jax as gp
from gradpart_jax import accounting
from train import hosts, step
from train.data import Dataset, Split
from train.log import write_whole
from train.network import Network
from train.placing import AXIS, one, place

BATCH = 512
SURVEYED = 8  # batches at most, that statistics are taken from


class Evaluator(NamedTuple):
    """Compiled once for a network."""

    test: Callable[..., jax.Array]  # to float32[W, 2]: sums of each device's losses and right answers
    survey: Callable[..., Any]  # to each device's statistics, a batch taken in
    average: Callable[[Any], Any]
    mesh: Mesh


class Model(NamedTuple):
    """What is evaluated, and kept; replicas."""

    params: Any
    batch_stats: Any  # may be an empty tree

    def save(self, path: Path) -> None:
        """Write the model's variables in flax's msgpack format."""
        kept = {name: tree for name, tree in self._asdict().items() if jax.tree.leaves(tree)}
        write_whole(serialization.msgpack_serialize(jax.tree.map(np.asarray, one(kept))), path)


Scored = tuple[Model, tuple[float, float]]


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

    def survey(params: Any, mean: Any, batch: dict[str, jax.Array], before: jax.Array) -> Any:
        fresh = network.statistics(params, mean, batch)
        return jax.tree.map(lambda old, new: jnp.where(before > 0, old + (new - old) / (before + 1), new), mean, fresh)

    def average(batch_stats: Any) -> Any:
        return jax.tree.map(lambda x: jax.lax.pmean(x, AXIS), batch_stats)

    return Evaluator(
        test=gp.over_devices(test, mesh, AXIS, (None, None, 0), None),
        survey=gp.over_devices(survey, mesh, AXIS, (None, 0, 0, None), 0),
        average=gp.over_devices(average, mesh, AXIS, (0,), None),
        mesh=mesh,
    )


def shared(evaluator: Evaluator, state: step.State, dataset: Dataset) -> Model:
    """Make the model that a training has come to: the same on all devices.

    Args:
      evaluator: of `make`.
      state: placed on the mesh.
      dataset: to take batch statistics from its training split.

    Returns:
      Model.
    """
    params = gp.agreed(state.params, state.opt_state)
    return Model(params, _statistics(evaluator, params, state.batch_stats, dataset.train))


def score(evaluator: Evaluator, model: Model, split: Split) -> tuple[float, float]:
    """Score a model.

    Args:
      evaluator: of `make`.
      model: of `shared`.
      split: to score on.

    Returns:
      Mean loss in nats, and accuracy.
    """
    devices = evaluator.mesh.size
    size = -(-min(BATCH, split.size) // devices) * devices
    share = size // hosts.count()
    sums = []
    for start in range(share * hosts.index(), split.size + share * hosts.index(), size):
        numbers = np.arange(start, start + share)
        batch = split.read(np.minimum(numbers, split.size - 1)) | {"weight": (numbers < split.size).astype(np.float32)}
        sums.append(evaluator.test(*model, _placed(batch, evaluator.mesh)))
    loss, accuracy = np.sum([np.asarray(each, np.float64) for each in sums], axis=(0, 1)) / split.size
    return float(loss), float(accuracy)


def scored(evaluator: Evaluator, state: step.State, dataset: Dataset) -> Scored:
    """Make the shared model and score it on the test split.

    Args:
      evaluator: of `make`.
      state: placed on the mesh.
      dataset: to take batch statistics and examples from.

    Returns:
      Model, mean loss in nats, and accuracy.
    """
    model = shared(evaluator, state, dataset)
    return model, score(evaluator, model, dataset.test)


def _statistics(evaluator: Evaluator, params: Any, batch_stats: Any, split: Split) -> Any:
    """Average the statistics of batches that are spread over a split; those given tell the shapes."""
    if not jax.tree.leaves(batch_stats):
        return batch_stats
    devices = evaluator.mesh.size
    each = -(-min(BATCH, split.size) // devices)
    batches = min(SURVEYED, max(1, split.size // (each * devices)))
    # Neighbours go to different devices and batches: a split may be in the order of its classes.
    spread = np.arange(each * devices * batches) * split.size // (each * devices * batches)
    here = np.split(spread.reshape(each, devices, batches), hosts.count(), axis=1)[hosts.index()]
    for before in range(batches):
        batch = split.read(here[:, :, before].T.reshape(-1))
        count = place(np.float32(before), None, evaluator.mesh)
        batch_stats = evaluator.survey(params, batch_stats, _placed(batch, evaluator.mesh), count)
    return evaluator.average(batch_stats)


def _placed(batch: dict[str, np.ndarray], mesh: Mesh) -> Any:
    """Deal this process's examples out to its devices."""
    devices = mesh.size // hosts.count()
    return place({key: x.reshape(devices, -1, *x.shape[1:]) for key, x in batch.items()}, 0, mesh)


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
