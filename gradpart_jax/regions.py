"""Key and sparse regions: where they part, and how much of the budget each segment gets, by information entropy.

The published abstract says that a threshold is chosen "with the information entropy" of the forecast distribution; the
rules below are this package's own reading of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

Survival: TypeAlias = Callable[[jax.Array], jax.Array]
Quantile: TypeAlias = Callable[[jax.Array], jax.Array]

GRID = 32  # bins between a threshold and SPAN times it, on which regions are parted
SPAN = 16.0
HALVINGS = 20  # of the range in which a common threshold is looked for
WIDEST = 4.0  # a sparse region no wider than this factor is well served by one level


class Regions(NamedTuple):
    """The partition of every segment's magnitudes: never sent | sparse | key."""

    asked: jax.Array  # float32[S]: entries to send
    sparse: jax.Array  # float32[S]: threshold, the sparse region begins
    key: jax.Array  # float32[S]: threshold, the key region begins
    level: jax.Array  # float32[S]: mean magnitude forecast in the sparse region


def entropy_bits(mass: jax.Array) -> jax.Array:
    """Measure the information entropy H = -sum p log2 p of binned masses.

    Args:
      mass: float[..., B], non-negative; normalised here.

    Returns:
      float[...] in bits, from 0 to log2 B; 0 where there is no mass.

    >>> float(entropy_bits(jnp.array([1.0, 1.0, 1.0, 1.0])))
    2.0
    """
    p = mass / jnp.maximum(jnp.sum(mass, axis=-1, keepdims=True), 1e-30)
    return -jnp.sum(jnp.where(p > 0, p * jnp.log2(jnp.maximum(p, 1e-30)), 0.0), axis=-1)


class Prospect(NamedTuple):
    """What a rule may go by."""

    entropy: jax.Array  # float32[S]: of the forecast magnitude distribution, bits
    survival: Survival  # maps magnitudes float32[S, K] to forecast P(|a| > x)
    quantile: Quantile  # maps upper shares float32[S] to magnitudes
    size: jax.Array  # float32[S]: elements
    total: float | jax.Array  # entries to send


Rule: TypeAlias = Callable[[Prospect], jax.Array]


def fixed_share(prospect: Prospect) -> jax.Array:
    """Send the same share of every segment: weight 1."""
    return jnp.ones_like(prospect.entropy)


def entropy_share(prospect: Prospect) -> jax.Array:
    """Send of each segment in proportion to its entropy: weight H."""
    return jnp.maximum(prospect.entropy, 1e-3)


def perplexity_share(prospect: Prospect) -> jax.Array:
    """Send of each segment in proportion to how many bins it effectively fills: weight 2^H."""
    return jnp.exp2(prospect.entropy)


def energy_share(prospect: Prospect) -> jax.Array:
    """Set one threshold for all segments, so that nothing sent is smaller than what is kept: weight P(|a| > t).

    It leaves the least energy unsent for the number of entries; t is the Lagrange multiplier of that. Of use where all
    segments' updates are of one scale, as after Adam; of raw gradients a small-scaled layer would wait for long.
    """
    share = jnp.clip(prospect.total / jnp.maximum(jnp.sum(prospect.size), 1.0), 1e-9, 1.0)
    each = jnp.log(jnp.clip(prospect.quantile(jnp.full_like(prospect.size, share)), 1e-30, 1e30))
    filled = prospect.size > 0
    bounds = jnp.min(jnp.where(filled, each, jnp.inf)), jnp.max(jnp.where(filled, each, -jnp.inf))

    def above(level: jax.Array) -> jax.Array:
        points = jnp.broadcast_to(jnp.exp(level), (*prospect.size.shape, 1))
        return jnp.clip(jnp.nan_to_num(prospect.survival(points)[:, 0]), 0.0, 1.0)

    def halve(_: int, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bounds
        middle = (low + high) / 2
        more = jnp.sum(above(middle) * prospect.size) > prospect.total
        return jnp.where(more, middle, low), jnp.where(more, high, middle)

    low, _ = jax.lax.fori_loop(0, HALVINGS, halve, bounds)
    return jnp.maximum(above(low), 1e-6)


ENTROPY_RULES: Mapping[str, Rule] = MappingProxyType(
    {"fixed": fixed_share, "entropy": entropy_share, "perplexity": perplexity_share, "energy": energy_share}
)


def entropy_rule(name: str) -> Rule:
    """Look an entropy rule up by name.

    Args:
      name: one of ENTROPY_RULES.

    Returns:
      A function from what it goes by to weights per element.

    Raises:
      ValueError: no such rule.
    """
    if not isinstance(name, str) or name not in ENTROPY_RULES:
        raise ValueError(f"entropy_rule={name!r} is unknown: choose one of {', '.join(ENTROPY_RULES)}")
    return ENTROPY_RULES[name]


def allot(weight: jax.Array, size: jax.Array, total: float | jax.Array) -> jax.Array:
    """Share a number of entries out: min(size, lambda weight size), with lambda so that they add up to the total.

    Args:
      weight: float32[S], positive, per element.
      size: float32[S], elements.
      total: entries in all, at most sum(size).

    Returns:
      float32[S].
    """
    # Water-filling: each round fixes the segments that are full and shares the rest; a few rounds do.
    wish = weight * size

    def refill(_: int, asked: jax.Array) -> jax.Array:
        full = asked >= size
        rest = jnp.maximum(total - jnp.sum(jnp.where(full, size, 0.0)), 0.0)
        open_wish = jnp.sum(jnp.where(full, 0.0, wish))
        return jnp.where(full, size, jnp.minimum(wish * (rest / jnp.maximum(open_wish, 1e-30)), size))

    return jax.lax.fori_loop(0, 8, refill, jnp.zeros_like(wish))


def kapur_split(mass: jax.Array) -> jax.Array:
    """Part a histogram where both sides together keep the most entropy.

    Maximises H(p_0..p_{j-1}) + H(p_j..p_{B-1}), each side normalised, over j in 1..B-1 (Kapur, Sahoo and Wong, "A new
    method for gray-level picture thresholding using the entropy of the histogram", 1985).

    Args:
      mass: float32[..., B], non-negative.

    Returns:
      int32[...], the first bin of the upper side.

    >>> int(kapur_split(jnp.array([4.0, 4.0, 4.0, 4.0, 1.0, 1.0, 1.0, 1.0])))
    4
    """
    information = jnp.where(mass > 0, -mass * jnp.log(jnp.maximum(mass, 1e-30)), 0.0)

    def side(p: jax.Array, h: jax.Array) -> jax.Array:
        # H of p_i / P is log P + h / P
        return jnp.where(p > 1e-20, jnp.log(jnp.maximum(p, 1e-30)) + h / jnp.maximum(p, 1e-30), 0.0)

    below, h_below = jnp.cumsum(mass, axis=-1)[..., :-1], jnp.cumsum(information, axis=-1)[..., :-1]
    above = jnp.sum(mass, axis=-1, keepdims=True) - below
    h_above = jnp.sum(information, axis=-1, keepdims=True) - h_below
    return jnp.argmax(side(below, h_below) + side(above, h_above), axis=-1).astype(jnp.int32) + 1


def partition(survival: Survival, quantile: Quantile, asked: jax.Array, size: jax.Array) -> Regions:
    """Set every segment's thresholds from its forecast.

    The sparse threshold t is the forecast's quantile of the asked-for share. What lies above it is parted into the
    sparse and the key region by Kapur's criterion, on a logarithmic grid from t to 16 t.

    Args:
      survival: maps magnitudes float32[S, K] to forecast P(|a| > x).
      quantile: maps upper shares float32[S] to magnitudes.
      asked: float32[S], entries to send.
      size: float32[S], elements.

    Returns:
      Regions.
    """
    sparse = quantile(jnp.clip(asked / jnp.maximum(size, 1.0), 1e-12, 1.0))
    sparse = jnp.clip(jnp.nan_to_num(sparse), 1e-37, 1e30)
    factor = SPAN ** (jnp.arange(GRID, dtype=jnp.float32) / GRID)
    points = sparse[:, None] * factor[None, :]
    above = jnp.clip(jnp.nan_to_num(survival(points)), 0.0, 1.0)
    mass = jnp.maximum(above - jnp.pad(above[:, 1:], ((0, 0), (0, 1))), 0.0)
    split = jnp.clip(kapur_split(mass), 1, GRID - 1)
    boundary = jnp.minimum(factor[split], WIDEST)
    # The mean of |a| within the sparse region, on the same grid
    inside = mass * (jnp.arange(GRID)[None, :] < split[:, None])
    middle = points * SPAN ** (0.5 / GRID)
    level = jnp.sum(inside * middle, axis=-1) / jnp.maximum(jnp.sum(inside, axis=-1), 1e-30)
    level = jnp.clip(level, sparse, sparse * boundary)
    return Regions(asked=asked, sparse=sparse, key=sparse * boundary, level=level)
