"""The method of this package: forecast, partition, entropy thresholds, fixed-capacity sparse exchange.

It follows the published abstract of Guo, Liu and Zhang, "A Partition Based Gradient Compression Algorithm for
Distributed Training in AIoT" (Sensors 2021, 21(6), 1943): a network predicts the gradient's distribution, by which the
gradient is divided into a key and a sparse region, and information entropy chooses the thresholds. All else is this
package's own reconstruction.

The forecast, made from earlier steps alone, proposes the thresholds, so that the present gradient is read once. What
lies above them is gathered, and trimmed on that small buffer to exactly what the payload holds: a forecast that is off
costs nothing until it is off by more than the margin, and the surplus is dropped by magnitude, never by position.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from gradpart_jax import accounting, predictor, summaries
from gradpart_jax.accounting import WORD_BITS, Wire
from gradpart_jax.baselines.dense import dense
from gradpart_jax.buffers import overwritten, scatter_add
from gradpart_jax.exchange import AxisName, axis_size, greatest, mean
from gradpart_jax.exchange import gather as gather_payloads
from gradpart_jax.families import family as find_family
from gradpart_jax.feedback import Sent
from gradpart_jax.outlook import GradpartState, Outcome, Outlook, digest, foresee
from gradpart_jax.payload import Bases, Contents, PayloadFormat, fit_format
from gradpart_jax.regions import entropy_rule
from gradpart_jax.replicated import replicated
from gradpart_jax.scheme import Reduced, Report, Scheme, SchemeState, Settle
from gradpart_jax.segments import Layout, count_by_segment, sample_positions
from gradpart_jax.selection import Chosen, choose, decode, encode

SAMPLE = 2**17  # elements that a histogram is made from
STATISTICS_SHARE = 0.03  # of the budget, at most, goes to histograms
KEY_SHARE = 0.25  # of the entries sent, those coded precisely
STEP = 4  # between a rung's entries and the next one's
FEWEST = 16  # entries that are worth a rung


class Plan(NamedTuple):
    """Static sizes, from the layout and the budget."""

    ladder: tuple[PayloadFormat, ...]  # ascending; none: dense is no larger
    entries: int  # that the largest payload holds
    observe_every: int  # steps between histograms


def gradpart(
    bits_per_element: float = 0.32,
    *,
    warmup_steps: int = 0,
    learn_every: int | None = None,
    seed: int | None = None,
    family: str = predictor.DEFAULT_FAMILY,
    entropy_rule_name: str = "entropy",
    key_bits: int = 4,
    rungs: int = 1,
) -> Scheme:
    """Make the scheme behind `partition_compress`, whose arguments these are, already checked.

    Args:
      bits_per_element: budget of payload bits, everything counted.
      warmup_steps: first steps that are exchanged dense.
      learn_every: steps between histograms, each with one step of the predictor's training; None chooses, 0 leaves the
        predictor as it was trained beforehand.
      seed: None for the shipped predictor, a number for a freshly initialised one.
      family: of magnitude distributions.
      entropy_rule_name: how entropy shares the budget among segments.
      key_bits: of a value in the key region, sign included.
      rungs: payload sizes, of which each step takes the smallest that holds every device's entries.

    Returns:
      A Scheme.
    """
    rule = entropy_rule(entropy_rule_name)
    find_family(family)  # refuses an unknown one here, at construction
    uncompressed = dense()

    def plan(layout: Layout) -> Plan:
        return plan_of(layout, bits_per_element, learn_every=learn_every, key_bits=key_bits, rungs=rungs)

    def init(layout: Layout) -> SchemeState:
        weights = predictor.load(family) if seed is None else predictor.initialise(seed, family)
        state = GradpartState(
            step=jnp.int32(0),
            summary=summaries.start(jnp.asarray(layout.sizes, jnp.float32)),
            weights=weights,
            optimizer=predictor.start_learning(weights),
        )
        return SchemeState(shared=state, local=())

    def capacity(layout: Layout) -> int:
        return plan(layout).entries

    def reduce(
        vector: jax.Array, state: SchemeState, layout: Layout, axis_name: AxisName, settle: Settle
    ) -> tuple[Reduced, SchemeState]:
        sizes = plan(layout)
        if not sizes.ladder:
            return uncompressed.reduce(vector, state, layout, axis_name, settle)
        shared = state.shared
        first = shared.step == 0
        due = shared.step % sizes.observe_every == 0
        observed, statistics = _observe(vector, due, shared.summary, layout, axis_name)
        outlook = replicated(foresee)(
            shared, observed, sizes=layout.sizes, capacity=sizes.entries, rule=rule, family=family
        )

        def sparse(vector: jax.Array) -> tuple[Reduced, Outcome]:
            return _sparse_step(vector, outlook, shared.step, sizes, layout, axis_name, settle)

        def dense_step(vector: jax.Array) -> tuple[Reduced, Outcome]:
            reduced, _ = uncompressed.reduce(vector, state, layout, axis_name, settle)
            report = reduced.report._replace(segment_entropy=outlook.entropy, capacity=jnp.int32(sizes.entries))
            return reduced._replace(report=report), Outcome(jnp.float32(0.0), jnp.float32(0.0))

        warm = shared.step < warmup_steps
        if warmup_steps:
            reduced, outcome = jax.lax.cond(warm, dense_step, sparse, vector)
        else:
            reduced, outcome = sparse(vector)
        realised = jnp.where(warm, outlook.regions.asked, reduced.report.realised)
        summary, weights, optimizer = replicated(digest)(
            shared, outlook, realised, outcome, observed, due & ~first, family=family, learning=learn_every != 0
        )
        wire = accounting.add(reduced.wire, Wire(*[jnp.where(due, bits, 0.0) for bits in statistics]))
        fresh = GradpartState(shared.step + 1, summary, weights, optimizer)
        return reduced._replace(wire=wire), SchemeState(fresh, ())

    return Scheme("partition", init, reduce, capacity)


def plan_of(
    layout: Layout, bits_per_element: float, *, learn_every: int | None = None, key_bits: int = 4, rungs: int = 1
) -> Plan:
    """Fix all sizes.

    Args:
      layout: the segments.
      bits_per_element: as in `gradpart`.
      learn_every: as in `gradpart`.
      key_bits: as in `gradpart`.
      rungs: as in `gradpart`.

    Returns:
      Plan.
    """
    if not layout.elements:
        return Plan((), 0, 1)
    budget = bits_per_element * layout.elements
    # One histogram, and the all-reduce of its highest bins
    statistics = WORD_BITS * layout.segments * (summaries.BINS + 1)
    every = learn_every or min(max(16, math.ceil(statistics / (STATISTICS_SHARE * budget))), 1000)
    left = budget - statistics / every - (WORD_BITS if rungs > 1 else 0)
    shape = fit_format(layout.total, left, key_share=KEY_SHARE, key_bits=key_bits, sparse_bits=1)
    if bits_per_element >= WORD_BITS or shape.bits >= WORD_BITS * layout.elements:
        return Plan((), layout.elements, every)
    ladder = [shape]
    while len(ladder) < rungs and ladder[0].entries >= STEP * FEWEST:
        ladder.insert(0, ladder[0].smaller(STEP))
    return Plan(tuple(ladder), shape.entries, every)


def _observe(
    vector: jax.Array, due: jax.Array, summary: summaries.Summary, layout: Layout, axis_name: AxisName
) -> tuple[tuple[jax.Array, jax.Array], Wire]:
    """Average the histogram of a sample over devices where it is due, else give the last one."""
    positions, owners = sample_positions(layout, SAMPLE)
    segments, devices = layout.segments, axis_size(axis_name)

    def measure(vector: jax.Array) -> tuple[jax.Array, jax.Array]:
        values, owner = jnp.abs(vector[positions]), jnp.asarray(owners)
        valid = jnp.isfinite(values)
        top = greatest(summaries.top_bin(values, owner, valid, segments), axis_name)
        counts = summaries.histogram(values, owner, valid, top, segments)
        # Counts are whole numbers, whose sum is exact in any order; a sum of shares would not be.
        return mean(counts, axis_name), top

    observed = jax.lax.cond(due, measure, lambda _: (summary.mass, summary.top), vector)
    wires = [accounting.reduced(WORD_BITS * segments * k, devices) for k in (1, summaries.BINS)]
    return observed, accounting.add(*wires)


def _sparse_step(
    vector: jax.Array,
    outlook: Outlook,
    step: jax.Array,
    sizes: Plan,
    layout: Layout,
    axis_name: AxisName,
    settle: Settle,
) -> tuple[Reduced, Outcome]:
    ladder, regions = sizes.ladder, outlook.regions
    shape = ladder[-1]
    bases = Bases(regions.key, regions.level)
    chosen, finite = choose(vector, outlook, step, shape, layout)

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
    start = (overwritten(vector, memory.residual), jnp.zeros(layout.segments, jnp.int32))
    (total, counts), _ = jax.lax.scan(receive, start, payloads)
    devices = payloads.shape[0]
    capacity = sizes.entries
    realised = counts.astype(jnp.float32) / devices
    fullness = jnp.maximum(headers.candidates, 1).astype(jnp.float32) / capacity
    (trim, key_trim, _), (log_trim, _, surplus) = replicated(_means)(headers.trim, headers.key_scale, fullness)
    report = Report(
        sent=jnp.sum(counts).astype(jnp.float32) / devices,
        capacity=jnp.int32(capacity),
        overflow=jnp.mean(jnp.maximum(headers.candidates - capacity, 0).astype(jnp.float32)),
        threshold=jnp.stack([regions.sparse * trim, regions.key * key_trim], axis=-1),
        asked=regions.asked,
        realised=realised,
        segment_entropy=outlook.entropy,
        forecast_error=log_trim,
    )
    reduced = Reduced(
        mean=total / devices,
        memory=memory,
        finite=everywhere,
        wire=wire,
        report=report,
    )
    return reduced, Outcome(log_trim, surplus)


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


def _means(*factors: jax.Array) -> tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]:
    """Average over devices, geometrically: the means, and their logarithms."""
    means = tuple(jnp.exp(jnp.mean(jnp.log(factor))) for factor in factors)
    return means, tuple(jnp.log(mean) for mean in means)
