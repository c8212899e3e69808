"""What stands around the exchange: clip, weight decay, learning-rate schedule, optimizer."""

from __future__ import annotations

import functools
from typing import Any

import jax
import optax

import gradpart_jax as gp
from gradpart_jax import unfolding
from gradpart_jax.accounting import WORD_BITS
from train import methods, models, placing
from train.config import Config
from train.labels import Label


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


def parts(config: Config, label: Label) -> tuple[optax.GradientTransformation, optax.GradientTransformation]:
    """Make an optimizer in two parts, between which an exchange may stand.

    Args:
      config: settled.
      label: of the method; where it corrects momentum, sgd has none.

    Returns:
      From gradients to directions, by moments or momentum; from directions to updates, by weight decay and rate.
    """
    training = config.training
    assert training.weight_decay is not None
    assert training.momentum is not None
    assert training.b2 is not None
    ahead = bool(training.nesterov)
    decay = [optax.add_decayed_weights(training.weight_decay, mask=_decayed)] if training.weight_decay else []
    corrected = methods.settings_of(label, config.exchange).get("momentum") is not None
    if training.optimizer == "sgd":
        direction = [optax.trace(training.momentum, ahead) if training.momentum and not corrected else optax.identity()]
    elif training.optimizer == "lion":
        direction = [optax.scale_by_lion(b1=training.b1, b2=training.b2)]
    elif training.optimizer == "muon":
        # Directions have the sign of Adam's, and the rate comes later
        own = {"beta": training.momentum, "adam_b1": training.b1, "adam_b2": training.b2, "nesterov": ahead}
        direction = [unfolding.muon(-1.0, functools.partial(_hidden, config.task.model), **own)]
    else:
        direction = [optax.scale_by_adam(b1=training.b1, b2=training.b2, nesterov=ahead)]
    step = [optax.scale_by_learning_rate(schedule(config))]
    if training.optimizer in ("adamw", "lion", "muon"):
        return optax.chain(*direction), optax.chain(*decay, *step)
    return optax.chain(*decay, *direction), optax.chain(*step)


def build(
    config: Config, label: Label, exchange: optax.GradientTransformation, ratio: float
) -> optax.GradientTransformation:
    """Put clip, exchange and optimizer in order.

    Args:
      config: settled, and tuned for the method.
      label: of the method.
      exchange: of `methods.build`.
      ratio: payload ratio asked for, over all steps.

    Returns:
      The transformation.
    """
    clip = optax.clip_by_global_norm(config.training.clip)
    direction, step = parts(config, label)
    if config.exchange.apart:
        told = config.exchange.agreement
        agree = [gp.scale_by_agreement()] if told else []
        whole = optax.chain(clip, direction, *agree, step)
        usual = unfolding.kept if config.training.optimizer == "muon" else None
        meeting = gp.local_updates(
            whole,
            every=config.exchange.local_steps,
            exchange=exchange,
            keep_own=usual if config.exchange.keep_own is None else config.exchange.keep_own,
            axis_name=placing.AXIS,
        )
        return gp.agreeing(meeting, placing.AXIS, bits_per_element=WORD_BITS * told / ratio) if told else meeting
    if config.exchange.recipe == "after":
        return optax.chain(gp.local(optax.chain(clip, direction)), exchange, step)
    return optax.chain(clip, exchange, direction, step)


def _hidden(model: str, params: Any) -> Any:
    """Say which leaves are kernels, but for the last layer's: what it and embeddings do, Adam does better."""
    last = models.last_layer(model, params)

    def hidden(path: tuple[Any, ...], _: Any) -> bool:
        names = [getattr(entry, "key", None) for entry in path]
        return names[-1] == "kernel" and names[0] != last

    return jax.tree_util.tree_map_with_path(hidden, params)


def _decayed(params: Any) -> Any:
    return jax.tree.map(lambda x: x.ndim > 1, params)
