"""SIDCo: thresholds from fits to the tail of the tail, in as many stages as counts call for.

Source: Abdelmoniem, Elzanaty, Alouini and Canini, "An efficient statistical-based gradient compression technique for
distributed training systems" (MLSys 2021), sections 2.3 and 2.4.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from gradpart_jax.bits import popcount
from gradpart_jax.checks import check_integer, check_number
from gradpart_jax.exchange import AxisName
from gradpart_jax.families import family as find_family
from gradpart_jax.families import gamma_order, raw_of
from gradpart_jax.magnitudes import entries, per_segment, quotas, reaching, room
from gradpart_jax.moments import Tail, greatest_magnitude, tail
from gradpart_jax.replicated import replicated
from gradpart_jax.scheme import Reduced, Scheme, SchemeState, Settle
from gradpart_jax.segments import Layout
from gradpart_jax.sparse import share

FIRST_SHARE = 0.25  # that the first of several stages keeps
EVERY = 5  # steps between two changes of the number of stages
FEWEST, MOST = 0.8, 1.2  # counts over those asked for, between which the number of stages stays
FITS = {"exponential": ("exponential", "exponential"), "gamma": ("gamma", "pareto"), "pareto": ("pareto", "pareto")}


class Stages(NamedTuple):
    """How many stages each segment's fit takes; a device's own."""

    number: jax.Array  # int32[S]
    selected: jax.Array  # int32[S]: entries since the last change


def sidco(ratio: float = 0.01, *, fit: str = "exponential", stages: int = 5, slack: float = 1.25) -> Scheme:
    """Send what reaches a fitted distribution's quantile, fitted again to what is above it, stage by stage.

    With share d asked for and M stages, the first keeps d_1 = 0.25 (or d, if it is the only one), each later one
    (d / d_1)^(1 / (M - 1)). A stage with bound b (0 at first) sees the mean m and variance v of the excess of
    what lies above b, and sets the next bound: exponential b - m ln d; generalised Pareto, with
    k = (m^2 / v - 1) / 2 and s = m (m^2 / v + 1) / 2, b + s (1 - d^k) / k; gamma (first stage only), with
    l = ln mean - mean ln and order p = (3 - l + sqrt((l - 3)^2 + 24 l)) / (12 l), its quantile. Every five steps a leaf
    that sent over 1.2 times what was asked takes one stage fewer, one that sent under 0.8 times one more.

    Args:
      ratio: of entries asked for, in (0, 1].
      fit: "exponential"; "gamma", with generalised Pareto tails after the first stage; or "pareto".
      stages: at most, 1 to 8; 1 is the plain fit. All begin with one.
      slack: room in the payload over those asked for, at least 1. Of more than it holds a run is left for later,
        another one each step.

    Returns:
      A Scheme.

    Raises:
      TypeError: an argument is of a wrong type.
      ValueError: an argument is out of range, or fit is unknown.

    >>> import jax, jax.numpy as jnp, gradpart_jax as gp
    >>> tx = gp.compress(gp.baselines.sidco(0.01))
    >>> gradient = jax.random.laplace(jax.random.key(0), (10_000,))
    >>> out, _ = jax.jit(tx.update)(gradient, tx.init(gradient))
    >>> bool(80 <= (out != 0).sum() <= 120)
    True
    """
    check_number("ratio", ratio, above=0.0, at_most=1.0, static=True)
    check_integer("stages", stages, 1, 8)
    check_number("slack", slack, at_least=1.0, static=True)
    if fit not in FITS:
        raise ValueError(f"fit={fit!r} is unknown: choose one of {', '.join(FITS)}")

    def capacity(layout: Layout) -> int:
        return room(ratio, slack, layout)

    def init(layout: Layout) -> SchemeState:
        one = jnp.ones(layout.segments, jnp.int32)
        return SchemeState(jnp.int32(0), Stages(one, jnp.zeros_like(one)))

    def reduce(
        vector: jax.Array, state: SchemeState, layout: Layout, axis_name: AxisName, settle: Settle
    ) -> tuple[Reduced, SchemeState]:
        asked = jnp.asarray(quotas(ratio, layout), jnp.float32)
        words = reaching(vector, bounds(vector, state.local.number, ratio, fit, stages, layout), layout)
        buffer = entries(vector, words, capacity(layout), state.shared)
        step = state.shared + 1
        fresh = adapted(state.local, per_segment(words, layout), asked, step % EVERY == 0, stages)
        reduced = share(vector, buffer, jnp.sum(popcount(words)), layout, axis_name, settle, asked)
        return reduced, SchemeState(step, fresh)

    return Scheme("sidco", init, reduce, capacity)


def adapted(before: Stages, count: jax.Array, asked: jax.Array, due: jax.Array, most: int) -> Stages:
    """Take one stage fewer where too many were sent since the last change, one more where too few were.

    Args:
      before: the stages so far.
      count: int32[S], entries over this step's thresholds.
      asked: float32[S], entries asked for.
      due: bool[], whether it is time for a change.
      most: stages.

    Returns:
      Stages.
    """
    selected = before.selected + count
    mean = selected.astype(jnp.float32)
    step = (mean < FEWEST * EVERY * asked).astype(jnp.int32) - (mean > MOST * EVERY * asked).astype(jnp.int32)
    number = jnp.where(due, jnp.clip(before.number + step, 1, most), before.number)
    return Stages(number, jnp.where(due, 0, selected))


def bounds(vector: jax.Array, number: jax.Array, ratio: float, fit: str, stages: int, layout: Layout) -> jax.Array:
    """Fit stage by stage.

    Args:
      vector: float32[n].
      number: int32[S], how many stages.
      ratio: as in `sidco`.
      fit: as in `sidco`.
      stages: as in `sidco`.
      layout: the segments.

    Returns:
      float32[S], the thresholds.
    """
    scale = greatest_magnitude(vector, layout)
    asked, shares = jnp.asarray(quotas(ratio, layout), jnp.float32), jnp.ones(layout.segments, jnp.float32)
    reached = jnp.zeros(layout.segments, jnp.float32)
    for stage in range(stages):
        seen = tail(vector, scale, reached, layout)
        if stage == 0:  # zeros are in no fit, and so in no share of what is fitted
            shares = asked / jnp.maximum(jnp.maximum(seen.number, asked), 1.0)
        kind = FITS[fit][min(stage, 1)]
        reached = replicated(_stage)(seen, reached, shares, number, kind=kind, stage=stage)
    # No fit may leave all of a segment behind
    return scale * jnp.minimum(reached, 1.0)


def _stage(seen: Tail, reached: jax.Array, shares: jax.Array, number: jax.Array, *, kind: str, stage: int) -> jax.Array:
    alone = number == 1
    later = jnp.log(shares / FIRST_SHARE) / jnp.maximum(number - 1, 1).astype(jnp.float32)
    # A share over that of the first stage needs no second
    log_first = jnp.log(jnp.maximum(shares, jnp.where(alone, 1e-30, FIRST_SHARE)))
    log_share = jnp.minimum(log_first if stage == 0 else later, 0.0)
    mean, variance = seen.mean, jnp.maximum(seen.square - seen.mean * seen.mean, 1e-30)
    if kind == "exponential":
        rise = -mean * log_share
    elif kind == "gamma":
        skew = jnp.maximum(jnp.log(jnp.maximum(mean, 1e-37)) - seen.log, 1e-6)
        order = jnp.clip(gamma_order(skew), 0.05, 50.0)
        rise = mean / order * find_family("gamma").quantile(jnp.exp(log_share), raw_of(order)[..., None])
    else:
        square = mean * mean / variance
        k, s = (square - 1) / 2, mean * (square + 1) / 2
        safe = jnp.where(jnp.abs(k) < 1e-4, 1e-4, k)
        rise = s * jnp.where(jnp.abs(k) < 1e-4, -log_share, -jnp.expm1(safe * log_share) / safe)
    # Nothing can be fitted to fewer than three
    return jnp.where((stage < number) & (seen.number >= 3), reached + rise, reached)
