"""What stands around the exchange: clip, weight decay, learning-rate schedule, optimizer."""

from __future__ import annotations

from typing import Any

import jax
import optax

from train import methods
from train.config import Config


def schedule(config: Config) -> optax.Schedule:
    """Make the learning rate as a function of steps done: a linear rise, then the schedule.

    Args:
      config: settled.

    Returns:
      The schedule.
    """
    training, peak = config.training, config.training.learning_rate
    assert peak is not None
    rise = round(training.rise * training.steps)
    left = max(1, training.steps - rise)
    after = {
        "constant": lambda: optax.constant_schedule(peak),
        "linear": lambda: optax.linear_schedule(peak, 0.0, left),
        "cosine": lambda: optax.cosine_decay_schedule(peak, left),
        "step": lambda: optax.piecewise_constant_schedule(
            peak, {training.steps // 2 - rise: 0.1, training.steps * 3 // 4 - rise: 0.1}
        ),
    }[training.schedule]()
    return optax.join_schedules([optax.linear_schedule(0.0, peak, rise), after], [rise])


def after_exchange(config: Config, label: methods.Label) -> optax.GradientTransformation:
    """Make the optimizer that turns mean gradients into updates.

    Args:
      config: settled.
      label: of the method; where it corrects momentum, sgd has none.

    Returns:
      The transformation.
    """
    training = config.training
    decay, rate = training.weight_decay, schedule(config)
    local = methods.settings_of(label, config.exchange).get("momentum") is not None
    if training.optimizer == "adamw":
        assert decay is not None
        return optax.adamw(rate, weight_decay=decay, mask=_decayed)
    inner = optax.sgd(rate, momentum=None if local else training.momentum or None)
    if training.optimizer == "adam":
        inner = optax.adam(rate)
    return optax.chain(optax.add_decayed_weights(decay, mask=_decayed), inner) if decay else inner


def build(config: Config, label: methods.Label, axis_name: str, ratio: float) -> optax.GradientTransformation:
    """Chain clip, exchange and optimizer.

    Args:
      config: settled.
      label: of the method.
      axis_name: of the devices.
      ratio: payload ratio asked of the method.

    Returns:
      The transformation.
    """
    exchange = methods.build(label, config.exchange, axis_name, ratio, config.devices)
    return optax.chain(optax.clip_by_global_norm(config.training.clip), exchange, after_exchange(config, label))


def _decayed(params: Any) -> Any:
    return jax.tree.map(lambda x: x.ndim > 1, params)
