"""Functions of replicated values that round alike in every program.

A compiler contracts, reorders and rewrites arithmetic by what stands around it: the same expression differs in its last
bit under pmap, vmap and alone. Where every device must reach the same forecast, that bit matters.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, jaxpr_as_fun

from gradpart_jax.stored import stored

MANTISSA = 22  # bits kept of 23: the least that no compiler takes for nothing
# What moves, compares or chooses among numbers is exact, and what loops and branches give is rounded within.
SHAPES = ("broadcast_in_dim", "concatenate", "copy", "pad", "reshape", "rev", "split", "squeeze", "stack", "transpose")
LOOKUPS = ("dynamic_slice", "dynamic_update_slice", "gather", "slice", "sort")
CHOICES = ("abs", "clamp", "convert_element_type", "max", "min", "neg", "reduce_max", "reduce_min", "select_n", "sign")
EXACT = frozenset((*SHAPES, *LOOKUPS, *CHOICES, "cond", "scan", "while"))
INLINED = ("jit", "pjit", "custom_jvp_call", "custom_vjp_call", "remat", "checkpoint")


def replicated(function: Callable[..., Any]) -> Callable[..., Any]:
    """Make a function that gives the same bits in whatever program it stands.

    The result of every float32 operation that is not exact is rounded by one bit, in loops and branches too. A
    rounding cannot be contracted into a fused multiply-add, nor seen through by algebraic simplification. Under vmap
    the function runs one device at a time, in its own shapes, so that sums keep their order. An optimization barrier
    would not do: it does not outlive fusion on CPUs.

    Args:
      function: small, without collectives; arrays and trees of them in and out; keyword arguments are static.

    Returns:
      The same function, with a relative precision of 2^-23 in each operation.

    >>> import jax.numpy as jnp
    >>> float(replicated(lambda x, y: x * y + 1)(jnp.float32(0.5), jnp.float32(2.0)))
    2.0
    """

    def run(*arguments: Any, **static: Any) -> Any:
        fixed = functools.partial(function, **static)

        # Constants are arguments too: within a conditional vmap maps them over devices as everything else.
        traced, shape = jax.make_jaxpr(fixed, return_shape=True)(*arguments)

        def within(constants: list[jax.Array], *arguments: Any) -> Any:
            results = _evaluate(ClosedJaxpr(traced.jaxpr, constants), *jax.tree.leaves(arguments))
            return jax.tree.unflatten(jax.tree.structure(shape), results)

        # Stored, so that the loops that look these numbers up do not compute them.
        return jax.tree.map(stored, jax.custom_batching.sequential_vmap(within)(list(traced.consts), *arguments))

    return run


def _evaluate(traced: ClosedJaxpr, *arguments: jax.Array) -> list[jax.Array]:
    jaxpr = traced.jaxpr
    values: dict[Any, Any] = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*traced.consts, *arguments], strict=True))

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, Literal) else values[atom]

    for equation in jaxpr.eqns:
        values.update(zip(equation.outvars, _operate(equation, [read(x) for x in equation.invars], jaxpr), strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _operate(equation: JaxprEqn, operands: list[Any], within: Jaxpr) -> list[jax.Array]:
    if equation.primitive.name in INLINED:
        inner = next(value for value in equation.params.values() if isinstance(value, ClosedJaxpr))
        return _evaluate(inner, *operands)
    if equation.primitive.name == "div" and operands[0].dtype == jnp.float32:
        # A division by few numbers becomes a multiplication in some programs only: write it so in all.
        return [rounded(operands[0] * rounded(1.0 / operands[1]))]
    equation = equation.replace(params={name: _rewrite(value) for name, value in equation.params.items()})
    pairs = [(x, y) for x, y in zip(equation.invars, operands, strict=True) if not isinstance(x, Literal)]
    # Cut out of what it stands in, and not made anew: JAX wants to know of each where it was traced.
    alone = within.replace(constvars=[], invars=[x for x, _ in pairs], outvars=equation.outvars, eqns=[equation])
    results = jaxpr_as_fun(ClosedJaxpr(alone, ()))(*[y for _, y in pairs])
    return results if equation.primitive.name in EXACT else [rounded(result) for result in results]


def _rewrite(parameter: Any) -> Any:
    """Round inside the bodies of loops and the branches of conditionals."""
    if isinstance(parameter, ClosedJaxpr):
        return jax.make_jaxpr(functools.partial(_evaluate, parameter))(*parameter.in_avals)
    if type(parameter) is tuple:
        return tuple(map(_rewrite, parameter))
    return parameter


def rounded(x: jax.Array) -> jax.Array:
    """Round a float32 by one bit, so that no compiler contracts what made it with what follows.

    Args:
      x: of any type; what is not float32 stays as it is.

    Returns:
      An array like x.
    """
    return jax.lax.reduce_precision(x, 8, MANTISSA) if x.dtype == jnp.float32 else x


def seeded(seed: int) -> jax.Array:
    """Make a random key whose numbers are the same on all devices.

    Args:
      seed: of the numbers.

    Returns:
      A key of threefry, whatever generator the program prefers: others draw apart what is mapped over devices.

    >>> import jax
    >>> jax.random.key_impl(seeded(0))
    'threefry2x32'
    """
    return jax.random.key(seed, impl="threefry2x32")
