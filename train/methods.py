"""What a method is for one training: its settings, its share of a byte budget, and its transformation."""

from __future__ import annotations

from typing import Any

import optax

from gradpart_jax.recipes import AGREEMENT
from gradpart_jax.sizes import settled
from train.config import Config, Exchange, Settings, change, flat
from train.errors import UsageError
from train.labels import TUNED, Label
from train.registry import PLAIN, parameters

# Arguments of a method that a training's common options give, by the option
COMMON = {
    "warmup_steps": "warmup_steps",
    "momentum": "momentum_correction",
    "family": "family",
    "entropy_rule": "entropy_rule",
    "exchange": "exchange",
}


def check_served(label: Label, exchange: Exchange) -> None:
    """Refuse common options that a method would go by as little as if they had not been given.

    Args:
      label: of the method.
      exchange: the common options.

    Raises:
      UsageError: names the option.

    >>> from train.labels import parse_label
    >>> check_served(parse_label("partition"), Exchange(warmup_steps=5))
    """
    for argument, name in COMMON.items():
        value = getattr(exchange, name)
        if label.kind not in PLAIN and argument not in parameters(label.kind) and value != getattr(Exchange(), name):
            raise UsageError(
                f"--{name.replace('_', '-')} {value} is of no use to {label.option} {label.text}: leave it out"
            )


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
    rungs = settings.get("rungs", 1)
    # What is no number the method itself refuses
    return "all_gather" if isinstance(rungs, int) and rungs > 1 else settled(settings["exchange"], devices)


def payload_ratio(label: Label, exchange: Exchange, budget: float | None, devices: int) -> float:
    """Find the payload ratio at which a method costs a link budget.

    Dense training leaves 2 (W - 1) / W buffers on the link, and so do an all-reduce and a leader's exchange; a ring
    all-gather leaves W - 1 payloads; by shares, W + 1 parts are handed over and 2 (W - 1) leave.

    Args:
      label: of the method.
      exchange: the common options.
      budget: link ratio: how many times fewer bits than dense training leave a device; None for a method without one.
      devices: W.

    Returns:
      The ratio; where the budget chooses none, 1 for a method that has none, and the common one for a label's own size.

    >>> from train.labels import parse_label
    >>> [round(payload_ratio(parse_label(name), Exchange("partition", exchange="all_gather"), 50.0, 4)) for name in (
    ...     "partition", "partition:exchange=reduce_scatter", "powersgd")]
    [100, 40, 50]
    """
    if budget is None or not label.budgeted:
        return exchange.ratio if label.method.budgeted else 1.0
    share = {"all_gather": devices / 2, "reduce_scatter": devices / (devices + 1)}
    return budget * share.get(way(label, exchange, devices), 1.0)


def settings_of(label: Label, exchange: Exchange) -> dict[str, Any]:
    """Find a method's arguments: what the label says, else what the common options say.

    Args:
      label: of the method.
      exchange: the common options.

    Returns:
      Keyword arguments, without axis name and ratio.
    """
    common = {argument: getattr(exchange, name) for argument, name in COMMON.items()}
    common["warmup_steps"] = exchange.warmup_exchanges
    known = parameters(label.kind)
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
      UsageError: settings do not go together, such as a recipe and an optimizer, or a share that is kept where nothing
        is remembered.
    """
    values: dict[str, Any] = {}
    if label.kind in PLAIN:
        values = {"local_steps": 1, "recipe": "before", "agreement": 0.0}
    elif label.options.get("recipe", "local") != "local":
        values = {"local_steps": 1, "agreement": 0.0}
    if values or not _remembers(label):
        values["keep_own"] = None
    own = change(config, **values | {key: value for key, value in label.options.items() if key in TUNED})
    kind, agreeing = own.training.optimizer, _may_agree(own)
    chosen = {
        "entropy_rule": "energy" if own.exchange.recipe == "local" and kind != "sgd" else "entropy",
        "nesterov": agreeing or kind == "muon",
        "agreement": AGREEMENT if agreeing else 0.0,
    }
    given = flat(own)
    own = change(own, **{key: value for key, value in chosen.items() if given[key] is None})
    _check_together(own, label)
    return own


def _check_together(config: Config, label: Label) -> None:
    """Refuse settings of one training that do not go together.

    Args:
      config: of `tuned`.
      label: of the method.

    Raises:
      UsageError: names the option and the remedy.
    """
    exchange, steps, kind = config.exchange, config.training.steps, config.training.optimizer
    if exchange.recipe == "after" and kind in ("lion", "muon"):
        raise UsageError(f"--recipe after exchanges moments, and --optimizer {kind} does more: use local or before")
    if exchange.local_steps > steps:
        raise UsageError(
            f"--local-steps {exchange.local_steps} is more than --steps {steps}, and nothing would be exchanged: "
            f"use at most {steps}"
        )
    # The last exchange, at least, is to be a compressed one
    most = (steps // exchange.local_steps - 1) * exchange.local_steps
    if exchange.warmup_steps > most and label.kind not in PLAIN:
        raise UsageError(
            f"--warmup-steps {exchange.warmup_steps} cover all exchanges of --steps {steps}, and nothing would be "
            f"compressed: use at most {most}"
        )
    if exchange.local_steps > 1 and exchange.recipe != "local" and label.kind not in PLAIN:
        raise UsageError(
            f"--local-steps {exchange.local_steps} are each device's own, and --recipe {exchange.recipe} has none: "
            "use --recipe local, or --local-steps 1"
        )
    if exchange.agreement and not _may_agree(config):
        raise UsageError(
            f"--agreement {exchange.agreement:g} serves adam and adamw on each device, and {label.text} has "
            f"--optimizer {kind} --recipe {exchange.recipe}: use 0"
        )
    if exchange.keep_own and not _remembers(label):
        raise UsageError(
            f"--keep-own {exchange.keep_own:g} goes on from what is remembered, and {label.text} remembers nothing: "
            "leave it out"
        )
    if exchange.keep_own is not None and not exchange.apart:
        raise UsageError(
            f"--keep-own {exchange.keep_own:g} serves optimizers on each device, and {label.text} has "
            f"--recipe {exchange.recipe}: leave it out"
        )


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
    known, every = parameters(label.kind), exchange.local_steps
    kept = 1.0 - (exchange.agreement or 0.0)
    if label.budgeted and ratio < every:
        raise UsageError(
            f"--local-steps {every} saves more than the payload ratio of {ratio:g} asked of "
            f"{label.text}: ask for a higher ratio or budget, or take fewer local steps"
        )
    given = {"ratio": ratio / kept / every, "devices": devices}
    settings |= {name: value for name, value in given.items() if name in known}
    lacking = [
        name
        for name, parameter in known.items()
        if parameter.default is parameter.empty and name not in {"axis_name", *settings}
    ]
    if lacking:
        example = f"{label.kind}:{lacking[0]}=0.01"
        raise UsageError(f"{label.option} {label.text} lacks its {lacking[0]}: give one, as in {example}")
    try:
        return label.method.make(axis_name, **settings)
    except (TypeError, ValueError) as error:
        raise UsageError(f"{label.option} {label.text}: {error}") from error


def _may_agree(config: Config) -> bool:
    """Say whether there is an Adam on each device, whose second moment agreement serves."""
    return config.exchange.recipe == "local" and config.training.optimizer in ("adam", "adamw")


def _remembers(label: Label) -> bool:
    """Say whether a method keeps what it has not sent."""
    known = parameters(label.kind)
    return "error_feedback" in known and label.options.get("error_feedback", known["error_feedback"].default) is True
