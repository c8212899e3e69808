"""Deep gradient compression: a threshold from a sample, corrected by counting, and a warm-up of falling ratios.

Source: Lin, Han, Mao, Wang and Dally, "Deep gradient compression" (ICLR 2018): section 3 and appendix for sampling and
hierarchical selection, 3.3 for warm-up. Its momentum correction and masking (3.1, 3.2) are `gp.compress(momentum=...)`,
its local clipping is `optax.clip_by_global_norm(bound / sqrt(W))` before that, on W devices.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from gradpart_jax.bits import popcount
from gradpart_jax.checks import check_integer, check_number
from gradpart_jax.exchange import AxisName
from gradpart_jax.magnitudes import entries, per_segment, quotas, rank_magnitude, reaching, room, trimmed
from gradpart_jax.scheme import Reduced, Scheme, SchemeState, Settle
from gradpart_jax.segments import Layout
from gradpart_jax.sparse import share

FEWEST, MOST = 0.8, 4.0  # counts over those asked for, between which a threshold is left as it is
LOWER, HIGHER = 0.8, 1.3  # factors on a threshold that too few, or too many, reach
CORRECTIONS = 10
WARMUP = (0.25, 0.0625, 0.015625, 0.004)


def dgc(
    ratio: float = 0.001, *, sample: float = 0.01, warmup_steps: int = 0, warmup: Sequence[float] = WARMUP
) -> Scheme:
    """Send what reaches a threshold read off a sample, of each leaf at most the largest asked for.

    Of a leaf with d elements, k = max(1, round(ratio d)) are asked for. The threshold is the magnitude of the same rank
    in every stride-th element; up to ten times it is multiplied by 0.8 where fewer than 0.8 k reach it, and by 1.3
    where more than 4 k do. Where neither helps, as where all magnitudes are nearly equal, the exact one is found. Of
    what reaches it, the k largest are sent (hierarchical selection, which makes raising the threshold needless before
    that).

    Args:
      ratio: of entries to send, in (0, 1].
      sample: of entries that are sampled, in (0, 1]; at least so many that one is expected above the threshold.
      warmup_steps: steps at each of the ratios of the warm-up, 0 for no warm-up. Each makes the program longer.
      warmup: ratios to begin with.

    Returns:
      A Scheme.

    Raises:
      TypeError: an argument is of a wrong type.
      ValueError: an argument is out of range.

    >>> import jax, jax.numpy as jnp, gradpart_jax as gp
    >>> tx = gp.compress(gp.baselines.dgc(0.01), momentum=0.9)
    >>> gradient = jax.random.normal(jax.random.key(0), (10_000,))
    >>> out, _ = jax.jit(tx.update)(gradient, tx.init(gradient))
    >>> bool(80 <= (out != 0).sum() <= 100)
    True
    """
    check_number("ratio", ratio, above=0.0, at_most=1.0, static=True)
    check_number("sample", sample, above=0.0, at_most=1.0, static=True)
    check_integer("warmup_steps", warmup_steps, 0, 2**31 - 1)
    for early in warmup:
        check_number("warmup", early, above=0.0, at_most=1.0, static=True)
    phases = (*warmup, ratio) if warmup_steps else (ratio,)

    def capacity(layout: Layout) -> int:
        return sum(quotas(ratio, layout))

    def init(layout: Layout) -> SchemeState:
        return SchemeState(jnp.int32(0), ())

    def reduce(
        vector: jax.Array, state: SchemeState, layout: Layout, axis_name: AxisName, settle: Settle
    ) -> tuple[Reduced, SchemeState]:
        step = state.shared

        def at(share_of: float) -> Callable[[jax.Array], Reduced]:
            return lambda vector: _send(vector, step, share_of, sample, layout, axis_name, settle)

        last = len(phases) - 1
        # Not once more when int32 wraps
        phase = jnp.where(step < 0, last, jnp.minimum(step // max(warmup_steps, 1), last))
        reduced = jax.lax.switch(phase, [at(p) for p in phases], vector) if warmup_steps else at(ratio)(vector)
        return reduced, SchemeState(step + 1, ())

    return Scheme("dgc", init, reduce, capacity)


def _send(
    vector: jax.Array,
    step: jax.Array,
    ratio: float,
    sample: float,
    layout: Layout,
    axis_name: AxisName,
    settle: Settle,
) -> Reduced:
    counts = quotas(ratio, layout)
    ranks = jnp.asarray(counts, jnp.int32)
    bounds = _corrected(vector, sampled(vector, step, ratio, sample, layout), ranks, layout)
    words = reaching(vector, bounds, layout)
    # What is left out here is rare: of very many equal magnitudes some.
    candidates = entries(vector, words, room(ratio, MOST, layout), step)
    buffer = trimmed(candidates, ranks, sum(counts), layout)
    return share(vector, buffer, jnp.sum(popcount(words)), layout, axis_name, settle, ranks.astype(jnp.float32))


def sampled(vector: jax.Array, step: jax.Array, ratio: float, sample: float, layout: Layout) -> jax.Array:
    """Read thresholds off a sample, which begins one element later each step.

    Args:
      vector: float32[n].
      step: int32[].
      ratio: as in `dgc`.
      sample: as in `dgc`.
      layout: the segments.

    Returns:
      float32[S].
    """
    positions, owners, strides, final, ends, before = [], [], [], [], [], 0
    for s, (start, size) in enumerate(zip(layout.starts, layout.sizes, strict=True)):
        drawn = min(size, max(math.ceil(sample * size), math.ceil(1 / ratio)))
        strides.append(-(-size // max(drawn, 1)) or 1)
        final.append(start + max(size, 1) - 1)
        ends.append(before + min(drawn, max(1, round(ratio * drawn))) - 1)
        before += drawn
        positions.append(start + np.arange(drawn, dtype=np.int64) * size // max(drawn, 1))
        owners.append(np.full(drawn, s, np.int32))
    place, owner = jnp.asarray(np.concatenate(positions), jnp.int32), jnp.asarray(np.concatenate(owners))
    place += (step % jnp.asarray(strides, jnp.int32))[owner]
    place = jnp.minimum(place, jnp.asarray(final, jnp.int32)[owner])
    _, ordered = jax.lax.sort((owner, -jnp.abs(vector[place])), num_keys=2)
    return -ordered.at[jnp.asarray(ends, jnp.int32)].get(mode="clip")


def _corrected(vector: jax.Array, bounds: jax.Array, ranks: jax.Array, layout: Layout) -> jax.Array:
    asked = ranks.astype(jnp.float32)
    # Where all are asked for no sample need say so
    bounds = jnp.where(ranks < jnp.asarray(layout.sizes, jnp.int32), bounds, 0.0)

    def off(search: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        _, factors, turn = search
        return jnp.any(factors != 1.0) & (turn < CORRECTIONS)

    def factors_at(bounds: jax.Array) -> jax.Array:
        count = per_segment(reaching(vector, bounds, layout), layout).astype(jnp.float32)
        return jnp.where(count < FEWEST * asked, LOWER, jnp.where(count > MOST * asked, HIGHER, 1.0))

    def correct(search: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        bounds, factors, turn = search
        bounds = bounds * factors
        return bounds, factors_at(bounds), turn + 1

    bounds, factors, _ = jax.lax.while_loop(off, correct, (bounds, factors_at(bounds), jnp.int32(0)))
    exact = jax.lax.cond(
        jnp.any(factors != 1.0), lambda: rank_magnitude(vector, jnp.maximum(ranks, 1), layout), lambda: bounds
    )
    return jnp.where(factors != 1.0, exact, bounds)
