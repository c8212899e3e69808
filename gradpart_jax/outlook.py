"""What every device makes of what all know: a forecast's thresholds before a step, and its lesson after.

Numbers of the order of segments, in arithmetic that must round alike on all devices: call these under `replicated`.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gradpart_jax import predictor, summaries
from gradpart_jax.regions import Prospect, Regions, Rule, allot, entropy_bits, partition

MARGIN = 1.6  # candidates proposed over entries that fit
TAKEN = 0.5  # of all entries, beyond what was asked of a segment, is more than it should have
SOME = 4.0  # entries, where half of all are fewer
SPARE, MOST_SPARED = 512.0, 8.0  # steps, over those between histograms: of these so many may come out of turn at once


class GradpartState(NamedTuple):
    """The same on every device, bit for bit."""

    step: jax.Array  # int32[]
    summary: summaries.Summary  # of earlier steps
    stirred: jax.Array  # bool[]: whether segments took so much in the last step that a histogram is due
    spared: jax.Array  # float32[]: histograms that may come out of turn
    weights: Any  # the predictor's parameters
    optimizer: Any  # of the predictor's on-line training


class Outlook(NamedTuple):
    """What a forecast means for one step; the same on every device."""

    known: summaries.Summary
    regions: Regions
    proposal: jax.Array  # float32[S]: thresholds that let MARGIN times the asked-for entries through
    retreat: jax.Array  # float32[]: the factor from the exact thresholds to those
    entropy: jax.Array  # float32[S]: bits
    slope: jax.Array  # float32[]: -d log threshold / d log count


class Outcome(NamedTuple):
    """How good the forecast was; the same on every device."""

    log_trim: jax.Array  # float32[]: log of the factor from the forecast to the exact thresholds
    surplus: jax.Array  # float32[]: log of candidates over entries that fit


def foresee(
    shared: GradpartState,
    observed: tuple[jax.Array, jax.Array],
    sizes: tuple[int, ...],
    capacity: int,
    rule: Rule,
    family: str,
) -> Outlook:
    """Forecast, share the budget out, and set thresholds.

    Args:
      shared: of the steps before.
      observed: the last histogram, and its highest bins.
      sizes: elements of each segment.
      capacity: entries that a payload holds.
      rule: how the budget is shared out.
      family: of magnitude distributions.

    Returns:
      Outlook.
    """
    # What has shown nothing before, as all at the very first step, can be forecast from its own histogram alone.
    known = summaries.introduce(shared.summary, *observed)
    forecast = predictor.forecast(shared.weights, known, family)
    entropy = entropy_bits(forecast.masses(known.top))
    size = jnp.asarray(sizes, jnp.float32)
    asked = allot(rule(Prospect(entropy, forecast.survival, forecast.quantile, size, capacity)), size, capacity)
    regions = partition(forecast.survival, forecast.quantile, asked, size)
    slopes = forecast.slope(asked / jnp.maximum(size, 1.0))
    prior = jnp.sum(slopes * asked) / jnp.maximum(jnp.sum(asked), 1e-30)
    slope = summaries.slope_of(known, prior)
    # One factor on all thresholds asks for MARGIN times the entries.
    retreat = MARGIN**-slope
    return Outlook(known, regions, regions.sparse * retreat, retreat, entropy, slope)


def digest(
    shared: GradpartState,
    outlook: Outlook,
    realised: jax.Array,
    outcome: Outcome,
    observed: tuple[jax.Array, jax.Array],
    due: jax.Array,
    hasty: jax.Array,
    every: int,
    family: str,
    learning: bool,
) -> GradpartState:
    """Take a step's outcome in and, where a histogram was due, learn from it.

    Args:
      shared: of the steps before.
      outlook: of `foresee`.
      realised: float32[S], entries sent, mean over devices.
      outcome: how good the forecast was.
      observed: the last histogram, and its highest bins.
      due: bool[], whether that is a fresh one.
      hasty: bool[], whether it came out of turn.
      every: steps between histograms that come in turn.
      family: of magnitude distributions.
      learning: whether the network learns on-line.

    Returns:
      The state after the step.
    """
    known, weights, optimizer = outlook.known, shared.weights, shared.optimizer
    if learning:
        weights, optimizer = jax.lax.cond(
            due,
            lambda w, o: predictor.learn(w, o, known, *observed, family),
            lambda w, o: (w, o),
            weights,
            optimizer,
        )
    asked = outlook.regions.asked
    # What has shown only zeros, or has grown all at once, leaves no room for others.
    most = jnp.maximum(TAKEN * jnp.sum(asked), SOME)
    took = (summaries.unseen(known) & (realised > 0)) | (realised > asked + most)
    summary = summaries.advance(
        known,
        threshold=outlook.regions.sparse,
        share=asked / jnp.maximum(known.size, 1.0),
        asked=asked,
        realised=realised,
        took=took,
        log_trim=outcome.log_trim,
        surplus=outcome.surplus,
        lowered=outlook.slope * math.log(MARGIN),
        slope=outlook.slope,
    )
    fresh = summaries.observe(summary, *observed)
    summary = jax.tree.map(lambda new, old: jnp.where(due, new, old), fresh, summary)
    spared = jnp.minimum(shared.spared + 1.0 / every, spare(every)) - hasty.astype(jnp.float32)
    return GradpartState(shared.step + 1, summary, jnp.any(took), spared, weights, optimizer)


def spare(every: int) -> float:
    """Say how many histograms may come out of turn one after the other; in the long run as many as come in turn.

    Args:
      every: steps between those in turn: the more, the dearer a histogram is.

    Returns:
      Their number.

    >>> spare(16), spare(128), spare(1000)
    (8.0, 4.0, 1.0)
    """
    return min(max(SPARE / every, 1.0), MOST_SPARED)


def means(*factors: jax.Array) -> tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]:
    """Average over devices, geometrically.

    Args:
      *factors: float32[W], positive.

    Returns:
      The means, and their logarithms.
    """
    means = tuple(jnp.exp(jnp.mean(jnp.log(factor))) for factor in factors)
    return means, tuple(jnp.log(mean) for mean in means)
