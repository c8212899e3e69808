"""Entropy-based selection: leaves whose gradient is spread over more magnitudes send more of it.

After the abstract of Xiao et al., "EGC: Entropy-based gradient compression for distributed deep learning" (Information
Sciences 2021): entropy guides how much of each layer is selected, with residuals and momentum correction. The rule is
this package's own. The momentum correction is `gp.compress(momentum=...)`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from gradpart_jax.checks import check_number
from gradpart_jax.exchange import AxisName
from gradpart_jax.magnitudes import entries, quotas, top
from gradpart_jax.replicated import replicated
from gradpart_jax.scheme import Reduced, Scheme, SchemeState, Settle
from gradpart_jax.segments import Layout, sample_positions
from gradpart_jax.sparse import share
from gradpart_jax.summaries import histogram, top_bin

SAMPLE = 2**17  # elements that histograms are made from


def egc(ratio: float = 0.01) -> Scheme:
    """Send the largest magnitudes of each leaf, as many as its entropy calls for.

    With H the entropy of the histogram of |a| in a leaf with d elements (64 bins of a quarter octave), the leaf's share
    of all entries goes by d H, present values alone deciding: each device chooses its own. A leaf sends at least one
    entry, and never more than it has.

    Args:
      ratio: of entries to send, in (0, 1].

    Returns:
      A Scheme.

    Raises:
      TypeError: ratio is not a number.
      ValueError: ratio is out of range.

    >>> import jax, jax.numpy as jnp, gradpart_jax as gp
    >>> tx = gp.compress(gp.baselines.egc(0.1))
    >>> gradient = {"spread": jnp.exp(jnp.linspace(0.0, 5.0, 100)), "peaked": jnp.full(100, 2.0)}
    >>> out, _ = jax.jit(tx.update)(gradient, tx.init(gradient))
    >>> {name: int((leaf != 0).sum()) for name, leaf in out.items()}
    {'peaked': 1, 'spread': 19}
    """
    check_number("ratio", ratio, above=0.0, at_most=1.0, static=True)

    def capacity(layout: Layout) -> int:
        return sum(quotas(ratio, layout))

    def reduce(
        vector: jax.Array, state: SchemeState, layout: Layout, axis_name: AxisName, settle: Settle
    ) -> tuple[Reduced, SchemeState]:
        places, owners = sample_positions(layout, SAMPLE)
        values, owner = jnp.abs(vector[places]), jnp.asarray(owners)
        valid = jnp.isfinite(values) & (values > 0)
        counts = histogram(values, owner, valid, top_bin(values, owner, valid, layout.segments), layout.segments)
        ranks = replicated(_ranks)(counts, sizes=layout.sizes, entries=capacity(layout))
        buffer = entries(vector, top(vector, ranks, layout), capacity(layout), jnp.int32(0))
        return share(vector, buffer, buffer.used, layout, axis_name, settle), state

    return Scheme("egc", lambda layout: SchemeState((), ()), reduce, capacity)


def _ranks(counts: jax.Array, *, sizes: tuple[int, ...], entries: int) -> jax.Array:
    """Share entries out by entropy: int32[S], each at least 1 of a segment that is not empty, their sum at most all."""
    size = jnp.asarray(sizes, jnp.float32)
    filled = size > 0
    share = counts / jnp.maximum(jnp.sum(counts, axis=1, keepdims=True), 1.0)
    entropy = -jnp.sum(share * jnp.log(jnp.maximum(share, 1e-30)), axis=1)
    weight = size * entropy
    weight = jnp.where(jnp.sum(weight) > 0, weight, size)
    left = entries - sum(n > 0 for n in sizes)
    # Rounded down with a margin for the division's own rounding
    extra = jnp.floor(left * (weight / jnp.maximum(jnp.sum(weight), 1e-30)) * (1 - 1e-6) + 1e-3)
    return jnp.where(filled, jnp.minimum(1 + extra, size), 0.0).astype(jnp.int32)
