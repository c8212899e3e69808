"""Rivals of the partition method, sized by a budget of bytes in place of their own parameters."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import optax

import gradpart_jax as gp
from gradpart_jax.accounting import WORD_BITS
from gradpart_jax.baselines.demo import tiles_of
from gradpart_jax.baselines.powersgd import groups_of
from gradpart_jax.payload import most_within
from gradpart_jax.segments import Layout, layout_of
from gradpart_jax.sparse import ratio_within

SMALLEST_DENSITY = 1e-6
DENSITY = "density"  # what users call the makers' `ratio`, for a ratio here is one of bytes

AROUND = ("scheme", "axis_name", "inner_axis", "model_axis")  # arguments of `gp.compress` that are no options here

# From the segments and a budget in bits an element to the value of a maker's parameter
Choose = Callable[[Layout, float, dict[str, Any]], Any]


def rival(
    maker: Callable[..., gp.Scheme], size: str | None = None, choose: Choose | None = None, **defaults: Any
) -> Callable[..., optax.GradientTransformationExtraArgs]:
    """Make a constructor that takes a payload ratio where the method has a size parameter.

    Args:
      maker: of `gp.baselines`.
      size: its parameter that sets how much is sent; None where nothing does.
      choose: finds that parameter's value; the user's own comes before it.
      **defaults: of `gp.compress`, where they differ from its own.

    Returns:
      A constructor: the axis name, and by keyword the payload ratio, the maker's options and those of `gp.compress`.
    """
    known = inspect.signature(gp.compress).parameters
    compressing = {name: p.default for name, p in known.items() if name not in AROUND} | defaults
    own = {DENSITY if name == "ratio" else name: p for name, p in inspect.signature(maker).parameters.items()}
    shown = DENSITY if size == "ratio" else size

    def scheme(given: dict[str, Any]) -> gp.Scheme:
        if DENSITY not in given:
            return maker(**given)
        try:
            return maker(**{key: value for key, value in given.items() if key != DENSITY}, ratio=given[DENSITY])
        except (TypeError, ValueError) as error:
            raise type(error)(str(error).replace("ratio", DENSITY, 1)) from error

    def construct(axis_name: str | None, **options: Any) -> optax.GradientTransformationExtraArgs:
        ratio = options.pop("ratio", 100.0)
        outer = {key: options.pop(key, value) for key, value in compressing.items()}

        def at(tree: Any) -> optax.GradientTransformationExtraArgs:
            given = dict(options)
            if choose is not None and shown is not None and shown not in given:
                given[shown] = choose(layout_of(tree), WORD_BITS / ratio, given)
            return gp.compress(scheme(given), axis_name, **outer)

        at(jnp.zeros((64, 64)))  # refuses wrong options now

        def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
            return at(updates).update(updates, state, params, **extra)

        return optax.GradientTransformationExtraArgs(lambda params: at(params).init(params), update)

    keyword = inspect.Parameter.KEYWORD_ONLY
    parameters = [inspect.Parameter("axis_name", inspect.Parameter.POSITIONAL_OR_KEYWORD)]
    parameters += [inspect.Parameter("ratio", keyword, default=100.0)] if choose is not None else []
    parameters += [inspect.Parameter(name, keyword, default=p.default) for name, p in own.items()]
    parameters += [inspect.Parameter(name, keyword, default=value) for name, value in compressing.items()]
    construct.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return construct


def density(slack: float | None = None, value_bits: str | None = None) -> Choose:
    """Choose the share of entries that sparse payloads of positions and values have room for.

    Args:
      slack: the method's own default of what its buffers hold over what is asked for; None where it has none.
      value_bits: its parameter that says how many bits a value takes; None for float32.

    Returns:
      The choice.
    """

    def choose(layout: Layout, bits: float, options: dict[str, Any]) -> float:
        width = WORD_BITS if value_bits is None else options.get(value_bits, 8)
        share = ratio_within(bits, layout.elements, value_bits=width)
        return max(share / (1.0 if slack is None else options.get("slack", slack)), SMALLEST_DENSITY)

    return choose


def random_density(layout: Layout, bits: float, options: dict[str, Any]) -> float:
    """Choose the share of entries where positions need not be told."""
    return min(max(bits / WORD_BITS, SMALLEST_DENSITY), 1.0)


def rank(layout: Layout, bits: float, options: dict[str, Any]) -> int:
    """Choose PowerSGD's rank; 1 where even that is over the budget, for leaves that it leaves dense."""

    def cost(columns: int) -> float:
        groups = groups_of(layout, columns, options.get("min_compression", 2.0))
        thin = sum(len(g.segments) * g.rank * (g.rows + g.columns) for g in groups)
        low = {segment for g in groups for segment in g.segments}
        return WORD_BITS * (thin + sum(size for s, size in enumerate(layout.sizes) if s not in low))

    return most_within(cost, bits * layout.elements, 256)


def width(layout: Layout, bits: float, options: dict[str, Any]) -> int:
    """Choose QSGD's bits of a value."""
    return min(max(math.floor(bits - 16 / options.get("bucket", 128)), 2), 8)


def kept(layout: Layout, bits: float, options: dict[str, Any]) -> int:
    """Choose how many coefficients of a chunk DeMo keeps."""

    def cost(keep: int) -> float:
        tiles = tiles_of(layout, keep, options.get("chunk", 64))
        return sum(t.chunks * t.keep * (WORD_BITS + math.ceil(math.log2(max(t.height * t.width, 2)))) for t in tiles)

    return most_within(cost, bits * layout.elements, options.get("chunk", 64) ** 2)
