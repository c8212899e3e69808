"""Checks of arguments at construction: an error names the argument, the value got, and the remedy."""

from __future__ import annotations

import math
import numbers
import reprlib
from collections.abc import Hashable
from typing import Any

import jax

HINT = (
    "give optax.inject_hyperparams static_args=gp.STATIC_ARGS, or a function of what it is to inject alone, such as "
    "lambda learning_rate: gp.recipes.adam(learning_rate, ...)"
)


def check_number(
    name: str,
    value: Any,
    *,
    above: float = -math.inf,
    at_least: float = -math.inf,
    below: float = math.inf,
    at_most: float = math.inf,
    optional: bool = False,
    static: bool = False,
) -> None:
    """Check that an argument is a real number within bounds; arrays, which schedules give, pass unchecked.

    Args:
      name: of the argument.
      value: its value.
      above: open lower bound.
      at_least: closed lower bound.
      below: open upper bound.
      at_most: closed upper bound.
      optional: whether None is allowed.
      static: whether the number fixes shapes or code, so that no array can stand in its place.

    Raises:
      TypeError: not a number.
      ValueError: out of bounds.

    >>> check_number("ratio", 0.01, above=0.0, at_most=1.0, static=True)
    """
    if isinstance(value, jax.Array) and static:
        raise TypeError(f"{name} sizes buffers and must be a Python number, not an array: {HINT}")
    if isinstance(value, jax.Array) or (optional and value is None):
        return
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name}={value!r} is not a number" + (" or None" if optional else ""))
    number = float(value)
    if not (above < number < below and at_least <= number <= at_most):
        lower = f"at least {at_least:g}" if at_least > -math.inf else f"above {above:g}"
        upper = f"at most {at_most:g}" if at_most < math.inf else f"below {below:g}"
        wanted = " and ".join(b for b in (lower, upper) if "inf" not in b)
        kind = "number" if math.isfinite(number) else "finite number"
        raise ValueError(f"{name}={value!r} is out of range: give a {kind} {wanted}".rstrip())


def check_axes(**axes: Any) -> None:
    """Check that arguments name mapped axes.

    Args:
      **axes: each a name, a tuple of names, or None, by the argument's name.

    Raises:
      TypeError: one is a list, a set, a number, or nothing that can be a name.
      ValueError: one is an empty tuple.

    >>> check_axes(axis_name=("hosts", "chips"), model_axis=None)
    """
    for name, axis in axes.items():
        if isinstance(axis, tuple) and not axis:
            raise ValueError(f"{name}=() names no axis: give None for none")
        for one in axis if isinstance(axis, tuple) else (axis,):
            if isinstance(one, frozenset | numbers.Number) or not isinstance(one, Hashable):
                raise TypeError(f"{name}={axis!r} is no name of an axis: give a name, a tuple of names, or None")


def check_transformation(name: str, value: Any) -> None:
    """Check that an argument is an optax transformation, and not what makes one.

    Args:
      name: of the argument.
      value: its value.

    Raises:
      TypeError: it is something else.

    >>> import optax
    >>> check_transformation("inner", optax.sgd(0.1))
    """
    if not (callable(getattr(value, "init", None)) and callable(getattr(value, "update", None))):
        raise TypeError(
            f"{name}={reprlib.repr(value)} is no optax transformation: give one, such as optax.sgd(0.1), and of a "
            "Scheme gp.compress(scheme, axis_name)"
        )


def check_state(owner: str, state: Any, kind: type) -> None:
    """Check that update was given a state of its own kind.

    Args:
      owner: what makes such states.
      state: as given to update.
      kind: of the states that init and update give.

    Raises:
      TypeError: it is something else.

    >>> check_state("gp.local", (), tuple)
    """
    if not isinstance(state, kind):
        raise TypeError(
            f"update got {type(state).__name__}, which is no state of {owner}: give what init or update gave"
        )


def is_fixed(value: Any, number: float) -> bool:
    """Say whether an argument is a number that is known while tracing, so that what it would do can be left out.

    Args:
      value: of the argument.
      number: that does nothing.

    Returns:
      Whether it is; of an array, which a schedule gives, nothing is known.

    >>> is_fixed(1.0, 1.0)
    True
    """
    return isinstance(value, numbers.Real) and value == number


def check_integer(name: str, value: Any, least: int, most: int, *, optional: bool = False) -> None:
    """Check that an argument is an integer of Python or NumPy within bounds.

    Args:
      name: of the argument.
      value: its value.
      least: closed lower bound.
      most: closed upper bound.
      optional: whether None is allowed.

    Raises:
      TypeError: not an integer.
      ValueError: out of bounds.

    >>> check_integer("rank", 2, 1, 64)
    """
    if optional and value is None:
        return
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        hint = f": {HINT}" if isinstance(value, jax.Array) else ""
        raise TypeError(f"{name}={value!r} is not an integer" + (" or None" if optional else "") + hint)
    if not least <= int(value) <= most:
        raise ValueError(f"{name}={value} is out of range: give {least} to {most}")
