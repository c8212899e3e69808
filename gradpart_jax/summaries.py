"""What every device knows of earlier steps: histograms, exact thresholds, and how counts answered to thresholds."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from gradpart_jax.families import Moments

BINS = 64  # quarter-octave bins: 16 octaves below a segment's largest magnitude
LOWEST, HIGHEST = BINS + 3, 1015  # bins that a histogram may end with: of normal floats, two of which have a finite sum
DRIFT_GAIN = 0.1
DRIFT_KEPT = 0.98
BALANCE = 0.2  # how far a segment's anchor follows its own count
NEAR = 0.35  # two bins, between an anchor and what a histogram says
FIRST_SHARE = 0.03
FIRST_SLOPE = 0.2  # of log threshold against log count, of fresh gradients
FEW = 5.0  # entries, too few to go by a single step's count
PRIOR = 0.02  # weight of the forecast's slope beside the measured one


class Summary(NamedTuple):
    """What every device knows of earlier steps; S segments, float32 unless said."""

    mass: jax.Array  # [S, BINS]: the last histogram, averaged over devices
    top: jax.Array  # int32[S]: its highest bin
    log_anchor: jax.Array  # [S]: log of the threshold that would have filled the last payload exactly
    share: jax.Array  # [S]: of the elements, that lie above the anchor
    log_trim: jax.Array  # []: log of exact over forecast threshold in the last step
    drift: jax.Array  # []: how far log thresholds move in a step
    imbalance: jax.Array  # [S]: (realised - asked) / (asked + FEW) of the last step
    regression: jax.Array  # [2]: means of x y and x^2; x, y: logs of candidate over sent counts, thresholds
    size: jax.Array  # [S]: elements
    step: jax.Array  # int32[]: steps summed up


def bin_index(magnitude: jax.Array) -> jax.Array:
    """Number a magnitude's quarter-octave bin: its exponent and two top mantissa bits, no logarithm.

    Args:
      magnitude: float32[...], non-negative.

    Returns:
      int32[...].

    >>> import jax.numpy as jnp
    >>> (bin_index(jnp.float32([1.0, 1.3, 2.0])) - bin_index(jnp.float32(1.0))).tolist()
    [0, 1, 4]
    """
    return (jax.lax.bitcast_convert_type(magnitude, jnp.uint32) >> 21).astype(jnp.int32)


def edges(top: jax.Array) -> jax.Array:
    """List the bounds of the bins that end with a segment's highest.

    Args:
      top: int32[S].

    Returns:
      float32[S, BINS + 1], ascending, normal numbers; the highest are no more than half of what float32 holds.
    """
    index = jnp.clip(top, LOWEST, HIGHEST)[:, None] + jnp.arange(1 - BINS, 2)[None, :]
    return jax.lax.bitcast_convert_type(index.astype(jnp.uint32) << 21, jnp.float32)


def top_bin(magnitude: jax.Array, segment: jax.Array, valid: jax.Array, segments: int) -> jax.Array:
    """Find each segment's highest bin.

    Args:
      magnitude: float32[M], a sample.
      segment: int32[M], its segments.
      valid: bool[M].
      segments: S.

    Returns:
      int32[S], 0 where there is no sample.
    """
    return jnp.zeros(segments, jnp.int32).at[segment].max(jnp.where(valid, bin_index(magnitude), 0))


def histogram(magnitude: jax.Array, segment: jax.Array, valid: jax.Array, top: jax.Array, segments: int) -> jax.Array:
    """Count a sample's magnitudes in each segment's bins; the outermost bins hold all that is beyond.

    Args:
      magnitude: float32[M], a sample.
      segment: int32[M], its segments.
      valid: bool[M].
      top: int32[S], the highest bins.
      segments: S.

    Returns:
      float32[S, BINS].
    """
    place = bin_index(magnitude) - jnp.clip(top, LOWEST, HIGHEST)[segment] + BINS - 1
    place = segment * BINS + jnp.clip(place, 0, BINS - 1)
    counts = jnp.zeros(segments * BINS, jnp.int32).at[place].add(valid.astype(jnp.int32))
    return counts.reshape(segments, BINS).astype(jnp.float32)


def start(size: jax.Array) -> Summary:
    """Know nothing yet.

    Args:
      size: float32[S], elements of each segment.

    Returns:
      Summary.
    """
    zero = jnp.zeros_like(size)
    return Summary(
        mass=jnp.zeros((*size.shape, BINS), jnp.float32),
        top=jnp.zeros(size.shape, jnp.int32),
        log_anchor=zero,
        share=jnp.full_like(size, FIRST_SHARE),
        log_trim=jnp.float32(0.0),
        drift=jnp.float32(0.0),
        imbalance=zero,
        regression=jnp.zeros(2, jnp.float32),
        size=size,
        step=jnp.int32(0),
    )


def unseen(summary: Summary) -> jax.Array:
    """Tell the segments that have shown only zeros, or nothing at all, in their last histogram.

    Args:
      summary: of earlier steps.

    Returns:
      bool[S].
    """
    return summary.top == 0


def observe(summary: Summary, mass: jax.Array, top: jax.Array) -> Summary:
    """Take a histogram in; a segment's first one sets its anchor too.

    Args:
      summary: of earlier steps.
      mass: float32[S, BINS], counts or masses.
      top: int32[S].

    Returns:
      Summary.
    """
    above = jnp.cumsum(mass[:, ::-1], axis=1)[:, ::-1]
    reached = jnp.sum((above > summary.share[:, None] * jnp.sum(mass, axis=1, keepdims=True)).astype(jnp.int32), axis=1)
    anchor = jnp.take_along_axis(edges(top), jnp.clip(reached, 0, BINS)[:, None], axis=1)[:, 0]
    seen = jnp.log(anchor)
    # A segment that sends little has wandered with the others' trims: the histogram calls it back.
    near = jnp.clip(summary.log_anchor, seen - NEAR, seen + NEAR)
    return summary._replace(mass=mass, top=top, log_anchor=jnp.where(unseen(summary), seen, near))


def introduce(summary: Summary, mass: jax.Array, top: jax.Array) -> Summary:
    """Take a histogram in for those segments alone of which nothing is known from earlier steps.

    Args:
      summary: of earlier steps.
      mass: float32[S, BINS], counts or masses of the present step.
      top: int32[S].

    Returns:
      Summary.
    """
    new, first = unseen(summary), observe(summary, mass, top)
    return summary._replace(
        mass=jnp.where(new[:, None], first.mass, summary.mass),
        top=jnp.where(new, first.top, summary.top),
        log_anchor=jnp.where(new, first.log_anchor, summary.log_anchor),
    )


def advance(
    summary: Summary,
    *,
    threshold: jax.Array,
    share: jax.Array,
    asked: jax.Array,
    realised: jax.Array,
    took: jax.Array,
    log_trim: jax.Array,
    surplus: jax.Array,
    lowered: jax.Array,
    slope: jax.Array,
) -> Summary:
    """Take the outcome of a step in: the exact threshold, and each segment's count.

    Args:
      summary: of earlier steps.
      threshold: float32[S], as forecast for `share`.
      share: float32[S], asked for, of each segment's elements.
      asked: float32[S], entries.
      realised: float32[S], entries sent, mean over devices.
      took: bool[S], segments that left no room for others; where there are any, the step tells nothing of the others.
      log_trim: float32[], log of the factor on the thresholds that filled the payloads, mean over devices.
      surplus: float32[], log of candidates over entries that fit, mean over devices.
      lowered: float32[], log of the forecast over the proposed thresholds, at least 0.
      slope: float32[], of `slope_of`.

    Returns:
      Summary.
    """
    # Linear, so that it is zero on average where a segment of few entries has its due.
    flooded = jnp.any(took)
    told = took | ~flooded
    imbalance = jnp.where(told, jnp.clip((realised - asked) / (asked + FEW), -1.0, 2.0), 0.0)
    steepness = (asked * slope + FEW * FIRST_SLOPE) / (asked + FEW)
    common = jnp.where(flooded, 0.0, log_trim)
    drift = jnp.clip(DRIFT_KEPT * summary.drift + DRIFT_GAIN * jnp.clip(common, -0.2, 0.2), -0.1, 0.1)
    anchor = jnp.log(threshold) + jnp.where(told, log_trim, 0.0) + drift + BALANCE * steepness * imbalance
    anchor = jnp.clip(anchor, -80.0, 65.0)
    # Where candidates are more than entries, both ends of a chord of the survival function are known; where they are
    # fewer, one end is a guess made with the slope itself.
    x, y = jnp.clip(surplus, -2.0, 2.0), jnp.clip(lowered + log_trim, -1.0, 1.0)
    chord, known = jnp.stack([x * y, x * x]), (surplus > 0.05) & ~flooded
    return summary._replace(
        regression=jnp.where(known, 0.9 * summary.regression + 0.1 * chord, summary.regression),
        log_anchor=anchor,
        share=share,
        log_trim=common,
        drift=drift,
        imbalance=imbalance,
        step=summary.step + 1,
    )


def slope_of(summary: Summary, prior: jax.Array) -> jax.Array:
    """Give -d log threshold / d log count, as measured between candidates and entries sent of earlier steps.

    Under error feedback many entries wait just below the threshold, so that the slope is far less than that of fresh
    gradients: a threshold lower by one part in a hundred may let a quarter more through.

    Args:
      summary: of earlier steps.
      prior: float32[], positive: the forecast's own, for the start.

    Returns:
      float32[], positive.
    """
    products, squares = summary.regression[..., 0], summary.regression[..., 1]
    return jnp.clip((products + PRIOR * prior) / (squares + PRIOR), 1e-3, 1.0)


def moments(summary: Summary) -> Moments:
    """Sum a histogram up for a closed-form fit.

    Args:
      summary: of earlier steps.

    Returns:
      Moments, float32[S] each; those of a Laplace distribution where nothing was seen.
    """
    bounds = edges(summary.top)
    center = jnp.log(bounds[:, :-1] + bounds[:, 1:]) - jnp.log(2.0)
    total = jnp.sum(summary.mass, axis=1)
    seen = total > 0
    p = summary.mass / jnp.maximum(total, 1e-30)[:, None]
    # Relative to the highest bin, so that squares neither overflow nor vanish
    height = center[:, -1:]
    x = jnp.exp(center - height)
    mean = jnp.maximum(jnp.sum(p * x, axis=1), 1e-20)
    spread = 0.5 * jnp.log(jnp.maximum(jnp.sum(p * x**2, axis=1), 1e-30)) - jnp.log(mean)
    skew = jnp.log(mean) - jnp.sum(p * (center - height), axis=1)
    anchor = jnp.exp(jnp.clip(summary.log_anchor - height[:, 0], -40.0, 10.0))
    above = jnp.maximum(x - anchor[:, None], 0.0)
    beyond = jnp.sum(p * (above > 0), axis=1)
    excess = jnp.sum(p * above, axis=1) / (jnp.maximum(beyond, 1e-12) * anchor)
    laplace = 1.0 / -jnp.log(jnp.clip(summary.share, 1e-9, 0.9))
    return Moments(
        spread=jnp.where(seen, jnp.maximum(spread, 0.0), 0.35),
        skew=jnp.where(seen, jnp.maximum(skew, 0.0), 0.58),
        share=jnp.clip(summary.share, 1e-9, 0.99),
        anchor=jnp.where(seen, jnp.log(anchor) - jnp.log(mean), -jnp.log(laplace)),
        excess=jnp.where(seen & (beyond > 0), jnp.clip(excess, 0.01, 5.0), laplace),
    )
