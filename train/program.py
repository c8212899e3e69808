"""What is compiled for a training, whatever its seed."""

from __future__ import annotations

from typing import NamedTuple

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from train import check, data, evaluate, methods, network, optimizer, placing, step
from train.config import Config
from train.errors import UsageError
from train.labels import Label


class Program(NamedTuple):
    """A training's functions; they are compiled when first used."""

    network: network.Network
    label: Label
    ratio: float  # payload ratio asked for
    tx: optax.GradientTransformation
    axes: step.State
    mesh: Mesh
    advance: step.Step
    evaluator: evaluate.Evaluator
    rates: np.ndarray  # float32[steps]: learning rate of each step


def prepare(config: Config, dataset: data.Dataset, label: Label, ratio: float) -> Program:
    """Build a training's functions.

    Args:
      config: settled and checked.
      dataset: to learn.
      label: of the method.
      ratio: payload ratio asked of it.

    Returns:
      Program.

    Raises:
      UsageError: there are fewer devices than asked for, or the method refuses its options.
    """
    if len(jax.devices()) < config.devices:
        raise UsageError(f"--devices {config.devices} is more than the {len(jax.devices())} that JAX finds: use fewer")
    check.check_data(config, dataset)
    config = methods.tuned(config, label)
    net = network.build(config, dataset)
    exchange = methods.build(label, config.exchange, placing.AXIS, ratio, config.devices)
    tx = optimizer.build(config, label, exchange, ratio)
    axes = step.axes_of(jax.eval_shape(lambda: step.start(net, tx, 0)))
    mesh = placing.mesh_of(config.devices)
    return Program(
        network=net,
        label=label,
        ratio=ratio,
        tx=tx,
        axes=axes,
        mesh=mesh,
        advance=step.make_step(net, tx, axes, mesh),
        evaluator=evaluate.make(net, mesh),
        rates=np.asarray(jax.vmap(optimizer.schedule(config))(np.arange(config.training.steps))),
    )
