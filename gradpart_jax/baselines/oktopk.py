"""Ok-Topk: a sparse all-reduce by regions, each summed and selected from again by one owner.

Source: Li and Hoefler, "Near-optimal sparse allreduce for distributed deep learning" (PPoPP 2022), section 3:
thresholds reused for many steps, regions of equal load, split and reduce, then balance and gather.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from gradpart_jax import accounting
from gradpart_jax.accounting import WORD_BITS, Wire
from gradpart_jax.bits import WORD, popcount
from gradpart_jax.buffers import Buffer, compact, largest, overwritten, rank_score, scatter_add
from gradpart_jax.checks import check_integer, check_number
from gradpart_jax.exchange import AxisName, axis_size, deal, gather, total
from gradpart_jax.feedback import Sent
from gradpart_jax.magnitudes import entries, largest_of_each, rank_magnitude, reaching
from gradpart_jax.replicated import replicated
from gradpart_jax.scheme import Reduced, Report, Scheme, SchemeState, Settle, dense_report
from gradpart_jax.segments import Layout, count_by_segment
from gradpart_jax.sparse import SparseFormat

BUCKETS = 1024  # between which regions may end


class Common(NamedTuple):
    """What all devices know."""

    step: jax.Array  # int32[]
    load: jax.Array  # int32[BUCKETS]: entries over local thresholds, of all devices, when last counted
    threshold: jax.Array  # float32[]: of sums over devices


def oktopk(ratio: float = 0.01, *, reuse_threshold: int = 32, reuse_regions: int = 64, slack: float = 1.25) -> Scheme:
    """Send the largest of all magnitudes to their region's owner, which sums, selects again, and sends to all.

    Of n elements k = max(1, round(ratio n)) are asked for. Each device sends what reaches its threshold, its own k-th
    largest |a| when last looked for, to the owners of W regions; an owner adds up what it receives, and sends to all
    what reaches the common threshold, the k-th largest sum when last looked for. An entry leaves a device's memory only
    where both it and the owner selected it. Regions hold equal shares of the entries when last counted, by 1024
    buckets, where the paper averages the devices' boundaries. Owners receive and send on k / W entries each, with
    slack: the link carries the same whatever the number of devices.

    Args:
      ratio: of entries asked for, in (0, 1].
      reuse_threshold: steps between two exact searches of the thresholds, at least 1.
      reuse_regions: steps between two counts of the load, at least 1.
      slack: room over k / W entries from each device for each region, and from each owner for all, at least 1. Of more,
        the largest are sent, the others stay in the memory. Where more than slack k reach a device's threshold, it is
        looked for at once; the paper sends them all, and its authors' program raises the threshold by a few percent.

    Returns:
      A Scheme. Its report counts the entries of the second selection, which all devices receive.

    Raises:
      TypeError: an argument is of a wrong type.
      ValueError: an argument is out of range.

    >>> import jax, jax.numpy as jnp, gradpart_jax as gp
    >>> tx = gp.compress(gp.baselines.oktopk(0.5), axis_name="w")
    >>> gradients = jnp.array([[3.0, -1.0, 0.5, -4.0], [1.0, 0.5, 0.2, 2.0]])
    >>> states = jax.vmap(lambda _: tx.init(jnp.zeros(4)))(jnp.arange(2))
    >>> update = jax.jit(jax.vmap(tx.update, axis_name="w"))
    >>> update(gradients, states)[0][1]
    Array([ 2.,  0.,  0., -1.], dtype=float32)
    """
    check_number("ratio", ratio, above=0.0, at_most=1.0, static=True)
    check_integer("reuse_threshold", reuse_threshold, 1, 2**31 - 1)
    check_integer("reuse_regions", reuse_regions, 1, 2**31 - 1)
    check_number("slack", slack, at_least=1.0, static=True)

    def asked(layout: Layout) -> int:
        return min(layout.elements, max(1, round(ratio * layout.elements)))

    def capacity(layout: Layout) -> int:
        return min(layout.elements, math.ceil(slack * asked(layout)))

    def init(layout: Layout) -> SchemeState:
        zero = jnp.float32(0.0)
        return SchemeState(Common(jnp.int32(0), jnp.zeros(BUCKETS, jnp.int32), zero), jnp.zeros(1, jnp.float32))

    def reduce(
        vector: jax.Array, state: SchemeState, layout: Layout, axis_name: AxisName, settle: Settle
    ) -> tuple[Reduced, SchemeState]:
        common, count, devices = state.shared, asked(layout), axis_size(axis_name)
        each = min(layout.total, math.ceil(slack * count / devices))
        most = min(layout.total, math.ceil(slack * count))
        shape = SparseFormat(layout.total, each)
        search = common.step % reuse_threshold == 0
        finite = jnp.all(jnp.isfinite(vector))

        # Gradients that have grown let through what no payload holds: then the old threshold says nothing of the rest.
        whole = _as_one(layout)
        known = reaching(vector, state.local, whole)

        def anew(vector: jax.Array) -> tuple[jax.Array, jax.Array]:
            bound = _rank(vector, count, layout)[None]
            return bound, reaching(vector, bound, whole)

        bound, words = jax.lax.cond(
            search | (jnp.sum(popcount(known)) > most), anew, lambda _: (state.local, known), vector
        )
        load, wire = _load(words, common, reuse_regions, axis_name)
        chosen = entries(vector, words, most, common.step)
        region = _region(chosen.indices, load, layout, devices)
        dealt = largest_of_each(region, chosen.values, jnp.full(devices, each, jnp.int32))
        left_out = jnp.sum(popcount(words)) - jnp.sum(dealt.astype(jnp.int32))

        def pack(owner: jax.Array) -> jax.Array:
            part = compact(chosen.indices, chosen.values, dealt & (region == owner), each, layout.total)
            return shape.encode(part, finite, left_out)

        received = deal(jax.lax.map(pack, jnp.arange(devices, dtype=jnp.int32)), axis_name)
        everywhere = jnp.all(shape.finite(received))

        def add(summed: jax.Array, words: jax.Array) -> tuple[jax.Array, None]:
            indices, values, _ = shape.decode(words)
            return scatter_add(summed, indices, values), None

        summed, _ = jax.lax.scan(add, jnp.zeros_like(vector), received)
        again = _reselect(summed, jnp.where(search, 0.0, common.threshold), each * devices, each, common.step, layout)
        # Each device's own count is wanted once, and every owner has received it.
        payloads = gather(shape.encode(again, everywhere, jnp.sum(shape.candidates(received))), axis_name)
        everywhere = jnp.all(shape.finite(payloads))
        found = jax.vmap(shape.decode)(payloads)
        filled = found.indices < layout.total
        scores = jnp.abs(found.values).reshape(-1)
        threshold = jnp.where(search, _least_of(scores, filled.reshape(-1), count), common.threshold)
        taken = filled & (jnp.abs(found.values) >= threshold)
        places = jnp.where(taken, found.indices, layout.total)

        common_mask = jnp.zeros(layout.total, bool).at[places.reshape(-1)].set(True, mode="drop")
        mine = dealt & common_mask.at[chosen.indices].get(mode="fill", fill_value=False)
        sent = Buffer(jnp.where(mine, chosen.indices, layout.total), jnp.where(mine, chosen.values, 0.0), jnp.sum(mine))
        memory = settle(Sent(jnp.bool_(False), (sent,)), everywhere)
        values = jnp.where(taken & everywhere, found.values, 0.0).reshape(-1)
        mean = scatter_add(overwritten(vector, memory.residual), places.reshape(-1), values) / devices

        report = _report(places, capacity(layout), shape.candidates(payloads[0]), devices, threshold, layout)
        wire = accounting.add(
            wire, accounting.dealt(devices * shape.bits, devices), accounting.gathered(shape.bits, devices)
        )
        fresh = SchemeState(Common(common.step + 1, load, threshold), bound)
        return Reduced(mean, memory, everywhere, wire, report), fresh

    return Scheme("oktopk", init, reduce, capacity)


def _as_one(layout: Layout) -> Layout:
    return Layout((layout.total,), (0,), layout.total, layout.total, ((layout.total,),))


def _rank(vector: jax.Array, rank: int, layout: Layout) -> jax.Array:
    return rank_magnitude(vector, jnp.asarray([rank], jnp.int32), _as_one(layout))[0]


def _least_of(scores: jax.Array, filled: jax.Array, rank: int) -> jax.Array:
    """Find the rank-th largest score, the least of all if they are fewer, 0 if there is none."""
    reached = filled & (scores >= rank_score(scores, filled, jnp.int32(rank)))
    least = jnp.min(jnp.where(reached, scores, jnp.inf))
    return jnp.where(least < jnp.inf, least, 0.0)


def _load(words: jax.Array, common: Common, every: int, axis_name: AxisName) -> tuple[jax.Array, Wire]:
    """Count where entries lie, on all devices, when it is due."""
    due = common.step % every == 0
    width = -(-words.shape[0] // BUCKETS)

    def count(words: jax.Array) -> jax.Array:
        padded = jnp.pad(words, (0, width * BUCKETS - words.shape[0]))
        return total(jnp.sum(popcount(padded).reshape(BUCKETS, width), axis=1, dtype=jnp.int32), axis_name)

    load = jax.lax.cond(due, count, lambda words: common.load, words)
    cost = accounting.reduced(WORD_BITS * BUCKETS, axis_size(axis_name))
    return load, Wire(*[jnp.where(due, bits, 0.0) for bits in cost])


def _region(indices: jax.Array, load: jax.Array, layout: Layout, devices: int) -> jax.Array:
    """Say whose region each position lies in; W for the padding."""
    width = -(-(layout.total // WORD) // BUCKETS) * WORD
    owner = replicated(_owner)(load, devices=devices)
    found = owner[jnp.minimum(indices // width, BUCKETS - 1)]
    return jnp.where(indices < layout.total, found, devices)


def _owner(load: jax.Array, *, devices: int) -> jax.Array:
    # Of counts whose sum int32 might not hold, the lowest bits are left out.
    length = jnp.int32(32) - jax.lax.clz(jnp.max(load))
    load = load >> jnp.maximum(length - (31 - (BUCKETS - 1).bit_length()), 0)
    # Where nothing was counted, regions are of equal size
    load = jnp.where(jnp.sum(load) > 0, load, 1)
    up_to = jnp.cumsum(load)
    share = (up_to - load).astype(jnp.float32) / up_to[-1].astype(jnp.float32)
    return jnp.minimum((share * devices).astype(jnp.int32), devices - 1)


def _reselect(
    summed: jax.Array, threshold: jax.Array, most: int, capacity: int, turn: jax.Array, layout: Layout
) -> Buffer:
    """Select what reaches the common threshold, of more than fit the largest."""
    words = reaching(summed, threshold[None], _as_one(layout))
    found = entries(summed, words, min(most, layout.total), turn)
    kept, _ = largest(jnp.abs(found.values), found.indices < layout.total, capacity, turn)
    return compact(found.indices, found.values, kept, capacity, layout.total)


def _report(
    places: jax.Array, capacity: int, left_out: jax.Array, devices: int, threshold: jax.Array, layout: Layout
) -> Report:
    counts = jnp.sum(jax.vmap(lambda p: count_by_segment(jnp.sort(p), layout))(places), axis=0).astype(jnp.float32)
    return dense_report(layout)._replace(
        sent=jnp.sum(counts),
        capacity=jnp.int32(capacity),
        overflow=left_out.astype(jnp.float32) / devices,
        threshold=jnp.broadcast_to(threshold / devices, (layout.segments, 2)),
        asked=counts,
        realised=counts,
    )
