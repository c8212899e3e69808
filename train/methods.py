"""Methods of exchange by name: what `--method` and `train.compare --methods` accept.

A new method is one line in METHODS: its constructor takes the axis name first, and options by keyword. Those that it
has are the options that users may give; a `ratio` among them is the payload ratio asked for.
"""

from __future__ import annotations

import ast
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import optax

import gradpart_jax as gp
from gradpart_jax import baselines
from gradpart_jax.recipes import AGREEMENT
from gradpart_jax.sizes import settled
from train.config import Exchange, Settings, change
from train.errors import UsageError
from train.rivals import density, kept, random_density, rank, rival, width


class Method(NamedTuple):
    """How a method is made, and how its payloads travel."""

    make: Callable[..., optax.GradientTransformation]
    gathers: bool = True  # payloads, which all devices get from all; otherwise it all-reduces
    budgeted: bool = True  # whether it can be asked for a ratio


METHODS: dict[str, Method] = {
    "partition": Method(gp.partition_compress),
    "dense": Method(gp.dense_mean, gathers=False, budgeted=False),
    "bfloat16": Method(rival(functools.partial(baselines.dense, "bfloat16")), gathers=False, budgeted=False),
    "topk": Method(rival(baselines.topk, "ratio", density())),
    "randomk": Method(rival(baselines.randomk, "ratio", random_density), gathers=False),
    "threshold": Method(rival(baselines.threshold, "ratio", density())),
    "dgc": Method(rival(baselines.dgc, "ratio", density(), momentum=0.9)),
    "gaussiank": Method(rival(baselines.gaussiank, "ratio", density(slack=1.25))),
    "redsync": Method(rival(baselines.redsync, "ratio", density(slack=2.0))),
    "sidco": Method(rival(baselines.sidco, "ratio", density(slack=1.25))),
    "scalecom": Method(rival(baselines.scalecom, "ratio", density()), gathers=False),
    "egc": Method(rival(baselines.egc, "ratio", density())),
    "oktopk": Method(rival(baselines.oktopk, "ratio", density(slack=2.5)), gathers=False),
    "lgc": Method(rival(baselines.lgc, "ratio", density(value_bits="code"))),
    "powersgd": Method(rival(baselines.powersgd, "rank", rank), gathers=False),
    "demo": Method(rival(baselines.demo, "keep", kept, memory_decay=0.999)),
    "qsgd": Method(rival(baselines.qsgd, "bits", width, error_feedback=False)),
    "terngrad": Method(rival(baselines.terngrad, error_feedback=False), budgeted=False),
    "signsgd": Method(rival(baselines.signsgd, error_feedback=False), gathers=False, budgeted=False),
    "ef_signsgd": Method(rival(baselines.ef_signsgd), budgeted=False),
    "onebit_sgd": Method(rival(baselines.onebit_sgd), budgeted=False),
    "natural": Method(rival(baselines.natural, error_feedback=False), budgeted=False),
    "int8": Method(rival(baselines.int8), budgeted=False),
}
# Settings of a training that a label may have of its own
TUNED = ("learning_rate", "local_steps", "recipe", "nesterov", "agreement", "keep_own")
PLAIN = ("dense", "bfloat16")  # uncompressed training, which nothing need be done for
RECIPE_NAMES = ("local", "after", "before")
NOT_OPTIONS = {"axis_name", "inner_axis", "model_axis", "ratio", "bits_per_element", "static_args", "devices"}


class Label(NamedTuple):
    """A method as users name it: `name` or `name:key=value,key=value`."""

    text: str
    kind: str
    options: Mapping[str, Any]

    @property
    def method(self) -> Method:
        """The method's entry."""
        return METHODS[self.kind]

    @property
    def folder(self) -> str:
        """The label as part of a folder's name."""
        return self.text.replace(":", "-").replace(",", "-").replace("/", "-")


def way(label: Label, exchange: Exchange, devices: int) -> str:
    """Say how a method's payloads travel.

    Args:
      label: of the method.
      exchange: the common options.
      devices: W.

    Returns:
      "all_gather", "reduce_scatter", "leader" or "all_reduce".
    """
    settings = settings_of(label, exchange)
    if "exchange" not in settings:
        return "all_gather" if label.method.gathers else "all_reduce"
    return "all_gather" if settings.get("rungs", 1) > 1 else settled(settings["exchange"], devices)


def payload_ratio(label: Label, exchange: Exchange, budget: float, devices: int) -> float:
    """Find the payload ratio at which a method costs a link budget.

    Dense training leaves 2 (W - 1) / W buffers on the link, and so do an all-reduce and a leader's exchange; a ring
    all-gather leaves W - 1 payloads; by shares, W + 1 parts are handed over and 2 (W - 1) leave.

    Args:
      label: of the method.
      exchange: the common options.
      budget: link ratio: how many times fewer bits than dense training leave a device.
      devices: W.

    Returns:
      The ratio; 1 where there is none to choose.

    >>> [round(payload_ratio(parse(name), Exchange("partition", exchange="all_gather"), 50.0, 4)) for name in (
    ...     "partition", "partition:exchange=reduce_scatter", "powersgd")]
    [100, 40, 50]
    """
    if not label.method.budgeted:
        return 1.0
    share = {"all_gather": devices / 2, "reduce_scatter": devices / (devices + 1)}
    return budget * share.get(way(label, exchange, devices), 1.0)


def parse(text: str, option: str = "--method") -> Label:
    """Read a label.

    Args:
      text: such as `partition:rungs=2,family=gamma`.
      option: that gave it, for errors.

    Returns:
      Label.

    Raises:
      UsageError: the method or one of its options is unknown.

    >>> parse("partition:rungs=2,family=gamma").options
    {'rungs': 2, 'family': 'gamma'}
    """
    kind, _, rest = text.strip().partition(":")
    if kind not in METHODS:
        raise UsageError(f"{option} {kind or repr(text)} is unknown: choose among {', '.join(METHODS)}")
    own = set(_parameters(kind)) - NOT_OPTIONS
    known = [*sorted(own), *sorted(set(TUNED) - own)]
    options: dict[str, Any] = {}
    for pair in rest.split(",") if rest else []:
        key, equals, value = pair.partition("=")
        if key not in known or not equals:
            offered = ", ".join(f"{name}=..." for name in known) or "none"
            raise UsageError(f"{option} {text}: {pair!r} is no option of {kind}: it has {offered}")
        options[key] = _value(value)
        _check_tuned(key, options[key], f"{option} {text}")
    return Label(text.strip(), kind, options)


def parse_many(text: str, option: str = "--methods") -> list[Label]:
    """Read labels, separated by commas; a piece with `=` alone belongs to the label before it.

    Args:
      text: such as `dense,partition:rungs=2,family=gamma`.
      option: that gave it, for errors.

    Returns:
      Labels.

    Raises:
      UsageError: a method or option is unknown, or a label is given twice.

    >>> [label.text for label in parse_many("dense,partition:rungs=2,family=gamma")]
    ['dense', 'partition:rungs=2,family=gamma']
    """
    return [parse(piece, option) for piece in split(text, option)]


def split(text: str, option: str = "--methods") -> list[str]:
    """Part labels, as `parse_many` does before it reads them."""
    pieces: list[str] = []
    for piece in filter(None, (piece.strip() for piece in text.split(","))):
        if "=" in piece and ":" not in piece and pieces:
            pieces[-1] += ("," if ":" in pieces[-1] else ":") + piece
        else:
            pieces.append(piece)
    if not pieces:
        raise UsageError(f"{option} is empty: choose among {', '.join(METHODS)}")
    twice = {piece for piece in pieces if pieces.count(piece) > 1}
    if twice:
        raise UsageError(f"{option} names {sorted(twice)[0]} twice: name it once")
    return pieces


def settings_of(label: Label, exchange: Exchange) -> dict[str, Any]:
    """Find a method's arguments: what the label says, else what the common options say.

    Args:
      label: of the method.
      exchange: the common options.

    Returns:
      Keyword arguments, without axis name and ratio.
    """
    common = {
        "warmup_steps": exchange.warmup_steps,
        "momentum": exchange.momentum_correction,
        "family": exchange.family,
        "entropy_rule": exchange.entropy_rule,
        "exchange": exchange.exchange,
    }
    known = _parameters(label.kind)
    settings = {key: known[key].default if value is None else value for key, value in common.items() if key in known}
    return settings | {key: value for key, value in label.options.items() if key not in TUNED}


def tuned(config: Settings, label: Label) -> Settings:
    """Find the settings of a training by a method: what the label says, else what the configuration says.

    Args:
      config: settled.
      label: of the method.

    Returns:
      The configuration with the method's own learning rate, local steps, recipe, Nesterov's momentum, agreement,
      entropy rule and share kept. Uncompressed training meets at each step, before the optimizer, where its label
      does not say otherwise.

    Raises:
      UsageError: there is agreement, or a share is kept, where nothing makes use of it.
    """
    values: dict[str, Any] = {}
    if label.kind in PLAIN:
        values = {"local_steps": 1, "recipe": "before", "agreement": 0.0}
    elif label.options.get("recipe", "local") != "local":
        values = {"local_steps": 1, "agreement": 0.0}
    if values or not _remembers(label):
        values["keep_own"] = None
    own = change(config, **values | {key: value for key, value in label.options.items() if key in TUNED})
    scaled = own.exchange.recipe == "local" and own.training.optimizer != "sgd"
    if own.exchange.entropy_rule is None:
        own = change(own, entropy_rule="energy" if scaled else "entropy")
    if own.training.nesterov is None:
        own = change(own, nesterov=scaled)
    if own.exchange.agreement is None:
        own = change(own, agreement=AGREEMENT if scaled else 0.0)
    if own.exchange.agreement and not scaled:
        raise UsageError(
            f"--agreement {own.exchange.agreement:g} serves adam and adamw on each device, and {label.text} has "
            f"--optimizer {own.training.optimizer} --recipe {own.exchange.recipe}: use 0"
        )
    if own.exchange.keep_own and not _remembers(label):
        raise UsageError(
            f"--keep-own {own.exchange.keep_own:g} goes on from what is remembered, and {label.text} remembers "
            "nothing: leave it out"
        )
    if own.exchange.keep_own is not None and own.exchange.recipe != "local" and own.exchange.local_steps == 1:
        raise UsageError(
            f"--keep-own {own.exchange.keep_own:g} serves optimizers on each device, and {label.text} has "
            f"--recipe {own.exchange.recipe}: leave it out"
        )
    return own


def build(
    label: Label, exchange: Exchange, axis_name: str | None, ratio: float, devices: int
) -> optax.GradientTransformation:
    """Make a method's transformation.

    Args:
      label: of the method.
      exchange: the common options, tuned for the method.
      axis_name: of the devices.
      ratio: payload ratio asked for, over all steps; methods without one ignore it.
      devices: that the axis has.

    Returns:
      From local gradients to their mean.

    Raises:
      UsageError: the constructor refuses an option.
    """
    settings = settings_of(label, exchange)
    known, every = _parameters(label.kind), exchange.local_steps
    kept = 1.0 - (exchange.agreement or 0.0)
    if "ratio" in known and ratio < every:
        raise UsageError(
            f"--local-steps {every} saves more than the payload ratio of {ratio:g} asked of "
            f"{label.text}: ask for a higher ratio or budget, or take fewer local steps"
        )
    given = {"ratio": ratio / kept / every, "devices": devices}
    settings |= {name: value for name, value in given.items() if name in known}
    try:
        return label.method.make(axis_name, **settings)
    except (TypeError, ValueError) as error:
        raise UsageError(f"--method {label.text}: {error}") from error


def _remembers(label: Label) -> bool:
    """Say whether a method keeps what it has not sent."""
    known = _parameters(label.kind)
    return "error_feedback" in known and label.options.get("error_feedback", known["error_feedback"].default) is True


def _check_tuned(key: str, value: Any, where: str) -> None:
    """Refuse a setting that a label has of its own, as `check` refuses those of a configuration."""
    if key == "recipe" and value not in RECIPE_NAMES:
        raise UsageError(
            f"{where}: recipe={value} is unknown: choose {', '.join(RECIPE_NAMES[:-1])} or {RECIPE_NAMES[-1]}"
        )
    if key == "agreement" and not (isinstance(value, int | float) and 0 <= value <= 0.99):
        raise UsageError(f"{where}: agreement={value} is out of range: give 0, for none, to 0.99")
    if key == "keep_own" and not (value is None or (isinstance(value, int | float) and 0 <= value <= 1)):
        raise UsageError(f"{where}: keep_own={value} is out of range: give 0 to 1")
    if key == "nesterov" and not isinstance(value, bool):
        raise UsageError(f"{where}: nesterov={value} is unknown: choose true or false")
    if key == "local_steps" and not (type(value) is int and value >= 1):
        raise UsageError(f"{where}: local_steps={value} is out of range: give a whole number from 1 on")
    if key == "learning_rate" and not (isinstance(value, int | float) and 1e-12 <= value <= 1e6):
        raise UsageError(f"{where}: learning_rate={value} is out of range: give 1e-12 to 1e6")


def _parameters(kind: str) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(METHODS[kind].make).parameters


def _value(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return {"true": True, "false": False, "none": None}.get(text.lower(), text)
