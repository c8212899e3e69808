"""Random-k: entries drawn by a seed that all devices share, so that an all-reduce carries them without positions.

Source: Stich, Cordonnier and Jaggi, "Sparsified SGD with memory" (NeurIPS 2018), definition 2.1 (rand_k); Wangni et
al., "Gradient sparsification for communication-efficient distributed optimization" (NeurIPS 2018), for the unbiased
form. The draw is stratified: one entry of each of k runs of neighbours.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from gradpart_jax.checks import check_integer, check_number
from gradpart_jax.exchange import AxisName
from gradpart_jax.replicated import seeded
from gradpart_jax.scheme import Reduced, Scheme, SchemeState, Settle
from gradpart_jax.segments import Layout, segment_of
from gradpart_jax.sparse import share_at


def randomk(ratio: float = 0.01, *, unbiased: bool = False, seed: int = 0) -> Scheme:
    """Send entries drawn at random, other ones each step, the same on every device.

    The n elements are cut into k = max(1, round(ratio n)) runs, and one entry of each is sent: every entry with
    probability 1 / (its run's length), about k / n. Sending a as it is, is a contraction in expectation:
    E |a - C(a)|^2 <= (1 - 1 / longest run) |a|^2. Unbiased, a times its run's length is sent: E C(a) = a.

    Args:
      ratio: of entries to send, in (0, 1].
      unbiased: whether values are scaled up to be right on average; then use `error_feedback=False`.
      seed: of the draws.

    Returns:
      A Scheme.

    Raises:
      TypeError: an argument is of a wrong type.
      ValueError: an argument is out of range.

    >>> import jax.numpy as jnp, gradpart_jax as gp
    >>> tx = gp.compress(gp.baselines.randomk(0.25))
    >>> gradient = jnp.ones(16)
    >>> float(tx.update(gradient, tx.init(gradient))[0].sum())
    4.0
    """
    check_number("ratio", ratio, above=0.0, at_most=1.0, static=True)
    check_integer("seed", seed, 0, 2**32 - 1)

    def capacity(layout: Layout) -> int:
        return min(layout.elements, max(1, round(ratio * layout.elements)))

    def init(layout: Layout) -> SchemeState:
        return SchemeState(jnp.int32(0), ())

    def reduce(
        vector: jax.Array, state: SchemeState, layout: Layout, axis_name: AxisName, settle: Settle
    ) -> tuple[Reduced, SchemeState]:
        step, count = state.shared, capacity(layout)
        key = jax.random.fold_in(seeded(seed), step)
        indices, lengths = _draw(jax.random.bits(key, (count,), jnp.uint32), layout)
        factors = lengths.astype(jnp.float32) if unbiased else None
        return share_at(vector, indices, layout, axis_name, settle, factors), SchemeState(step + 1, ())

    return Scheme("randomk", init, reduce, capacity)


def _draw(bits: jax.Array, layout: Layout) -> tuple[jax.Array, jax.Array]:
    """Draw one position of each run: int32[k] positions, ascending, and int32[k] lengths of the runs."""
    count = bits.shape[0]
    length, longer = divmod(layout.elements, count)
    run = jnp.arange(count, dtype=jnp.int32)
    lengths = length + (run < longer)
    place = run * length + jnp.minimum(run, longer) + (bits % lengths.astype(jnp.uint32)).astype(jnp.int32)
    tight = np.cumsum([0, *layout.sizes])[:-1]
    packed = dataclasses.replace(layout, starts=tuple(int(t) for t in tight), total=layout.elements)
    shifts = jnp.asarray(np.asarray(layout.starts) - tight, jnp.int32)
    return place + shifts[segment_of(place, packed)], lengths
