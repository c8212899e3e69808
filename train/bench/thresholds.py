"""Thresholds by other methods, from the library's own functions, on one flat vector.

A rival is called with the present gradient + memory, float[n], and the share to select; it may keep state.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np

from gradpart_jax.baselines.dgc import sampled
from gradpart_jax.baselines.gaussiank import quantiles
from gradpart_jax.baselines.sidco import EVERY, Stages, adapted, bounds
from gradpart_jax.families import family, gamma_order, raw_of
from gradpart_jax.magnitudes import quotas, rank_magnitude
from gradpart_jax.segments import Layout, layout_of, ravel

SAMPLE = 0.01  # of DGC


class Rival(Protocol):
    """A way to set a threshold."""

    def threshold(self, x: np.ndarray, share: float) -> float:
        """Set the threshold of this step."""
        ...

    def realised(self, ratio: float) -> None:
        """Take in how many were selected, over how many were asked for."""
        ...


class Kept:
    """The exact threshold of the step before."""

    def __init__(self) -> None:
        self._last: float | None = None

    def threshold(self, x: np.ndarray, share: float) -> float:
        """Keep the last exact threshold; the first step has its own."""
        vector, layout = _flat(x)
        exact = float(rank_magnitude(vector, jnp.asarray(quotas(share, layout), jnp.int32), layout)[0])
        last, self._last = self._last, exact
        return exact if last is None else last

    def realised(self, ratio: float) -> None:
        """Need no feedback."""


class Sidco:
    """SIDCo's fits of the tail of the tail, with as many stages as counts call for."""

    def __init__(self, fit: str, stages: int) -> None:
        self._fit, self._most, self._step = fit, stages, 0
        self._stages = Stages(jnp.ones(1, jnp.int32), jnp.zeros(1, jnp.int32))
        self._asked = 1

    def threshold(self, x: np.ndarray, share: float) -> float:
        """Fit stage by stage to what is above the stage before."""
        vector, layout = _flat(x)
        (self._asked,) = quotas(share, layout)
        return float(_fitted(vector, self._stages.number, share, self._fit, self._most, layout)[0])

    def realised(self, ratio: float) -> None:
        """Change the number of stages, every five steps."""
        self._step += 1
        count = jnp.asarray([round(ratio * self._asked)], jnp.int32)
        asked, due = jnp.asarray([self._asked], jnp.float32), jnp.bool_(self._step % EVERY == 0)
        self._stages = adapted(self._stages, count, asked, due, self._most)


class Normal:
    """The quantile of a normal distribution, as GaussianK begins with, uncorrected."""

    def threshold(self, x: np.ndarray, share: float) -> float:
        """Fit the mean and the standard deviation."""
        vector, layout = _flat(x)
        return float(_quantile(vector, share, layout)[0])

    def realised(self, ratio: float) -> None:
        """Need no feedback."""


class Sampled:
    """The top of a 1 % strided sample, as DGC begins with, uncorrected."""

    def __init__(self) -> None:
        self._step = 0

    def threshold(self, x: np.ndarray, share: float) -> float:
        """Look at another hundredth of the entries each step."""
        vector, layout = _flat(x)
        self._step += 1
        return float(_of_sample(vector, jnp.int32(self._step - 1), share, SAMPLE, layout)[0])

    def realised(self, ratio: float) -> None:
        """Need no feedback."""


RIVALS: dict[str, tuple[Callable[[], Rival], str | None]] = {
    "last threshold kept": (Kept, None),
    "SIDCo, one stage, exponential": (lambda: Sidco("exponential", 1), "exponential"),
    "SIDCo, adaptive, exponential": (lambda: Sidco("exponential", 5), None),
    "SIDCo, adaptive, gamma and Pareto": (lambda: Sidco("gamma", 5), "gamma"),
    "normal quantile": (Normal, "normal"),
    "DGC, sampled": (Sampled, None),
}

_fitted = jax.jit(bounds, static_argnums=(2, 3, 4, 5))
_quantile = jax.jit(quantiles, static_argnums=(1, 2))
_of_sample = jax.jit(sampled, static_argnums=(2, 3, 4))


def _flat(x: np.ndarray) -> tuple[jax.Array, Layout]:
    layout = layout_of(x)
    return ravel(jnp.asarray(x, jnp.float32), layout), layout


def cross_entropy(kind: str, x: np.ndarray, mass: np.ndarray, edges: np.ndarray) -> float:
    """Judge a closed-form fit to one segment.

    Args:
      kind: exponential, gamma or normal.
      x: its magnitudes.
      mass: float[B], the observed counts.
      edges: float[B + 1] of the bins, of which the lowest reaches down to 0.

    Returns:
      Bits.
    """
    mean, shape = max(float(np.mean(x)), 1e-30), jnp.zeros(0)
    if kind == "exponential":
        name, scale = "laplace", mean  # of whose magnitudes it is the distribution
    elif kind == "normal":
        name, scale = "normal", max(float(np.sqrt(np.mean(x**2))), 1e-30)
    else:
        skew = max(np.log(mean) - float(np.mean(np.log(np.maximum(x, 1e-30)))), 1e-6)
        order = gamma_order(jnp.float32(skew))
        name, scale, shape = "gamma", mean / float(order), raw_of(order)[None]
    above = np.array(family(name).survival(jnp.asarray(edges / scale, jnp.float32), shape), float)
    above[0], above[-1] = 1.0, 0.0
    expected = np.maximum(above[:-1] - above[1:], 1e-9)
    return float(-np.sum(mass / mass.sum() * np.log2(expected)))
