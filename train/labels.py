"""Methods as users name them, with options: what `--method` and `train.compare --methods` accept."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain, combinations
from types import MappingProxyType
from typing import Any, NamedTuple

from train.errors import UsageError
from train.registry import METHODS, Method, parameters

# Settings of a training that a label may have of its own: which values they have, and what is said of others
TUNED: Mapping[str, tuple[Callable[[Any], bool], str]] = MappingProxyType(
    {
        "learning_rate": (lambda x: _between(x, 1e-12, 1e6), "is out of range: give 1e-12 to 1e6"),
        "local_steps": (lambda x: type(x) is int and x >= 1, "is out of range: give a whole number from 1 on"),
        "recipe": (lambda x: x in ("local", "after", "before"), "is unknown: choose local, after or before"),
        "nesterov": (lambda x: isinstance(x, bool), "is unknown: choose true or false"),
        "agreement": (lambda x: _between(x, 0, 0.99), "is out of range: give 0, for none, to 0.99"),
        "keep_own": (lambda x: x is None or _between(x, 0, 1), "is out of range: give 0 to 1"),
    }
)
SIZES = ("density", "rank", "bits", "keep")  # of methods that a budget sizes, where a label does not
NOT_OPTIONS = {"axis_name", "inner_axis", "model_axis", "ratio", "bits_per_element", "devices"}


class Label(NamedTuple):
    """A method as users name it: `name` or `name:key=value,key=value`."""

    text: str
    kind: str
    options: Mapping[str, Any]
    option: str = "--method"  # that gave it, for errors

    @property
    def method(self) -> Method:
        """The method's entry."""
        return METHODS[self.kind]

    @property
    def budgeted(self) -> bool:
        """Whether a budget says how much is sent: neither the method's nature nor an option of the label does."""
        return self.method.budgeted and not any(size in self.options for size in SIZES)

    @property
    def folder(self) -> str:
        """The label as part of a folder's name."""
        return self.text.replace(":", "-").replace(",", "-").replace("/", "-")


def parse_label(text: str, option: str = "--method") -> Label:
    """Read a label.

    Args:
      text: such as `partition:rungs=2,family=gamma`.
      option: that gave it, for errors.

    Returns:
      Label.

    Raises:
      UsageError: the method or one of its options is unknown.

    >>> parse_label("partition:rungs=2,family=gamma").options
    {'rungs': 2, 'family': 'gamma'}
    """
    kind, _, rest = text.strip().partition(":")
    if kind not in METHODS:
        raise UsageError(f"{option} {kind or repr(text)} is unknown: choose among {', '.join(METHODS)}")
    own = set(parameters(kind)) - NOT_OPTIONS
    known = [*sorted(own), *sorted(set(TUNED) - own)]
    options: dict[str, Any] = {}
    for pair in rest.split(",") if rest else []:
        key, equals, value = pair.partition("=")
        if key not in known or not equals:
            offered = ", ".join(f"{name}=..." for name in known) or "none"
            raise UsageError(f"{option} {text}: {pair!r} is no option of {kind}: it has {offered}")
        options[key] = _value(value)
        if key in TUNED and not TUNED[key][0](options[key]):
            raise UsageError(f"{option} {text}: {key}={options[key]} {TUNED[key][1]}")
    return Label(text.strip(), kind, options, option)


def parse_labels(text: str) -> list[Label]:
    """Read --methods: labels, separated by commas; a piece with `=` alone belongs to the label before it.

    Args:
      text: such as `dense,partition:rungs=2,family=gamma`.

    Returns:
      Labels.

    Raises:
      UsageError: a method or option is unknown, or a label is given twice.

    >>> [label.text for label in parse_labels("dense,partition:rungs=2,family=gamma")]
    ['dense', 'partition:rungs=2,family=gamma']
    """
    return [parse_label(piece, "--methods") for piece in split_labels(text)]


def split_labels(text: str) -> list[str]:
    """Part labels, as `parse_labels` does before it reads them."""
    pieces: list[str] = []
    for piece in filter(None, (piece.strip() for piece in text.split(","))):
        if "=" in piece and ":" not in piece and pieces:
            pieces[-1] += ("," if ":" in pieces[-1] else ":") + piece
        else:
            pieces.append(piece)
    if not pieces:
        raise UsageError(f"--methods is empty: choose among {', '.join(METHODS)}")
    twice = {piece for piece in pieces if pieces.count(piece) > 1}
    if twice:
        raise UsageError(f"--methods names {sorted(twice)[0]} twice: name it once")
    return pieces


def briefly(texts: Iterable[str]) -> dict[str, str]:
    """Leave out options without which labels are still told apart, rates first: names for a picture.

    Args:
      texts: labels.

    Returns:
      The name of each.

    >>> list(briefly(["dense:learning_rate=0.004", "topk:learning_rate=0.01,density=0.1", "topk:density=0.2"]).values())
    ['dense', 'topk:density=0.1', 'topk:density=0.2']
    """
    labels = {text: parse_label(text) for text in texts}
    kept: dict[str, Sequence[str]] = {}  # the options that tell the labels of a kind apart
    for kind in {label.kind for label in labels.values()}:
        alike = [label.options for label in labels.values() if label.kind == kind]
        keys = sorted(dict.fromkeys(chain(*alike)), key="learning_rate".__eq__)
        choices = chain.from_iterable(combinations(keys, count) for count in range(len(keys)))
        told = (some for some in choices if len({str([own.get(key) for key in some]) for own in alike}) == len(alike))
        kept[kind] = next(told, keys)
    names = {}
    for text, label in labels.items():
        pairs = [pair for pair in text.partition(":")[2].split(",") if pair.partition("=")[0] in kept[label.kind]]
        names[text] = ":".join(filter(None, (label.kind, ",".join(pairs))))
    return names


def _between(value: Any, least: float, most: float) -> bool:
    return isinstance(value, int | float) and least <= value <= most


def _value(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return {"true": True, "false": False, "none": None}.get(text.lower(), text)
