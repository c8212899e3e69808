"""Scores are those of the shared parameters, under batch statistics of their own."""

from typing import Any

import flax.linen as nn
import jax
import numpy as np
import pytest

from train import evaluate, models, placing, step
from train.data import Dataset, Split
from train.network import Network, score

DEVICES = 4


class Small(nn.Module):
    """One normalised layer."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        x = nn.BatchNorm(use_running_average=not train, momentum=models.MOMENTUM)(nn.Dense(6)(x))
        return nn.Dense(3)(nn.relu(x))


class Plain(nn.Module):
    """One layer."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        return nn.Dense(3)(x)


def split_of(inputs: np.ndarray, labels: np.ndarray) -> Split:
    return Split(len(labels), lambda numbers: {"input": inputs[numbers], "label": labels[numbers]})


def test_batch_statistics_are_taken_anew_at_the_shared_parameters() -> None:
    """Whatever devices' own statistics are; in a split that is sorted by class, on devices that all see all classes."""
    draw = np.random.default_rng(0)
    labels = np.repeat(np.arange(3, dtype=np.int32), 1000)
    inputs = (draw.normal(size=(3000, 5)) + 4 * draw.normal(size=(3, 5))[labels]).astype(np.float32)
    tested = draw.choice(3000, 301, replace=False)
    dataset = Dataset((5,), 3, "image", split_of(inputs, labels), split_of(inputs[tested], labels[tested]))
    network = Network(Small(), inputs[:1])
    params, like = network.init(1)
    mesh = placing.mesh_of(DEVICES)
    evaluator = evaluate.make(network, mesh)

    def scored(factor: float) -> tuple[float, float]:
        own: Any = jax.tree.map(lambda x: np.full((DEVICES, *x.shape), factor, np.float32), like)
        state = step.State(placing.place(params, None, mesh), (), placing.place(own, 0, mesh), None)
        return evaluate.score(evaluator, evaluate.shared(evaluator, state, dataset), dataset.test)

    hidden = np.asarray(nn.Dense(6).apply({"params": params["Dense_0"]}, inputs))
    exact = {"BatchNorm_0": {"mean": hidden.mean(axis=0), "var": hidden.var(axis=0)}}
    logits = Small().apply({"params": params, "batch_stats": exact}, inputs[tested])
    each, right = score(logits, labels[tested])
    loss, accuracy = scored(7.0)
    assert (loss, accuracy) == scored(-0.1)
    assert loss == pytest.approx(float(np.mean(each)), rel=0.01)
    assert accuracy == pytest.approx(float(np.mean(right)), abs=0.02)
    stale = {"BatchNorm_0": {"mean": np.full(6, 7.0), "var": np.full(6, 7.0)}}
    stale_loss = np.mean(
        score(Small().apply({"params": params, "batch_stats": stale}, inputs[tested]), labels[tested])[0]
    )
    assert abs(loss - stale_loss) > 0.1


@pytest.mark.parametrize("size", [3, evaluate.BATCH + 1])
def test_examples_that_fill_a_last_batch_up_do_not_count(size) -> None:
    """Of a split that is smaller than a batch on all devices, and of one that ends in a batch of one."""
    draw = np.random.default_rng(1)
    inputs, labels = draw.normal(size=(size, 3)).astype(np.float32), draw.integers(0, 3, size).astype(np.int32)
    network = Network(Plain(), inputs[:1])
    params, none = network.init(0)
    mesh = placing.mesh_of(DEVICES)
    model = evaluate.Model(placing.place(params, None, mesh), none)
    found = evaluate.score(evaluate.make(network, mesh), model, split_of(inputs, labels))
    each, right = score(Plain().apply({"params": params}, inputs), labels)
    assert found == pytest.approx((float(np.mean(each)), float(np.mean(right))), rel=1e-6)
