"""Settings of a run: the one place for every default."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import tyro

EMBEDDED = ("digits", "stdlib")
VIRTUAL_DEVICES = 4  # on a machine with CPUs alone


@dataclasses.dataclass(frozen=True)
class Task:
    """What is learned."""

    preset: Literal["digits", "stdlib", "mnist", "cifar10", "imagenette", "lm-small"] | None = None
    """Defaults of a task; None takes those of the data set. Other options override it."""
    data: str = "digits"
    """Data set: digits or stdlib, which are embedded, or any of tfds with labelled images or text."""
    data_dir: Path | None = None
    """Where data sets lie and are prepared; None takes the folder that tfds uses."""
    image_size: int | None = None
    """Side that images are brought to; None keeps those of one fixed size, and takes what is usual for the others."""
    window: int | None = None
    """Bytes of text that a model sees at once; None takes 64."""
    augment: Literal["none", "flip-crop"] = "none"
    """What is done to training images: flip-crop mirrors half of them and shifts all by up to an eighth."""
    model: str = "conv"
    """Model: conv, mlp, lenet5, resnet20, resnet56, resnet18, resnet50, vgg16 or transformer."""
    width: int | None = None
    """Width of a transformer; None takes the model's own."""
    layers: int | None = None
    """Layers of a transformer; None takes the model's own."""
    heads: int | None = None
    """Attention heads of a transformer; None takes the model's own."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """What the model computes in; parameters and memory stay float32."""


@dataclasses.dataclass(frozen=True)
class Training:
    """How it is learned."""

    devices: int | None = None
    """In all processes together; None: all accelerators; on CPUs 4 virtual ones, or one for each process of several."""
    steps: int = 2000
    """Training steps."""
    batch: int = 128
    """Examples in a step, over all devices."""
    accumulate: int = 1
    """Parts that a device computes its share of a batch in, one after the other, before one exchange: saves memory."""
    optimizer: Literal["sgd", "adam", "adamw", "lion", "muon"] = "sgd"
    """Optimizer; --recipe says which part of it comes before the exchange."""
    learning_rate: float | None = None
    """Peak learning rate; None takes the optimizer's: sgd 0.1, adam and adamw 0.004, lion 0.001, muon 0.01."""
    momentum: float | None = None
    """Momentum of sgd and muon; None takes the optimizer's: sgd 0.9, muon 0.95."""
    b1: float = 0.9
    """Decay of the first moment of adam and adamw, which is their momentum; of lion's too, and where muon is adam."""
    b2: float | None = None
    """Decay of the second moment of adam and adamw, of lion's momentum; None takes 0.99 for lion, else 0.999."""
    nesterov: bool | None = None
    """Let momentum look a step ahead; None: in muon, and in adam(w) where each device runs it by itself."""
    weight_decay: float | None = None
    """Of leaves with two axes or more; None takes 0.0001 for adamw, else 0. Lion and muon decay as adamw does."""
    schedule: Literal["constant", "linear", "cosine", "step"] = "cosine"
    """Learning rate after its rise: kept, down to 0 on a line or cosine, or a tenth after 1/2 and 3/4 of the steps."""
    rise: float = 0.05
    """Share of the steps over which the learning rate rises from 0 on a line."""
    clip: float = 1.0
    """Largest norm of each device's local gradient."""
    seed: int = 0
    """Of parameters, data order and augmentation."""


@dataclasses.dataclass(frozen=True)
class Exchange:
    """How gradients are exchanged."""

    method: str = "partition"
    """Method of exchange, with its own options where wanted, such as partition:rungs=2,family=gamma."""
    ratio: float = 100.0
    """How many times fewer payload bytes than float32 gradients, everything counted; 1 to 100000."""
    exchange: Literal["all_gather", "reduce_scatter", "leader", "auto"] = "auto"
    """How payloads travel: to all devices, by owners of shares, by a leader's positions; auto goes by the number."""
    recipe: Literal["local", "after", "before"] = "local"
    """Exchange what local optimizers changed, or gradients after moments, or gradients before all."""
    local_steps: int = 1
    """Steps between two exchanges, which send so many times more."""
    keep_own: float | None = None
    """Share of the unsent that a device goes on from, 0 to 1; None: less where less is sent, and among more devices."""
    warmup_steps: int = 0
    """First steps exchanged uncompressed; an exchange then costs as much as a hundred compressed ones."""
    momentum_correction: float | None = None
    """Momentum on each device, before compression (DGC); sgd then has none of its own."""
    entropy_rule: str | None = None
    """How leaves share the budget: fixed, entropy, perplexity or energy; None: energy where devices run all but sgd."""
    agreement: float | None = None
    """Share of the bytes that tell adam(w) on each device how gradients agree; None takes a twentieth there, else 0."""
    family: str = "pareto"
    """Family of forecast distributions: laplace, normal, generalised_normal, gamma, pareto or mixture."""
    dense_reference: bool = True
    """Train uncompressed too, for comparison."""

    @property
    def apart(self) -> bool:
        """Whether devices run the optimizer by themselves, so that their parameters differ between exchanges."""
        return self.recipe == "local" or self.local_steps > 1

    @property
    def warmup_exchanges(self) -> int:
        """How many exchanges the first `warmup_steps` need, one in so many local steps."""
        return -(-self.warmup_steps // self.local_steps)


@dataclasses.dataclass(frozen=True)
class Output:
    """What a run leaves, and where."""

    workdir: Path = Path("runs")
    """Folder of run folders."""
    name: str | None = None
    """Name of the run folder; None makes one of data, ratio and seed."""
    eval_every: int = 100
    """Steps between evaluations."""
    checkpoint_every: int = 200
    """Steps between checkpoints; 0 for none."""
    tensorboard: bool = False
    """Write TensorBoard events too."""
    profile: bool = False
    """Write a JAX trace of five steps, for TensorBoard's profiler or Perfetto."""
    phases: bool = True
    """Measure at the end where a step's time goes: takes as long as compiling the step once or twice more."""


@dataclasses.dataclass(frozen=True)
class Start:
    """How this start goes on from earlier ones; not part of a run's configuration."""

    config: Path | None = None
    """A config.json to take all settings from but the name; other options override it."""
    resume: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Go on from the newest sound checkpoint of the run folder, with the settings that it was started with."""
    overwrite: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Replace a run folder that exists."""


@dataclasses.dataclass(frozen=True)
class Hosts:
    """Several processes, on one machine or many; not part of a run's configuration.

    Under SLURM, Open MPI 4, an indexed Kubernetes job (by jax[k8s]) and on Cloud TPU pods, none of these is needed.
    """

    coordinator: str | None = None
    """HOST:PORT of process 0, the same on every host; None for one process, or for what a cluster says."""
    processes: int | None = None
    """Number of processes, the same on every host."""
    process: int | None = None
    """Number of this process, from 0 on."""
    timeout: float = 300.0
    """Seconds to wait for other processes, at the start and wherever they meet."""
    heartbeat: float = 60.0
    """Seconds without a sign of life after which a process counts as lost, and all end."""
    check_every: int = 100
    """Steps between comparisons of the devices' replicas, by a hash; 0 for none but at checkpoints."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Train with compressed gradient exchange, and beside it uncompressed, over virtual or real devices."""

    task: Task = Task()
    training: Training = Training()
    exchange: Exchange = Exchange()
    output: Output = Output()
    start: Start = Start()
    hosts: Hosts = Hosts()

    @property
    def folder(self) -> Path:
        """The folder of this program's runs, one in it for each method."""
        name = f"{self.task.data.replace('/', '-')}-{self.exchange.ratio:g}x-seed{self.training.seed}"
        return self.output.workdir / (self.output.name or name)

    @property
    def devices(self) -> int:
        """Devices, once they are known."""
        if self.training.devices is None:
            raise ValueError("devices are not known yet: call settle")
        return self.training.devices


Settings = TypeVar("Settings", bound=Config)

PRESETS: dict[str, dict[str, Any]] = {
    "digits": {"data": "digits", "model": "conv", "steps": 600},
    "stdlib": {
        "data": "stdlib",
        "model": "transformer",
        "steps": 1000,
        "batch": 32,
        "optimizer": "adam",
        "b1": 0.7,
        "momentum": 0.9,
    },
    "mnist": {"data": "mnist", "model": "lenet5", "steps": 2000, "learning_rate": 0.05},
    "cifar10": {
        "data": "cifar10",
        "model": "resnet20",
        "augment": "flip-crop",
        "steps": 20_000,
        "weight_decay": 1e-4,
        "eval_every": 500,
        "checkpoint_every": 500,
    },
    "imagenette": {
        "data": "imagenette/160px-v2",
        "model": "resnet18",
        "augment": "flip-crop",
        "steps": 6000,
        "weight_decay": 1e-4,
        "eval_every": 250,
        "checkpoint_every": 250,
    },
    "lm-small": {
        "data": "stdlib",
        "model": "transformer",
        "width": 256,
        "layers": 4,
        "heads": 8,
        "window": 128,
        "steps": 2000,
        "batch": 32,
        "optimizer": "adam",
        "learning_rate": 2e-3,
    },
}
NOT_KEPT = (Start, Hosts)  # groups of options that are no part of a run's configuration
# What an optimizer takes where the user gave no number, and all others of what is not said here
OPTIMIZERS: dict[str, dict[str, float]] = {
    "sgd": {"learning_rate": 0.1},
    "adam": {"learning_rate": 4e-3},
    "adamw": {"learning_rate": 4e-3, "weight_decay": 1e-4},
    "lion": {"learning_rate": 1e-3, "b2": 0.99},
    "muon": {"learning_rate": 1e-2, "momentum": 0.95},
}
COMMON: dict[str, float] = {"momentum": 0.9, "b2": 0.999, "weight_decay": 0.0}
CHOSEN = ("learning_rate", *COMMON)  # for one optimizer


def groups() -> dict[str, type]:
    """Name the groups of options."""
    return {"task": Task, "training": Training, "exchange": Exchange, "output": Output, "start": Start, "hosts": Hosts}


def flat(config: Config) -> dict[str, Any]:
    """List a configuration's values by option, without those of this start alone.

    Args:
      config: any.

    Returns:
      Values by field name; no name stands in two groups.
    """
    return {
        field.name: getattr(getattr(config, group), field.name)
        for group, kind in groups().items()
        if kind not in NOT_KEPT
        for field in dataclasses.fields(kind)
    }


def change(config: Settings, /, **values: Any) -> Settings:
    """Change values by option, whatever group they stand in.

    Args:
      config: any.
      **values: by field name.

    Returns:
      The changed configuration.

    Raises:
      TypeError: there is no such option.

    >>> change(Config(), steps=3).training.steps
    3
    """
    for group, kind in groups().items():
        own = {field.name: values.pop(field.name) for field in dataclasses.fields(kind) if field.name in values}
        config = dataclasses.replace(config, **{group: dataclasses.replace(getattr(config, group), **own)})
    if values:
        raise TypeError(f"no such options: {', '.join(values)}")
    return config


def base(values: Mapping[str, Any]) -> Config:
    """Find the defaults: of the preset, or else of the data set.

    Args:
      values: of which preset, data and optimizer are looked at.

    Returns:
      A configuration.
    """
    name, source = values.get("preset"), values.get("data", Task.data)
    if name is None:
        name = next((key for key, preset in PRESETS.items() if preset["data"] == source), None)
    made = change(Config(), **PRESETS.get(name or "", {}))
    if values.get("optimizer", made.training.optimizer) == made.training.optimizer:
        return made
    # Where a preset's optimizer has no momentum, the preset's is meant for one that has
    return change(made, learning_rate=None, weight_decay=None)


def make(**values: Any) -> Config:
    """Make a configuration in a program: defaults of preset or data set, and what is given.

    Args:
      **values: by field name.

    Returns:
      The configuration.

    >>> make(data="stdlib", steps=10).task.model
    'transformer'
    """
    return settle(change(base(values), **values))


def settle(config: Settings, devices: int = VIRTUAL_DEVICES) -> Settings:
    """Put numbers where the user left the choice to the program.

    Args:
      config: any.
      devices: to train over where the user gave no number.

    Returns:
      A configuration with devices, learning rate, weight decay, momentum and b2.
    """
    given = flat(config)
    chosen = {"devices": devices} | COMMON | OPTIMIZERS[config.training.optimizer]
    return change(config, **{key: value for key, value in chosen.items() if given[key] is None})
