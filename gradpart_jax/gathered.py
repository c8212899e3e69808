"""Exchange by all-gather: every device gets every payload, and decodes all of them.

Best for two or three devices: what leaves a device grows with their number, and so does the time to decode.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from gradpart_jax import accounting
from gradpart_jax.accounting import WORD_BITS, Wire
from gradpart_jax.buffers import overwritten, scatter_add
from gradpart_jax.exchange import AxisName, axis_size, greatest
from gradpart_jax.exchange import gather as gather_payloads
from gradpart_jax.feedback import Sent
from gradpart_jax.outlook import Outcome, Outlook
from gradpart_jax.payload import Bases, Contents, PayloadFormat
from gradpart_jax.scheme import Reduced, Settle
from gradpart_jax.segments import Layout, count_by_segment
from gradpart_jax.selection import Chosen, choose, decode, encode, report_of
from gradpart_jax.sizes import Plan
from gradpart_jax.varying import alike


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
    ladder, bases = plan.ladder, Bases(outlook.regions.key, outlook.regions.level)
    shape = ladder[-1]
    chosen, finite = choose(vector, outlook, turn, shape, layout)

    def send(rung: PayloadFormat) -> Callable[[Chosen], tuple[jax.Array, Contents]]:
        def run(chosen: Chosen) -> tuple[jax.Array, Contents]:
            words, own = encode(chosen, bases, finite, rung, layout)
            payloads = gather_payloads(words, axis_name)
            return jnp.pad(payloads, ((0, 0), (0, shape.words - rung.words))), own

        return run

    def read(rung: PayloadFormat) -> Callable[[jax.Array], Contents]:
        return lambda words: decode(words[: rung.words], bases, rung, shape, layout)

    rung, wire = _rung(chosen, ladder, axis_name)
    payloads, own = jax.lax.switch(rung, [send(r) for r in ladder], chosen)
    headers = shape.header(payloads)
    everywhere = jnp.all(headers.finite)

    def receive(carry: tuple[jax.Array, jax.Array], words: jax.Array) -> tuple[tuple[jax.Array, jax.Array], None]:
        total, counts = carry
        contents = jax.lax.optimization_barrier(jax.lax.switch(rung, [read(r) for r in ladder], words))
        for buffer in (contents.key, contents.sparse):
            total = scatter_add(total, buffer.indices, jnp.where(everywhere, buffer.values, 0.0))
            counts += count_by_segment(buffer.indices, layout)
        return (total, counts), None

    memory = settle(Sent(jnp.bool_(False), (own.key, own.sparse)), everywhere)
    start = alike((overwritten(vector, memory.residual), jnp.zeros(layout.segments, jnp.int32)), payloads)
    (total, counts), _ = jax.lax.scan(receive, start, payloads)
    devices = payloads.shape[0]
    report, outcome = report_of(headers, outlook, counts.astype(jnp.float32) / devices, plan.entries)
    return Reduced(total / devices, memory, everywhere, wire, report), outcome


def _rung(chosen: Chosen, ladder: tuple[PayloadFormat, ...], axis_name: AxisName) -> tuple[jax.Array, Wire]:
    """Find the smallest rung that holds every device's entries, and what it and the agreement on it cost."""
    devices = axis_size(axis_name)
    if len(ladder) == 1:
        return jnp.int32(0), accounting.gathered(ladder[0].bits, devices)
    full = [(chosen.key.used > rung.key_capacity) | (chosen.sparse.used > rung.sparse_capacity) for rung in ladder[:-1]]
    rung = greatest(jnp.sum(jnp.stack(full), dtype=jnp.int32), axis_name)
    costs = [accounting.gathered(rung.bits, devices) for rung in ladder]
    taken = Wire(*[jnp.stack(bits)[rung] for bits in zip(*costs, strict=True)])
    return rung, accounting.add(taken, accounting.reduced(WORD_BITS, devices))
