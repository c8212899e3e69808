"""Thresholds by other methods, each from the literature's own formulas, on one flat vector of magnitudes.

A rival is called with the present |gradient + memory|, float64[n], and the share to select; it may keep state.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
from scipy import special, stats


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
        count = max(1, round(share * x.size))
        exact = float(np.partition(x, x.size - count)[x.size - count])
        last, self._last = self._last, exact
        return exact if last is None else last

    def realised(self, ratio: float) -> None:
        """Need no feedback."""


class Sidco:
    """SIDCo (Abdelmoniem et al., MLSys 2021): fits of the tail of the tail, with as many stages as counts call for."""

    FIRST = 0.25

    def __init__(self, first: str, later: str, adaptive: bool) -> None:
        self._first, self._later, self._adaptive = first, later, adaptive
        self._stages, self._step, self._ratios = 1, 0, [1.0]

    def threshold(self, x: np.ndarray, share: float) -> float:
        """Fit stage by stage to what is above the stage before."""
        shares = [share]
        if self._stages > 1:
            later = (share / self.FIRST) ** (1 / (self._stages - 1))
            shares = [self.FIRST] + [later] * (self._stages - 1)
        least = 0.0
        for stage, part in enumerate(shares):
            kept = x[x > least]
            if kept.size < 3:
                break
            least = self._fit(self._first if stage == 0 else self._later, kept, least, part)
        return least

    def _fit(self, kind: str, x: np.ndarray, least: float, share: float) -> float:
        mean, variance = float(np.mean(x - least)), float(np.var(x - least))
        if kind == "exponential":
            return least - mean * np.log(share)
        if kind == "gamma":
            order = _gamma_order(x)
            return float(np.mean(x) / order * special.gammaincinv(order, 1 - share))
        k, scale = (mean**2 / variance - 1) / 2, mean * (mean**2 / variance + 1) / 2
        return float(
            least - scale * np.expm1(k * np.log(share)) / k if abs(k) > 1e-6 else least - scale * np.log(share)
        )

    def realised(self, ratio: float) -> None:
        """Change the number of stages, every five steps."""
        self._ratios.append(ratio)
        self._step += 1
        if self._adaptive and self._step % 5 == 0:
            mean = float(np.mean(self._ratios[-5:]))
            self._stages = max(1, self._stages + (mean < 0.8) - (mean > 1.2))


class Normal:
    """The quantile of a normal distribution with mean 0, as in GaussianK (Shi et al., 2019), uncorrected."""

    def threshold(self, x: np.ndarray, share: float) -> float:
        """Fit the standard deviation."""
        return float(np.sqrt(np.mean(x**2)) * stats.norm.isf(share / 2))

    def realised(self, ratio: float) -> None:
        """Need no feedback."""


class Sampled:
    """The top of a 1 % strided sample, as in DGC (Lin et al., ICLR 2018)."""

    def __init__(self) -> None:
        self._step = 0

    def threshold(self, x: np.ndarray, share: float) -> float:
        """Look at another hundredth of the entries each step."""
        sample = x[self._step % 100 :: 100]
        self._step += 1
        count = max(1, round(share * sample.size))
        return float(np.partition(sample, sample.size - count)[sample.size - count])

    def realised(self, ratio: float) -> None:
        """Need no feedback."""


RIVALS: dict[str, tuple[Callable[[], Rival], str | None]] = {
    "last threshold kept": (Kept, None),
    "SIDCo, one stage, exponential": (lambda: Sidco("exponential", "exponential", False), "exponential"),
    "SIDCo, adaptive, exponential": (lambda: Sidco("exponential", "exponential", True), None),
    "SIDCo, adaptive, gamma and Pareto": (lambda: Sidco("gamma", "pareto", True), "gamma"),
    "normal quantile": (Normal, "normal"),
    "DGC, sampled": (Sampled, None),
}


def _gamma_order(x: np.ndarray) -> float:
    """Estimate a gamma distribution's order in closed form (Minka, 2002), as SIDCo does."""
    s = max(np.log(max(np.mean(x), 1e-30)) - np.mean(np.log(np.maximum(x, 1e-30))), 1e-9)
    return float((3 - s + np.sqrt((s - 3) ** 2 + 24 * s)) / (12 * s))


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
    mean = max(float(np.mean(x)), 1e-30)
    fitted: Any
    if kind == "exponential":
        fitted = stats.expon(scale=mean)
    elif kind == "normal":
        fitted = stats.halfnorm(scale=max(float(np.sqrt(np.mean(x**2))), 1e-30))
    else:
        order = _gamma_order(x)
        fitted = stats.gamma(order, scale=mean / order)
    above = fitted.sf(edges)
    above[0], above[-1] = 1.0, 0.0
    expected = np.maximum(above[:-1] - above[1:], 1e-9)
    return float(-np.sum(mass / mass.sum() * np.log2(expected)))
