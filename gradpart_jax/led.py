"""Exchange by a leader's positions: one device's selection serves all, so that values are added up on the way.

The leader is another device each step. Its positions go to all, and an all-reduce carries the values that all devices
have there, as fixed-point codes so narrow that their sums fit into their fields. The idea is that of Chen et al.,
"ScaleCom: scalable sparsified gradient compression for communication-efficient distributed training" (NeurIPS 2020).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from gradpart_jax import accounting
from gradpart_jax.accounting import WORD_BITS
from gradpart_jax.buffers import Buffer, gather, overwritten, scatter_add
from gradpart_jax.codecs import index_codec
from gradpart_jax.exchange import AxisName, axis_size, from_leader
from gradpart_jax.feedback import Sent
from gradpart_jax.outlook import Outcome, Outlook
from gradpart_jax.payload import HEADER_WORDS, Header
from gradpart_jax.scheme import Reduced, Settle
from gradpart_jax.segments import Layout, count_by_segment, segment_of
from gradpart_jax.selection import choose, report_of
from gradpart_jax.sizes import LED_BITS, Plan, field_bits
from gradpart_jax.stored import stored
from gradpart_jax.sums import add_codes

MOST = 2 ** (LED_BITS - 1) - 1  # quanta in either direction
QUANTA = 2.0  # in the leader's threshold


def step(
    vector: jax.Array,
    outlook: Outlook,
    turn: jax.Array,
    plan: Plan,
    layout: Layout,
    axis_name: AxisName,
    settle: Settle,
) -> tuple[Reduced, Outcome]:
    """Take one step.

    Args:
      vector: float32[n], of this device.
      outlook: thresholds.
      turn: int32[], a step counter.
      plan: static sizes.
      layout: the segments.
      axis_name: the mapped axis.
      settle: of the Scheme's contract.

    Returns:
      What was exchanged, and how good the forecast was.
    """
    (shape,), devices = plan.ladder, axis_size(axis_name)
    code = index_codec(layout.total, plan.entries)
    chosen, finite = choose(vector, outlook, turn, shape, layout)
    header = Header(finite, chosen.candidates, chosen.trim, chosen.key_scale, jnp.float32(1.0))
    words = [shape.head(header, chosen.key.used, jnp.int32(0)), code.encode(chosen.key.indices, chosen.key.used)]
    heard = from_leader(jnp.concatenate(words), turn % devices, axis_name)
    header, used = shape.header(heard), jnp.minimum(heard[0] & 0x7FFFFFFF, plan.entries).astype(jnp.int32)
    indices = stored(code.decode(heard[HEADER_WORDS:], used))

    quantum = jnp.clip(outlook.regions.sparse * header.trim / QUANTA, 1e-30, 1e30)
    quantum = stored(quantum)[segment_of(indices, layout)]
    steps = jnp.clip(jnp.round(jnp.nan_to_num(gather(vector, indices)) / quantum), -MOST, MOST).astype(jnp.int32)
    steps = stored(jnp.where(indices < layout.total, steps, 0))
    width = field_bits(devices)
    sums, everywhere, added = add_codes((steps + MOST).astype(jnp.uint32), width, finite, axis_name)
    mean = sums.astype(jnp.int32) - MOST * devices

    own = Buffer(indices, steps * quantum, used)
    memory = settle(Sent(jnp.bool_(False), (own,)), everywhere)
    values = jnp.where(everywhere & (indices < layout.total), mean * quantum / devices, 0.0)
    result = scatter_add(overwritten(vector, memory.residual), indices, values)
    counts = count_by_segment(indices, layout).astype(jnp.float32)
    report, outcome = report_of(jax.tree.map(lambda x: x[None], header), outlook, counts, plan.entries)
    wire = accounting.add(accounting.reduced(WORD_BITS * heard.size, devices), added)
    return Reduced(result, memory, everywhere, wire, report), outcome
