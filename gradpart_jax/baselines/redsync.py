"""RedSync: a threshold between the mean and the largest magnitude, by halving.

Source: Fang, Fu, Yang and Hsieh, "RedSync: reducing synchronization bandwidth for distributed deep learning training
system" (2018), section 5.2, threshold binary search selection.
"""

from __future__ import annotations

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

HALVINGS = 10  # to a thousandth of the range


def redsync(ratio: float = 0.01, *, slack: float = 2.0) -> Scheme:
    """Send what reaches a threshold found by halving, of each leaf once to twice as many as asked for.

    With mu the mean and M the largest of a leaf's |a|, the threshold is mu + t (M - mu); t is halved towards more
    entries where no more than k = max(1, round(ratio d)) reach it, towards fewer where 2 k or more do, ten times at
    most. A leaf of which fewer than k lie above the mean sends fewer.

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
    >>> tx = gp.compress(gp.baselines.redsync(0.01))
    >>> gradient = jax.random.normal(jax.random.key(0), (10_000,))
    >>> out, _ = jax.jit(tx.update)(gradient, tx.init(gradient))
    >>> bool(100 <= (out != 0).sum() <= 200)
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
        ranks = jnp.asarray(quotas(ratio, layout), jnp.int32)
        words = reaching(vector, _search(vector, ranks, layout), layout)
        buffer = entries(vector, words, capacity(layout), state.shared)
        asked = ranks.astype(jnp.float32)
        reduced = share(vector, buffer, jnp.sum(popcount(words)), layout, axis_name, settle, asked)
        return reduced, SchemeState(state.shared + 1, ())

    return Scheme("redsync", init, reduce, capacity)


def _search(vector: jax.Array, ranks: jax.Array, layout: Layout) -> jax.Array:
    """Halve towards between k and 2 k entries in all segments at once: float32[S]."""
    scale = greatest_magnitude(vector, layout)
    mean = replicated(_means)(vector, scale, layout=layout)

    def bounds_at(t: jax.Array) -> jax.Array:
        return scale * replicated(lambda mean, t: mean + t * (1.0 - mean))(mean, t)

    def halve(_: jax.Array, span: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        low, high, _ = span
        middle = (low + high) / 2
        count = per_segment(reaching(vector, bounds_at(middle), layout), layout)
        few, many = count <= ranks, count >= 2 * ranks
        # One that satisfies stays: both ends move onto it.
        low, high = jnp.where(few, low, middle), jnp.where(many, high, middle)
        return low, high, middle

    zero = jnp.zeros_like(scale)
    _, _, t = jax.lax.fori_loop(0, HALVINGS, halve, (zero, zero + 1.0, zero))
    return bounds_at(t)


def _means(vector: jax.Array, scale: jax.Array, *, layout: Layout) -> jax.Array:
    sizes = jnp.asarray([max(size, 1) for size in layout.sizes], jnp.float32)
    return segment_sums(jnp.abs(scaled(vector, scale, layout)), layout) / sizes
