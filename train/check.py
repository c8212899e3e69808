"""Refusing what cannot work, in one line each, before anything is computed."""

from __future__ import annotations

from train import folders, hosts, models
from train.config import Config
from train.data import Dataset
from train.errors import UsageError
from train.labels import parse_label
from train.limits import MANY, within

LEAST = 4  # pixels of an image's side that are asked for, and that conv needs


def check_data(config: Config, dataset: Dataset) -> None:
    """Check that a data set serves.

    Args:
      config: settled.
      dataset: to learn.

    Raises:
      UsageError: names the option, the value got and the remedy.
    """
    training, task = config.training, config.task
    if training.batch > dataset.train.size:
        parts = config.devices * training.accumulate
        most = dataset.train.size // parts * parts
        remedy = f"use at most {most}" if most else f"choose another --data, or fewer --devices than {config.devices}"
        raise UsageError(f"--batch {training.batch} is more than the {dataset.train.size} training examples: {remedy}")
    if task.augment != "none" and dataset.kind != "image":
        raise UsageError(f"--augment {task.augment} is of images, and --data {task.data} is text: use none")
    if task.model == "conv" and dataset.kind == "image" and min(dataset.inputs[:2]) < LEAST:
        raise UsageError(
            f"--model conv halves images twice, and those of --data {task.data} have {dataset.inputs[0]} x "
            f"{dataset.inputs[1]} pixels: give --image-size, of {LEAST} or more, or use mlp"
        )


def check(config: Config) -> None:
    """Check a configuration.

    Args:
      config: settled.

    Raises:
      UsageError: names the option, the value got and the remedy.
    """
    from gradpart_jax import ENTROPY_RULES, FAMILIES

    task, training, exchange, output = config.task, config.training, config.exchange, config.output
    for option, value, choices in (
        ("--model", task.model, tuple(models.MODELS)),
        ("--family", exchange.family, tuple(FAMILIES)),
        ("--entropy-rule", exchange.entropy_rule or "entropy", tuple(ENTROPY_RULES)),
    ):
        if value not in choices:
            raise UsageError(f"{option} {value} is unknown: choose one of {', '.join(choices)}")
    parse_label(exchange.method)
    within(
        ("--image-size", task.image_size, LEAST, 1024),
        ("--window", task.window, 2, 2**16),
        ("--width", task.width, 1, 2**16),
        ("--layers", task.layers, 1, 1000),
        ("--heads", task.heads, 1, 1000),
        ("--devices", config.devices, 1, 1024),
        ("--steps", training.steps, 1, 10**7),
        ("--batch", training.batch, 1, 2**20),
        ("--accumulate", training.accumulate, 1, 2**20),
        ("--learning-rate", training.learning_rate, 1e-12, 1e6),
        ("--momentum", training.momentum, 0.0, 0.9999),
        ("--b1", training.b1, 0.0, 0.9999),
        ("--b2", training.b2, 0.0, 0.999999),
        ("--weight-decay", training.weight_decay, 0.0, 1.0),
        ("--rise", training.rise, 0.0, 0.5),
        ("--clip", training.clip, 1e-12, 1e12),
        ("--seed", training.seed, 0, MANY - 1),
        ("--ratio", exchange.ratio, 1.0, 1e5),
        ("--local-steps", exchange.local_steps, 1, MANY),
        ("--keep-own", exchange.keep_own, 0.0, 1.0),
        ("--agreement", exchange.agreement, 0.0, 0.99),
        ("--warmup-steps", exchange.warmup_steps, 0, MANY),
        ("--momentum-correction", exchange.momentum_correction, 0.0, 0.9999),
        ("--eval-every", output.eval_every, 1, MANY),
        ("--checkpoint-every", output.checkpoint_every, 0, MANY),
    )
    parts = config.devices * training.accumulate
    if training.batch % parts:
        near = max(parts, round(training.batch / parts) * parts)
        among = f"--devices {config.devices}" + (
            f" times --accumulate {training.accumulate}" if training.accumulate > 1 else ""
        )
        raise UsageError(f"--batch {training.batch} does not divide among {among}: use --batch {near}")
    if hosts.leads():
        folders.check(config)
