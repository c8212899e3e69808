"""Methods of exchange by name: what `--method` and `train.compare --methods` accept.

A new method is one line in METHODS: its constructor takes the axis name first, and options by keyword. Those that it
has are the options that users may give; a `ratio` among them is the payload ratio asked for.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import optax

import gradpart_jax as gp
from train.config import Exchange
from train.errors import UsageError


def by_gather(budget: float, devices: int) -> float:
    """Find the payload ratio at which a ring all-gather costs a link budget.

    Args:
      budget: link ratio: how many times fewer bits than dense training leave a device.
      devices: W.

    Returns:
      budget W / 2, for dense training leaves 2 (W - 1) / W buffers on the link and a gather W - 1 payloads.

    >>> by_gather(50.0, 4)
    100.0
    """
    return budget * devices / 2


def by_reduce(budget: float, devices: int) -> float:
    """Find the payload ratio at which a ring all-reduce costs a link budget: the same."""
    return budget


class Method(NamedTuple):
    """How a method is made, and what a link budget means to it."""

    make: Callable[..., optax.GradientTransformation]
    payload_ratio: Callable[[float, int], float] | None = by_gather  # None: there is no budget to choose


METHODS: dict[str, Method] = {
    "partition": Method(gp.partition_compress),
    "dense": Method(gp.dense_mean, None),
}
NOT_OPTIONS = {"axis_name", "ratio", "bits_per_element", "static_args"}


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
    known = sorted(set(_parameters(kind)) - NOT_OPTIONS)
    options: dict[str, Any] = {}
    for pair in rest.split(",") if rest else []:
        key, equals, value = pair.partition("=")
        if key not in known or not equals:
            offered = ", ".join(f"{name}=..." for name in known) or "none"
            raise UsageError(f"{option} {text}: {pair!r} is no option of {kind}: it has {offered}")
        options[key] = _value(value)
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
    return [parse(piece, option) for piece in pieces]


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
    }
    known = _parameters(label.kind)
    return {key: value for key, value in common.items() if key in known} | dict(label.options)


def build(label: Label, exchange: Exchange, axis_name: str | None, ratio: float) -> optax.GradientTransformation:
    """Make a method's transformation.

    Args:
      label: of the method.
      exchange: the common options.
      axis_name: of the devices.
      ratio: payload ratio asked for; methods without one ignore it.

    Returns:
      From local gradients to their mean.

    Raises:
      UsageError: the constructor refuses an option.
    """
    settings = settings_of(label, exchange)
    if "ratio" in _parameters(label.kind):
        settings["ratio"] = ratio
    try:
        return label.method.make(axis_name, **settings)
    except (TypeError, ValueError) as error:
        raise UsageError(f"--method {label.text}: {error}") from error


def _parameters(kind: str) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(METHODS[kind].make).parameters


def _value(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return {"true": True, "false": False, "none": None}.get(text.lower(), text)
