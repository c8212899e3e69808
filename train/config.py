"""Settings of a run: one place for every default, checked before anything is computed."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from train.errors import UsageError

EMBEDDED = ("digits", "stdlib")
MODELS = ("conv", "mlp", "transformer")


@dataclasses.dataclass(frozen=True)
class Config:
    """Train with compressed gradient exchange, and beside it uncompressed, over virtual or real devices."""

    data: str = "digits"
    """Data set: digits or stdlib, which are embedded, or any prepared data set of tfds with images and labels."""
    model: str | None = None
    """conv, mlp or transformer; None takes what suits the data set."""
    devices: int = 4
    """Devices to train over; on a machine with CPUs alone, so many virtual ones."""
    ratio: float = 100.0
    """How many times fewer payload bytes than float32 gradients, everything counted; 1 to 100000."""
    steps: int | None = None
    """Training steps; None takes the data set's preset (digits 600, stdlib 1000, else 2000)."""
    batch: int | None = None
    """Examples in a step over all devices; None takes the preset (digits 128, stdlib 32, else 128)."""
    optimizer: Literal["sgd", "adam", "adamw"] | None = None
    """sgd (momentum 0.9), adam or adamw; None takes the preset (digits sgd, stdlib adam)."""
    learning_rate: float | None = None
    """Peak learning rate; None takes the preset (sgd 0.1, adam 0.004)."""
    schedule: Literal["constant", "cosine"] = "cosine"
    """Learning rate over time, after a linear rise over the first 5 % of the steps."""
    clip: float = 1.0
    """Largest norm of each device's local gradient."""
    warmup_steps: int = 0
    """First steps exchanged uncompressed; they cost as much as a hundred compressed ones each."""
    momentum_correction: float | None = None
    """Momentum on each device, before compression (DGC); sgd then has none of its own."""
    entropy_rule: str = "entropy"
    """How entropy shares the budget among layers: fixed, entropy or perplexity."""
    family: str = "pareto"
    """Family of forecast distributions: laplace, normal, generalised_normal, gamma, pareto or mixture."""
    seed: int = 0
    """Of the parameters and of the data order."""
    eval_every: int = 100
    """Steps between evaluations."""
    workdir: Path = Path("runs")
    """Folder of run folders."""
    name: str | None = None
    """Name of the run folder; None makes one of data, ratio and seed."""
    overwrite: bool = False
    """Replace a run folder that exists."""
    resume: bool = False
    """Go on from the newest sound checkpoint of the run folder."""
    checkpoint_every: int = 200
    """Steps between checkpoints; 0 for none."""
    dense_reference: Annotated[bool, tyro.conf.FlagCreatePairsOff] = True
    """Train uncompressed too, for comparison; --no-dense-reference leaves it out."""
    data_dir: Path | None = None
    """Where data sets lie and are prepared; None takes the folder that tfds uses."""

    @property
    def folder(self) -> Path:
        """The run folder."""
        return self.workdir / (self.name or f"{self.data.replace('/', '-')}-{self.ratio:g}x-seed{self.seed}")


PRESETS: dict[str, dict[str, Any]] = {
    "digits": {"model": "conv", "steps": 600, "batch": 128, "optimizer": "sgd"},
    "stdlib": {"model": "transformer", "steps": 1000, "batch": 32, "optimizer": "adam"},
    "": {"model": "conv", "steps": 2000, "batch": 128, "optimizer": "sgd"},
}
LEARNING_RATES = {"sgd": 0.1, "adam": 4e-3, "adamw": 4e-3}


def fill(config: Config) -> Config:
    """Put presets where the user said nothing.

    Args:
      config: as parsed.

    Returns:
      A Config with no None but for name, data_dir and momentum_correction.
    """
    preset = PRESETS.get(config.data, PRESETS[""])
    filled = {key: value for key, value in preset.items() if getattr(config, key) is None}
    config = dataclasses.replace(config, **filled)
    assert config.optimizer is not None
    if config.learning_rate is None:
        config = dataclasses.replace(config, learning_rate=LEARNING_RATES[config.optimizer])
    return config


def check(config: Config) -> None:
    """Refuse what cannot work, in one line each, before anything is computed.

    Args:
      config: filled.

    Raises:
      UsageError: names the option, the value got and the remedy.
    """
    # Imported here: reading the library's tables must not slow --help down.
    from gradpart_jax.families import FAMILIES
    from gradpart_jax.regions import ENTROPY_RULES

    for option, value, choices in (
        ("--model", config.model, MODELS),
        ("--family", config.family, tuple(FAMILIES)),
        ("--entropy-rule", config.entropy_rule, tuple(ENTROPY_RULES)),
    ):
        if value not in choices:
            raise UsageError(f"{option} {value} is unknown: choose one of {', '.join(choices)}")
    if (config.model == "transformer") != (config.data == "stdlib"):
        suited = "transformer" if config.data == "stdlib" else "conv or mlp"
        raise UsageError(f"--model {config.model} does not suit --data {config.data}: use {suited}")
    limits: tuple[tuple[str, Any, float, float], ...] = (
        ("--devices", config.devices, 1, 1024),
        ("--ratio", config.ratio, 1.0, 1e5),
        ("--steps", config.steps, 1, 2**31 - 1),
        ("--batch", config.batch, 1, 2**20),
        ("--learning-rate", config.learning_rate, 1e-12, 1e6),
        ("--clip", config.clip, 1e-12, 1e12),
        ("--warmup-steps", config.warmup_steps, 0, 2**31 - 1),
        ("--momentum-correction", config.momentum_correction, 0.0, 0.9999),
        ("--seed", config.seed, 0, 2**31 - 1),
        ("--eval-every", config.eval_every, 1, 2**31 - 1),
        ("--checkpoint-every", config.checkpoint_every, 0, 2**31 - 1),
    )
    for option, value, least, most in limits:
        if value is not None and not least <= value <= most:
            raise UsageError(f"{option} {value:g} is out of range: give {least:g} to {most:g}")
    assert config.batch is not None
    if config.batch % config.devices:
        near = max(config.devices, round(config.batch / config.devices) * config.devices)
        raise UsageError(f"--batch {config.batch} does not divide among --devices {config.devices}: use --batch {near}")
    if config.folder.exists() and any(config.folder.iterdir()) and not (config.overwrite or config.resume):
        raise UsageError(
            f"run folder {config.folder} exists: go on with --resume, replace it with --overwrite, "
            "or choose another --name"
        )
    if config.resume and config.overwrite:
        raise UsageError("--resume and --overwrite contradict each other: give one of them")
    if config.resume and not config.folder.exists():
        raise UsageError(f"--resume: there is no run folder {config.folder}: leave --resume out to start one")
    parent = config.folder
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise UsageError(f"--workdir {config.workdir} cannot be written to: choose another folder")


def write(config: Config, path: Path) -> None:
    """Write the whole configuration as JSON.

    Args:
      config: filled.
      path: of the file.
    """
    path.write_text(json.dumps(dataclasses.asdict(config), indent=2, default=str) + "\n")
