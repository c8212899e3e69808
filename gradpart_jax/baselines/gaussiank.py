"""GaussianK: the threshold is a normal distribution's quantile, corrected by counting.

Source: Shi, Chu, Cheung and See, "Understanding top-k sparsification in distributed deep learning" (2019), algorithm 1.
"""

from __future__ import annotations

from statistics import NormalDist

import jax
import jax.numpy as jnp

from gradpart_jax.bits import popcount
from gradpart_jax.checks import check_number
from gradpart_jax.exchange import AxisName
from gradpart_jax.magnitudes import entries, per_segment, quotas, reaching, room
from gradpart_jax.moments import greatest_magnitude, scaled
from gradpart_jax.reductions import segment_sums
from gradpart_jax.replicated import replicated
from gradpart_jax.scheme import Reduced, Scheme, SchemeState, Settle
from gradpart_jax.segments import Layout
from gradpart_jax.sparse import share

COUNTS = 3  # the last of which is of what is sent


def gaussiank(ratio: float = 0.01, *, slack: float = 1.25) -> Scheme:
    """Send what reaches the quantile of a normal distribution fitted to each leaf.

    Of a leaf with mean mu and standard deviation sigma, the threshold is mu + Phi^-1(1 - ratio / 2) sigma. It is halved
    where fewer than 2/3 of those asked for reach it, and multiplied by 1.5 where more than 4/3 do, two times at most:
    of the paper's three counts the last is of what is sent. Real tails are heavier than a normal distribution's: the
    counts may stay off by more than that.

    Args:
      ratio: of entries asked for, in (0, 1].
      slack: room in the payload over those asked for, at least 1. Of more than it holds a run is left for later,
        another one each step.

    Returns:
      A Scheme.

    Raises:
      TypeError: an argument is not a number.
      ValueError: an argument is out of range.

    >>> import jax, jax.numpy as jnp, gradpart_jax as gp
    >>> tx = gp.compress(gp.baselines.gaussiank(0.01))
    >>> gradient = jax.random.normal(jax.random.key(0), (10_000,))
    >>> out, _ = jax.jit(tx.update)(gradient, tx.init(gradient))
    >>> bool(66 <= (out != 0).sum() <= 125)
    True
    """
    check_number("ratio", ratio, above=0.0, at_most=1.0, static=True)
    check_number("slack", slack, at_least=1.0, static=True)

    def capacity(layout: Layout) -> int:
        return room(ratio, slack, layout)

    def init(layout: Layout) -> SchemeState:
        return SchemeState(jnp.int32(0), ())

    def reduce(
        vector: jax.Array, state: SchemeState, layout: Layout, axis_name: AxisName, settle: Settle
    ) -> tuple[Reduced, SchemeState]:
        asked = jnp.asarray(quotas(ratio, layout), jnp.float32)
        bounds = quantiles(vector, ratio, layout)
        for _ in range(COUNTS - 1):
            count = per_segment(reaching(vector, bounds, layout), layout).astype(jnp.float32)
            bounds = bounds * jnp.where(3 * count < 2 * asked, 0.5, jnp.where(3 * count > 4 * asked, 1.5, 1.0))
        # The last factor may have left all of a segment behind
        words = reaching(vector, jnp.minimum(bounds, greatest_magnitude(vector, layout)), layout)
        buffer = entries(vector, words, capacity(layout), state.shared)
        reduced = share(vector, buffer, jnp.sum(popcount(words)), layout, axis_name, settle, asked)
        return reduced, SchemeState(state.shared + 1, ())

    return Scheme("gaussiank", init, reduce, capacity)


def quantiles(vector: jax.Array, ratio: float, layout: Layout) -> jax.Array:
    """Fit a normal distribution to each segment, and take mu + Phi^-1(1 - ratio / 2) sigma.

    Args:
      vector: float32[n].
      ratio: as in `gaussiank`.
      layout: the segments.

    Returns:
      float32[S], at least 0.
    """
    scale = greatest_magnitude(vector, layout)
    return replicated(_quantiles)(vector, scale, layout=layout, deviations=NormalDist().inv_cdf(1 - ratio / 2))


def _quantiles(vector: jax.Array, scale: jax.Array, *, layout: Layout, deviations: float) -> jax.Array:
    sizes = jnp.asarray([max(size, 1) for size in layout.sizes], jnp.float32)
    x = scaled(vector, scale, layout)
    mean = segment_sums(x, layout) / sizes
    variance = jnp.maximum(segment_sums(x * x, layout) / sizes - mean * mean, 0.0)
    return scale * jnp.maximum(mean + deviations * jnp.sqrt(variance), 0.0)
