"""Exchange by reduce-scatter and all-gather of sparse payloads: link bits do not grow with the number of devices.

Every device owns a share of the vector. It gets the others' entries in that share, adds up their mean with its own
values, all of them, and what it owes from earlier steps, selects once more, and sends that selection to all: error
feedback at both ends. The idea of owners is that of Li and Hoefler, "Near-optimal sparse allreduce for distributed deep
learning" (PPoPP 2022).

Bits that leave a device: (W - 1) / W of a payload P of W parts, and (W - 1) times a part: 2 (W - 1) / W P whatever W.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from gradpart_jax import accounting
from gradpart_jax.bits import WORD
from gradpart_jax.buffers import Buffer, overwritten, scatter_add
from gradpart_jax.candidates import Candidates, find_by_share
from gradpart_jax.exchange import AxisName, axis_size, deal, position
from gradpart_jax.exchange import gather as gather_payloads
from gradpart_jax.feedback import Sent
from gradpart_jax.outlook import Outcome, Outlook, means
from gradpart_jax.payload import Bases, Contents
from gradpart_jax.replicated import replicated
from gradpart_jax.scheme import Reduced, Settle
from gradpart_jax.segments import Layout, count_by_segment
from gradpart_jax.selection import choose, decode, encode, report_of, trim
from gradpart_jax.shares import Share, owned_by, share_of, take_share
from gradpart_jax.sizes import Plan
from gradpart_jax.stored import stored


def step(
    vector: jax.Array,
    owed: jax.Array,
    outlook: Outlook,
    turn: jax.Array,
    plan: Plan,
    layout: Layout,
    axis_name: AxisName,
    settle: Settle,
) -> tuple[Reduced, Outcome, jax.Array]:
    """Take one step.

    Args:
      vector: float32[n], of this device.
      owed: float32[share], what this device, as an owner, has not passed on of the means of earlier steps; or [0],
        where nothing is remembered.
      outlook: thresholds.
      turn: int32[], a step counter.
      plan: static sizes.
      layout: the segments.
      axis_name: the mapped axis.
      settle: of the Scheme's contract.

    Returns:
      What was exchanged, how good the forecast was, and what is owed now. The sum of all that is owed and of the mean
      memory is what went in less what came out.
    """
    (shape,), devices, me = plan.ladder, axis_size(axis_name), position(axis_name)
    bases = Bases(outlook.regions.key, outlook.regions.level)
    owners = jnp.arange(devices, dtype=jnp.int32)
    others = stored((owners[1:] + me) % devices)
    owned = owned_by(me, layout, devices)
    mine, passed = share_of(layout, devices, me), take_share(vector, devices, me) / devices
    if owed.size:
        passed = owed + passed
    found, finite = find_by_share(vector, outlook, turn, shape.entries, layout, devices, others, owned)
    finite &= jnp.all(jnp.isfinite(passed))

    def part(owner: jax.Array, candidates: Candidates) -> tuple[jax.Array, Contents]:
        share = share_of(layout, devices, owner)
        words, own = encode(trim(candidates, outlook, turn, shape, share), bases, finite, shape, share)
        return words, _restored(own, share)

    words, own = jax.vmap(part)(others, found)
    # What a device would have for itself stays empty
    dealt = jnp.zeros((devices, shape.words), jnp.uint32).at[others].set(words)
    received = deal(dealt, axis_name)[others]
    headers = shape.header(received)

    # All parts at once: together they are one payload, and small, so that each operation's own cost is what counts.
    parts = jax.vmap(lambda words: decode(words, bases, shape, shape, mine))(received)

    def take(passed: jax.Array, part: Contents) -> tuple[jax.Array, None]:
        for buffer in part[1:]:
            passed = scatter_add(passed, buffer.indices, buffer.values / devices)
        return passed, None

    # One device after another: several may have sent the same entry, and a sum is the same in one order only
    passed, _ = jax.lax.scan(take, passed, parts)
    # Coarse values are equal to many others.
    chosen, _ = choose(passed, outlook, turn, shape, mine, spare=shape.entries)
    # The second header tells all devices what the owner has learnt from the first ones.
    (cut,), _ = replicated(means)(headers.trim)
    chosen = chosen._replace(candidates=jnp.sum(headers.candidates) // (devices - 1), trim=cut)
    words, sums = encode(chosen, bases, finite & jnp.all(headers.finite), shape, mine)
    payloads = gather_payloads(words, axis_name)
    headers = shape.header(payloads)
    everywhere = jnp.all(headers.finite)
    for buffer in sums[1:]:
        passed = scatter_add(passed, buffer.indices, -buffer.values)

    own_share = jnp.broadcast_to(owned[:, None], (owned.size, WORD)).reshape(-1)
    memory = settle(Sent(jnp.bool_(False), tuple(map(_joined, own[1:])), own_share), everywhere)

    def receive(owner: jax.Array, words: jax.Array) -> tuple[Contents, jax.Array]:
        share = share_of(layout, devices, owner)
        contents = jax.lax.optimization_barrier(decode(words, bases, shape, shape, share))
        counts = [count_by_segment(buffer.indices, share) for buffer in contents[1:]]
        return _restored(contents, share), jnp.sum(jnp.stack(counts), axis=0)

    everyones, counts = jax.vmap(receive)(owners, payloads)
    mean, counts = overwritten(vector, memory.residual), jnp.sum(counts, axis=0)
    for buffer in map(_joined, everyones[1:]):
        mean = scatter_add(mean, buffer.indices, jnp.where(everywhere, buffer.values, 0.0))
    report, outcome = report_of(headers, outlook, counts.astype(jnp.float32), plan.entries, parts=devices)
    wire = accounting.add(accounting.dealt(devices * shape.bits, devices), accounting.gathered(shape.bits, devices))
    return Reduced(mean, memory, everywhere, wire, report), outcome, passed if owed.size else owed


def _restored(contents: Contents, share: Share) -> Contents:
    """Give a part's entries their positions in the whole vector."""
    key, sparse = (buffer._replace(indices=share.restore(buffer.indices)) for buffer in contents[1:])
    return contents._replace(key=key, sparse=sparse)


def _joined(buffer: Buffer) -> Buffer:
    """Let one part's entries follow another's, for readers to whom they are a set, in no order."""
    return Buffer(buffer.indices.reshape(-1), buffer.values.reshape(-1), jnp.sum(buffer.used))
