"""Families of magnitude distributions, in units of a scale: pure functions of a magnitude and shape parameters.

Every family has unit scale; a forecast supplies the scale. Shapes are unconstrained ("raw") numbers on the last axis,
so that a network can put them out, and every function is finite and differentiable for any raw shape.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax.scipy.special import digamma, gammaincc, gammaln

from gradpart_jax.varying import alike

Function: TypeAlias = Callable[[jax.Array, jax.Array], jax.Array]
SMALLEST, LARGEST = 1e-12, 1e8  # between which quantiles are looked for, in units of the scale


class Moments(NamedTuple):
    """What closed-form fits need to know of magnitudes; float[...] each, natural logarithms."""

    spread: jax.Array  # log(root mean square / mean), at least 0
    skew: jax.Array  # log(mean / geometric mean), at least 0
    share: jax.Array  # P(|x| > anchor), in (0, 1)
    anchor: jax.Array  # log(anchor / mean)
    excess: jax.Array  # E[x - anchor | x > anchor] / anchor


class Family(NamedTuple):
    """A family of distributions of x >= 0 with unit scale. Shapes are raw, float[..., shapes]."""

    name: str
    shapes: int  # number of shape parameters
    survival: Function  # (x [...], shape [..., shapes]) -> P(X > x)
    quantile: Function  # (upper share p [...], shape) -> x with P(X > x) = p
    density: Function  # (x, shape) -> probability density
    entropy: Callable[[jax.Array], jax.Array]  # shape -> differential entropy, nats
    fit: Callable[[Moments], jax.Array]  # moments -> raw shape
    anchored: bool  # whether the unit of scale is the anchor of `Moments`, not free


def positive(raw: jax.Array) -> jax.Array:
    """Map any number to a positive one, 0 to 1, without overflow: exp(8 tanh(raw / 8))."""
    return jnp.exp(8.0 * jnp.tanh(raw / 8.0))


def raw_of(value: jax.Array) -> jax.Array:
    """Invert `positive`."""
    return 8.0 * jnp.arctanh(jnp.clip(jnp.log(value) / 8.0, -0.99, 0.99))


def gamma_order(skew: jax.Array) -> jax.Array:
    """Estimate a gamma distribution's order: (3 - s + sqrt((s - 3)^2 + 24 s)) / (12 s).

    Source: Minka, "Estimating a gamma distribution" (2002), the closed form from which his iteration starts.

    Args:
      skew: float32[...], s = log(mean / geometric mean), above 0.

    Returns:
      float32[...], within 1.5 % of the most likely order.
    """
    return (3 - skew + jnp.sqrt((skew - 3) ** 2 + 24 * skew)) / (12 * skew)


def bisected(survival: Function) -> Function:
    """Make a quantile function out of a survival function, by bisection of log x.

    Args:
      survival: decreasing in x.

    Returns:
      The quantile function, to a relative precision of 1e-6.
    """

    def quantile(share: jax.Array, shape: jax.Array) -> jax.Array:
        def halve(_: int, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            low, high = bounds
            middle = (low + high) / 2
            above = survival(jnp.exp(middle), shape) > share
            return jnp.where(above, middle, low), jnp.where(above, high, middle)

        start = jnp.broadcast_to(jnp.log(jnp.float32(SMALLEST)), jnp.broadcast_shapes(share.shape, shape.shape[:-1]))
        ends = alike((start, jnp.full_like(start, jnp.log(jnp.float32(LARGEST)))), share, shape)
        low, high = jax.lax.fori_loop(0, 26, halve, ends)
        return jnp.exp((low + high) / 2)

    return quantile


def _none(moments: Moments) -> jax.Array:
    return jnp.zeros((*moments.spread.shape, 0), jnp.float32)


def _laplace() -> Family:
    return Family(
        name="laplace",
        shapes=0,
        survival=lambda x, shape: jnp.exp(-x),
        quantile=lambda share, shape: -jnp.log(share),
        density=lambda x, shape: jnp.exp(-x),
        entropy=lambda shape: jnp.ones(shape.shape[:-1]),
        fit=_none,
        anchored=False,
    )


def _normal() -> Family:
    def survival(x: jax.Array, shape: jax.Array) -> jax.Array:
        return jax.lax.erfc(x / jnp.sqrt(2.0))

    return Family(
        name="normal",
        shapes=0,
        survival=survival,
        quantile=bisected(survival),
        density=lambda x, shape: jnp.sqrt(2 / jnp.pi) * jnp.exp(-(x**2) / 2),
        entropy=lambda shape: jnp.full(shape.shape[:-1], 0.5 * jnp.log(jnp.pi * jnp.e / 2)),
        fit=_none,
        anchored=False,
    )


def _generalised_normal() -> Family:
    """f(x) = b exp(-x^b) / Gamma(1/b)."""

    def power(shape: jax.Array) -> jax.Array:
        return jnp.clip(positive(shape[..., 0]), 0.2, 8.0)

    def survival(x: jax.Array, shape: jax.Array) -> jax.Array:
        b = power(shape)
        # By logarithms: a power that leaves the range of floats has no gradient
        return gammaincc(1 / b, jnp.exp(jnp.clip(b * jnp.log(jnp.maximum(x, 1e-30)), -85.0, 85.0)))

    def density(x: jax.Array, shape: jax.Array) -> jax.Array:
        b = power(shape)
        return b * jnp.exp(-(jnp.maximum(x, 1e-30) ** b) - gammaln(1 / b))

    def entropy(shape: jax.Array) -> jax.Array:
        b = power(shape)
        return 1 / b - jnp.log(b) + gammaln(1 / b)

    def fit(moments: Moments) -> jax.Array:
        # log(rms / mean) falls monotonically with b: read b off a table.
        b = jnp.exp(jnp.linspace(jnp.log(0.2), jnp.log(8.0), 64))
        spread = 0.5 * (gammaln(1 / b) + gammaln(3 / b)) - gammaln(2 / b)
        return raw_of(jnp.interp(moments.spread, spread[::-1], b[::-1]))[..., None]

    return Family("generalised_normal", 1, survival, bisected(survival), density, entropy, fit, anchored=False)


def _gamma() -> Family:
    """f(x) = x^(k-1) exp(-x) / Gamma(k)."""

    def order(shape: jax.Array) -> jax.Array:
        return jnp.clip(positive(shape[..., 0]), 0.05, 50.0)

    def survival(x: jax.Array, shape: jax.Array) -> jax.Array:
        return gammaincc(order(shape), jnp.maximum(x, 0.0))

    def density(x: jax.Array, shape: jax.Array) -> jax.Array:
        k, x = order(shape), jnp.maximum(x, 1e-30)
        return jnp.exp((k - 1) * jnp.log(x) - x - gammaln(k))

    def entropy(shape: jax.Array) -> jax.Array:
        k = order(shape)
        return k + gammaln(k) + (1 - k) * digamma(k)

    def fit(moments: Moments) -> jax.Array:
        return raw_of(gamma_order(jnp.maximum(moments.skew, 1e-3)))[..., None]

    return Family("gamma", 1, survival, bisected(survival), density, entropy, fit, anchored=False)


def _pareto() -> Family:
    """A truncated log-logistic body below the anchor, at 1, and a generalised Pareto tail above it.

    S(x) = p (1 + k (x - 1) / s)^(-1/k) above 1, and 1 - (1 - p) (1 + b) x^c / (1 + b x^c) below. Under error feedback
    the anchor is the last threshold: what was above it has been sent, so that the density has an edge there, with only
    fresh gradient beyond and all that waits just below.
    """

    def parts(shape: jax.Array) -> tuple[jax.Array, ...]:
        share = jax.nn.sigmoid(jnp.clip(shape[..., 0], -16.0, 4.0))
        c = jnp.clip(positive(shape[..., 3]), 0.02, 20.0)
        return share, positive(shape[..., 1]), 0.5 * jnp.tanh(shape[..., 2]), c, positive(shape[..., 4])

    def tail(x: jax.Array, s: jax.Array, k: jax.Array) -> tuple[jax.Array, jax.Array]:
        # log of the tail's survival, log(1 + k z) / k with its limit z at k = 0, and of its density
        z = jnp.maximum(x - 1.0, 0.0) / s
        safe = jnp.where(jnp.abs(k) < 1e-3, 1e-3, k)
        inside = jnp.maximum(1.0 + safe * z, 1e-6)
        survival = jnp.where(jnp.abs(k) < 1e-3, -z, -jnp.log(inside) / safe)
        return survival, jnp.where(jnp.abs(k) < 1e-3, -z, survival - jnp.log(inside)) - jnp.log(s)

    def survival(x: jax.Array, shape: jax.Array) -> jax.Array:
        share, s, k, c, b = parts(shape)
        power = jnp.clip(x, 1e-30, 1.0) ** c
        # 1 - F of the body, without cancellation near the anchor
        above = (1 - power) / (1 + b * power)
        return jnp.where(x > 1, share * jnp.exp(tail(x, s, k)[0]), share + (1 - share) * above)

    def density(x: jax.Array, shape: jax.Array) -> jax.Array:
        share, s, k, c, b = parts(shape)
        log = jnp.log(jnp.clip(x, 1e-30, 1.0))
        body = c * (1 + b) * jnp.exp((c - 1) * log) / (1 + b * jnp.exp(c * log)) ** 2
        # A negative k ends the tail at 1 - s / k
        ended = 1.0 + k * (x - 1.0) / s <= 0
        return jnp.where(x > 1, jnp.where(ended, 0.0, share * jnp.exp(tail(x, s, k)[1])), (1 - share) * body)

    def quantile(upper: jax.Array, shape: jax.Array) -> jax.Array:
        share, s, k, c, b = parts(shape)
        log = jnp.minimum(jnp.log(upper / share), 0.0)
        safe = jnp.where(jnp.abs(k) < 1e-3, 1e-3, k)
        above = 1.0 + s * jnp.where(jnp.abs(k) < 1e-3, -log, jnp.expm1(-safe * log) / safe)
        # F = 1 - rest, solved for x^c
        rest = jnp.clip((upper - share) / (1 - share), 0.0, 1.0)
        below = jnp.exp((jnp.log1p(-jnp.minimum(rest, 1 - 1e-7)) - jnp.log1p(b * rest)) / c)
        return jnp.where(upper < share, above, below)

    def entropy(shape: jax.Array) -> jax.Array:
        share, s, k, c, b = parts(shape)
        mean_log = jnp.where(b < 1e-3, b / 2, ((1 + b) * jnp.log1p(b) - b) / jnp.maximum(b, 1e-3))
        body = jnp.log1p(b) - jnp.log(c) + (1 - 1 / c) * (1 + mean_log) - 2 * mean_log
        between = -share * jnp.log(share) - (1 - share) * jnp.log1p(-share)
        return between + (1 - share) * body + share * (jnp.log(s) + k + 1)

    def fit(moments: Moments) -> jax.Array:
        share = jnp.clip(moments.share, 1e-7, 0.95)
        excess = jnp.clip(moments.excess, 1e-3, 10.0)
        # With b = 1, E[log x] = -2 log 2 / c
        c = jnp.clip(2 * jnp.log(2.0) / jnp.maximum(moments.anchor + moments.skew, 0.07), 0.05, 20.0)
        zero = jnp.zeros_like(share)
        return jnp.stack([jnp.log(share) - jnp.log1p(-share), raw_of(excess), zero, raw_of(c), zero], axis=-1)

    return Family("pareto", 5, survival, quantile, density, entropy, fit, anchored=True)


def _mixture() -> Family:
    """Two exponentials: S(x) = (1 - w) exp(-x) + w exp(-x / b), b at least 1."""

    def parts(shape: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jax.nn.sigmoid(jnp.clip(shape[..., 0], -12.0, 12.0)), 1.0 + positive(shape[..., 1])

    def survival(x: jax.Array, shape: jax.Array) -> jax.Array:
        w, b = parts(shape)
        return (1 - w) * jnp.exp(-x) + w * jnp.exp(-x / b)

    def density(x: jax.Array, shape: jax.Array) -> jax.Array:
        w, b = parts(shape)
        return (1 - w) * jnp.exp(-x) + w / b * jnp.exp(-x / b)

    def entropy(shape: jax.Array) -> jax.Array:
        # No closed form: integrate -f log f over log x, where f is smooth
        t = jnp.linspace(jnp.log(1e-6), jnp.log(1e6), 2001)
        x = jnp.exp(t)
        f = density(x, shape[..., None, :])
        integrand = -f * jnp.log(jnp.maximum(f, 1e-37)) * x
        return jnp.trapezoid(integrand, t, axis=-1)

    def fit(moments: Moments) -> jax.Array:
        heavy = jnp.clip(jnp.expm1(2 * moments.spread), 1.01, 50.0)
        return jnp.stack([jnp.full_like(heavy, -2.0), raw_of(heavy)], axis=-1)

    return Family("mixture", 2, survival, bisected(survival), density, entropy, fit, anchored=False)


FAMILIES: Mapping[str, Family] = MappingProxyType(
    {family.name: family for family in (_laplace(), _normal(), _generalised_normal(), _gamma(), _pareto(), _mixture())}
)


def family(name: str) -> Family:
    """Look a family up by name.

    Args:
      name: one of FAMILIES.

    Returns:
      The Family.

    Raises:
      ValueError: no such family.

    >>> family("laplace").survival(jnp.float32(0.0), jnp.zeros(0))
    Array(1., dtype=float32)
    """
    if not isinstance(name, str) or name not in FAMILIES:
        raise ValueError(f"family={name!r} is unknown: choose one of {', '.join(FAMILIES)}")
    return FAMILIES[name]
