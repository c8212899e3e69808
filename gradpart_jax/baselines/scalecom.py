"""ScaleCom: one device's selection, in turn, serves all, so that an all-reduce carries the values.

Source: Chen et al., "ScaleCom: scalable sparsified gradient compression for communication-efficient distributed
training" (NeurIPS 2020), section 3: the cyclic local top-k compressor, and the low-pass filter on the memory.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from gradpart_jax import accounting
from gradpart_jax.accounting import WORD_BITS
from gradpart_jax.buffers import scatter_add
from gradpart_jax.checks import check_number
from gradpart_jax.codecs import index_codec
from gradpart_jax.exchange import AxisName, axis_size, from_leader
from gradpart_jax.feedback import Memory, Sent
from gradpart_jax.magnitudes import entries, quotas, top
from gradpart_jax.scheme import Reduced, Scheme, SchemeState, Settle
from gradpart_jax.segments import Layout
from gradpart_jax.sparse import share_at


def scalecom(ratio: float = 0.01, *, low_pass: float = 1.0) -> Scheme:
    """Send values at the leader's largest magnitudes, the leader being another device each step.

    In step t, device t mod W chooses of each leaf with d elements its k = max(1, round(ratio d)) largest |a|, and sends
    their positions to all; every device sends its values there. Of the low-pass filter with factor b, the memory
    becomes m' = (1 - b) m + b (m + g - sent); at 1 it is plain error feedback.

    Args:
      ratio: of entries to send, in (0, 1].
      low_pass: b, in (0, 1]; the paper has 0.1 for large batches. Below 1 a copy of the memory is kept, error feedback
        must be on, its decay 1, and momentum correction off.

    Returns:
      A Scheme.

    Raises:
      TypeError: an argument is not a number.
      ValueError: an argument is out of range.

    >>> import jax, jax.numpy as jnp, gradpart_jax as gp
    >>> tx = gp.compress(gp.baselines.scalecom(0.5), axis_name="w")
    >>> gradients = jnp.array([[3.0, -1.0, 0.5, -4.0], [1.0, 1.0, 1.0, 2.0]])
    >>> states = jax.vmap(lambda _: tx.init(jnp.zeros(4)))(jnp.arange(2))
    >>> update = jax.jit(jax.vmap(tx.update, axis_name="w"))
    >>> update(gradients, states)[0][1]
    Array([ 2.,  0.,  0., -1.], dtype=float32)
    """
    check_number("ratio", ratio, above=0.0, at_most=1.0, static=True)
    check_number("low_pass", low_pass, above=0.0, at_most=1.0, static=True)
    filtered = low_pass < 1.0

    def capacity(layout: Layout) -> int:
        return sum(quotas(ratio, layout))

    def init(layout: Layout) -> SchemeState:
        return SchemeState(jnp.int32(0), jnp.zeros(layout.total if filtered else 0, jnp.float32))

    def reduce(
        vector: jax.Array, state: SchemeState, layout: Layout, axis_name: AxisName, settle: Settle
    ) -> tuple[Reduced, SchemeState]:
        step, memory = state.shared, state.local
        devices, count = axis_size(axis_name), capacity(layout)
        code = index_codec(layout.total, count)
        own = entries(vector, top(vector, jnp.asarray(quotas(ratio, layout), jnp.int32), layout), count, jnp.int32(0))
        words = jnp.append(code.encode(own.indices, own.used), own.used.astype(jnp.uint32))
        words = from_leader(words, step % devices, axis_name)
        indices = code.decode(words[:-1], words[-1].astype(jnp.int32))

        def filter_memory(sent: Sent | jax.Array, finite: jax.Array) -> Memory:
            # a - ((1 - b) g + b sent) = (1 - b) m + b (a - sent)
            if isinstance(sent, Sent):
                (buffer,) = sent.buffers
                sent = scatter_add((1.0 - low_pass) * (vector - memory), buffer.indices, low_pass * buffer.values)
            return settle(sent, finite)

        reduced = share_at(vector, indices, layout, axis_name, filter_memory if filtered else settle)
        broadcast = accounting.reduced(WORD_BITS * words.shape[0], devices)
        reduced = reduced._replace(wire=accounting.add(broadcast, reduced.wire))
        kept = reduced.memory.residual if filtered and reduced.memory.residual.size else memory
        return reduced, SchemeState(step + 1, kept)

    return Scheme("scalecom", init, reduce, capacity)
