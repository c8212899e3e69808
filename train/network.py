"""A model as pure functions of its variables, with batch statistics where it has them."""

from __future__ import annotations

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from train import data, models
from train.config import Config
from train.errors import UsageError


class Scores(NamedTuple):
    """Of a batch."""

    loss: jax.Array  # float32[]: cross-entropy in nats, mean or sum
    accuracy: jax.Array  # float32[]: share or number of right answers


class Network(NamedTuple):
    """A model and an input to initialise it with."""

    module: nn.Module
    example: np.ndarray

    def init(self, seed: int) -> tuple[Any, Any]:
        """Make fresh parameters and batch statistics; the latter may be an empty tree."""
        variables = self.module.init(jax.random.key(seed), self.example)
        return variables["params"], variables.get("batch_stats", {})

    def train(
        self, params: Any, batch_stats: Any, batch: dict[str, jax.Array], key: jax.Array
    ) -> tuple[jax.Array, tuple[jax.Array, Any]]:
        """Score a batch in training.

        Args:
          params: of the model.
          batch_stats: running statistics of this device.
          batch: input and label.
          key: of what is random in the model.

        Returns:
          Mean loss; accuracy and new batch statistics.
        """
        variables = {"params": params, "batch_stats": batch_stats}
        logits, changed = self.module.apply(
            variables, batch["input"], train=True, rngs={"dropout": key}, mutable=["batch_stats"]
        )
        each, right = score(logits, batch["label"])
        return jnp.mean(each), (jnp.mean(right), changed.get("batch_stats", batch_stats))

    def statistics(self, params: Any, batch_stats: Any, batch: dict[str, jax.Array]) -> Any:
        """Find a batch's own statistics, which no earlier batch and no other parameters have a part in.

        Args:
          params: of the model.
          batch_stats: of the same shapes.
          batch: input.

        Returns:
          Batch statistics.
        """
        nothing = jax.tree.map(jnp.zeros_like, batch_stats)
        variables = {"params": params, "batch_stats": nothing}
        _, changed = self.module.apply(variables, batch["input"], train=True, mutable=["batch_stats"])
        return jax.tree.map(lambda x: x / (1 - models.MOMENTUM), changed["batch_stats"])

    def test(self, params: Any, batch_stats: Any, batch: dict[str, jax.Array]) -> Scores:
        """Score a batch by running statistics.

        Args:
          params: of the model.
          batch_stats: of these parameters.
          batch: input, label, and the weight of each example.

        Returns:
          Sums over the batch, of each example's mean.
        """
        logits = self.module.apply({"params": params, "batch_stats": batch_stats}, batch["input"], train=False)
        each, right = (x.reshape(x.shape[0], -1).mean(axis=1) for x in score(logits, batch["label"]))
        return Scores(jnp.sum(each * batch["weight"]), jnp.sum(right * batch["weight"]))


def build(config: Config, dataset: data.Dataset) -> Network:
    """Build the model that a configuration names.

    Args:
      config: settled.
      dataset: to learn.

    Returns:
      Network.

    Raises:
      UsageError: the model does not suit the data set, or has no such sizes.
    """
    task = config.task
    if not models.suits(task.model, dataset.kind):
        suited = [name for name in models.MODELS if models.suits(name, dataset.kind)]
        raise UsageError(f"--model {task.model} does not suit --data {task.data}: use {' or '.join(suited)}")
    given = {"width": task.width, "layers": task.layers, "heads": task.heads}
    sizes = {key: value for key, value in given.items() if value is not None}
    module = models.build(task.model, dataset.classes, jnp.dtype(task.dtype), **sizes)
    return Network(module, dataset.train.read(np.arange(1))["input"])


def score(logits: Any, label: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Score each prediction.

    Args:
      logits: float[..., classes].
      label: int32[...].

    Returns:
      Cross-entropy in nats and whether it is right, float32[...].
    """
    each = optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), label)
    return each, (jnp.argmax(logits, -1) == label).astype(jnp.float32)
