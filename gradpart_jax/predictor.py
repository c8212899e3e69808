"""The predictor: a Flax network that forecasts each segment's magnitude distribution from earlier steps alone.

A closed-form fit to what all devices know (the last histogram, and the exact threshold that filled the last payload) is
the start; the network corrects its shape and says how far the scale will move. Under error feedback |gradient + memory|
has an edge at the last threshold, so that the forecast is anchored there rather than at a moment of the whole.
"""

from __future__ import annotations

import dataclasses
import functools
import io
from importlib import resources
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict, unflatten_dict

from gradpart_jax.families import FAMILIES, Family, Moments
from gradpart_jax.summaries import FIRST_SLOPE, Summary, edges, moments, slope_of

DEFAULT_FAMILY = "pareto"
FEATURES = 11
HIDDEN = 16
LARGEST_DRIFT = 0.05  # of log scale in one step, as the network may forecast it
LARGEST_MISFIT = 0.35  # of log scale, where a closed-form fit sets it rather than the anchor
LEARNING_RATE = 1e-3


@dataclasses.dataclass(frozen=True)
class Forecast:
    """A forecast magnitude distribution for each of S segments."""

    family: Family
    shape: jax.Array  # float32[S, shapes], raw
    scale: jax.Array  # float32[S]

    def survival(self, x: jax.Array) -> jax.Array:
        """Give P(|a| > x).

        Args:
          x: float32[S, K].

        Returns:
          float32[S, K].
        """
        return self.family.survival(x / self.scale[:, None], self.shape[:, None, :])

    def quantile(self, share: jax.Array) -> jax.Array:
        """Give the magnitude above which a share lies.

        Args:
          share: float32[S].

        Returns:
          float32[S].
        """
        return self.scale * self.family.quantile(share, self.shape)

    def masses(self, top: jax.Array) -> jax.Array:
        """Give the forecast of a histogram.

        Args:
          top: int32[S], the highest bins; the outermost bins hold the tails.

        Returns:
          float32[S, BINS], which add up to 1.
        """
        above = self.survival(edges(top)[:, 1:-1])
        above = jnp.pad(above, ((0, 0), (1, 0)), constant_values=1.0)
        return jnp.maximum(above - jnp.pad(above[:, 1:], ((0, 0), (0, 1))), 0.0)

    def slope(self, share: jax.Array) -> jax.Array:
        """Give -d log x / d log share at a quantile: what a factor on the count means for the threshold.

        Args:
          share: float32[S].

        Returns:
          float32[S], positive.
        """
        share = jnp.clip(share, 1e-10, 0.8)
        ends = self.family.quantile(share / 1.1, self.shape), self.family.quantile(share * 1.1, self.shape)
        return jnp.clip(jnp.log(ends[0] / ends[1]) / (2 * np.log(1.1)), 1e-3, 3.0)


class Affine(nn.Module):
    """y = x A + b, as a product and a sum: a matrix product may round otherwise when it is batched."""

    width: int
    scale: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map float32[..., F] to float32[..., width]."""
        start = nn.initializers.variance_scaling(self.scale, "fan_in", "normal")
        kernel = self.param("kernel", start, (x.shape[-1], self.width))
        bias = self.param("bias", nn.initializers.zeros, (self.width,))
        return jnp.sum(x[..., :, None] * kernel[None], axis=-2) + bias[None]


class Predictor(nn.Module):
    """Correct the shape of a fit, and forecast the drift of its scale; shared by all segments."""

    shapes: int

    @nn.compact
    def __call__(self, features: jax.Array) -> jax.Array:
        """Map float32[S, FEATURES] to float32[S, shapes + 1], small at first."""
        hidden = nn.tanh(Affine(HIDDEN, 1.0)(features))
        hidden = nn.tanh(Affine(HIDDEN, 1.0)(hidden))
        return Affine(self.shapes + 1, 1e-4)(hidden)


def features(summary: Summary, known: Moments) -> jax.Array:
    """Scale what is known to numbers of order one.

    Args:
      summary: of earlier steps.
      known: of `moments`.

    Returns:
      float32[S, FEATURES].
    """
    columns = [
        jnp.log(jnp.maximum(summary.size, 1.0)) / 16.0,
        jnp.log(known.share) / 7.0,
        known.spread,
        known.skew / 4.0,
        known.anchor / 4.0,
        jnp.log(known.excess),
        jnp.broadcast_to(jnp.clip(summary.log_trim, -1.0, 1.0) * 4.0, summary.size.shape),
        jnp.broadcast_to(jnp.clip(summary.drift, -0.1, 0.1) * 20.0, summary.size.shape),
        jnp.clip(summary.imbalance, -2.0, 2.0),
        jnp.broadcast_to(jnp.log(slope_of(summary, jnp.float32(FIRST_SLOPE))) / 4.0, summary.size.shape),
        jnp.broadcast_to(jnp.log1p(summary.step.astype(jnp.float32)) / 8.0, summary.size.shape),
    ]
    return jnp.clip(jnp.nan_to_num(jnp.stack(columns, axis=-1)), -10.0, 10.0)


def forecast(weights: Any, summary: Summary, name: str) -> Forecast:
    """Forecast the next step's distributions.

    Args:
      weights: of `load` or `initialise`, for the same family.
      summary: of earlier steps.
      name: of the family.

    Returns:
      Forecast.
    """
    family = FAMILIES[name]
    known = moments(summary)
    raw = Predictor(family.shapes).apply({"params": weights}, features(summary, known))
    assert isinstance(raw, jax.Array)
    correction, drift = raw[:, :-1], jnp.tanh(raw[:, -1])
    if family.anchored:
        # The share above the anchor is known, to the entry.
        shape = family.fit(known) + correction.at[:, 0].set(0.0)
        log_scale = summary.log_anchor + LARGEST_DRIFT * drift
    else:
        shape = family.fit(known) + correction
        anchor = jnp.log(family.quantile(known.share, jax.lax.stop_gradient(shape)))
        log_scale = summary.log_anchor + LARGEST_MISFIT * drift - anchor
    return Forecast(family, shape, jnp.exp(jnp.clip(log_scale, -80.0, 65.0)))


def cross_entropy(mass: jax.Array, expected: jax.Array) -> jax.Array:
    """Measure how unexpected a histogram is: -sum p log q.

    Args:
      mass: float32[..., BINS], observed; counts or masses.
      expected: float32[..., BINS], forecast masses.

    Returns:
      float32[...], nats; 0 where nothing was observed.
    """
    mass = mass / jnp.maximum(jnp.sum(mass, axis=-1, keepdims=True), 1e-30)
    return -jnp.sum(mass * jnp.log(jnp.maximum(expected, 1e-9)), axis=-1)


def loss(weights: Any, summary: Summary, mass: jax.Array, top: jax.Array, name: str) -> jax.Array:
    """Measure a forecast: the cross-entropy of the observed from the forecast histogram, nats, mean over segments.

    Args:
      weights: of the network.
      summary: of earlier steps.
      mass: float32[S, BINS], observed; counts or masses.
      top: int32[S].
      name: of the family.

    Returns:
      float32[].
    """
    each = cross_entropy(mass, forecast(weights, summary, name).masses(top))
    seen = jnp.sum(mass, axis=-1) > 0
    return jnp.sum(jnp.where(seen, each, 0.0)) / jnp.maximum(jnp.sum(seen), 1)


def _optimizer() -> optax.GradientTransformation:
    # Flat: one operation for all the layers is a third of the compile time
    return optax.flatten(optax.chain(optax.clip_by_global_norm(1.0), optax.adam(LEARNING_RATE)))


def start_learning(weights: Any) -> Any:
    """Make the optimizer state of `learn`."""
    return _optimizer().init(weights)


def learn(weights: Any, state: Any, summary: Summary, mass: jax.Array, top: jax.Array, name: str) -> tuple[Any, Any]:
    """Take one small step of on-line training.

    Args:
      weights: of the network.
      state: of the optimizer.
      summary: of the steps before the histogram.
      mass: float32[S, BINS], observed.
      top: int32[S].
      name: of the family.

    Returns:
      Weights and optimizer state.
    """
    gradient = jax.grad(loss)(weights, summary, mass, top, name)
    updates, state = _optimizer().update(jax.tree.map(jnp.nan_to_num, gradient), state)
    return optax.apply_updates(weights, updates), state


def initialise(seed: int, name: str) -> Any:
    """Make a fresh network, which changes a closed-form fit hardly at all.

    Args:
      seed: of its random weights.
      name: of the family.

    Returns:
      Its parameters.
    """
    module = Predictor(FAMILIES[name].shapes)
    return module.init(jax.random.key(seed), jnp.zeros((1, FEATURES)))["params"]


def save(weights: Any, path: str) -> None:
    """Write weights to a file that `load` can read.

    Args:
      weights: of the network.
      path: of the .npz file.
    """
    arrays: dict[str, Any] = {"/".join(k): np.asarray(v, np.float32) for k, v in flatten_dict(weights).items()}
    np.savez(path, **arrays)


@functools.cache
def _shipped(name: str) -> dict[str, np.ndarray]:
    data = resources.files("gradpart_jax").joinpath("weights", f"{name}.npz").read_bytes()
    with np.load(io.BytesIO(data)) as arrays:
        return {key: arrays[key] for key in arrays.files}


def load(name: str) -> Any:
    """Load the weights that ship with the package; `python -m train.pretrain` made them.

    Args:
      name: of the family.

    Returns:
      The network's parameters.
    """
    return unflatten_dict({tuple(key.split("/")): jnp.asarray(value) for key, value in _shipped(name).items()})
