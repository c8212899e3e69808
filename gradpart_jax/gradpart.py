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
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gradpart_jax import accounting, predictor
from gradpart_jax.accounting import WORD_BITS, Wire
from gradpart_jax.baselines.dense import dense
from gradpart_jax.buffers import scatter_add
from gradpart_jax.exchange import AxisName, axis_size, greatest, mean
from gradpart_jax.exchange import gather as gather_payloads
from gradpart_jax.feedback import Sent
from gradpart_jax.payload import Bases, PayloadFormat, fit_format
from gradpart_jax.regions import Regions, allot, entropy_bits, entropy_rule, partition
from gradpart_jax.replicated import replicated
from gradpart_jax.scheme import Reduced, Report, Scheme, SchemeState
from gradpart_jax.segments import Layout, count_by_segment, sample_positions
from gradpart_jax.selection import MARGIN, choose, decode, empty, encode

ROOM = 1.3  # candidates that fit over candidates proposed
SAMPLE = 2**17  # elements that a histogram is made from
STATISTICS_SHARE = 0.03  # of the budget, at most, goes to histograms
KEY_SHARE = 0.25  # of the entries sent, those coded precisely


class GradpartState(NamedTuple):
    """The same on every device, bit for bit."""

    step: jax.Array  # int32[]
    summary: predictor.Summary  # of earlier steps
    weights: Any  # the predictor's parameters
    optimizer: Any  # of the predictor's on-line training


class Outlook(NamedTuple):
    """What a forecast means for one step; the same on every device."""

    known: predictor.Summary
    regions: Regions
    proposal: jax.Array  # float32[S]: thresholds that let MARGIN times the asked-for entries through
    entropy: jax.Array  # float32[S]: bits
    slope: jax.Array  # float32[S]: -d log threshold / d log count
    mean_slope: jax.Array  # float32[]: the same for the whole


class Plan(NamedTuple):
    """Static sizes, from the layout and the budget."""

    format: PayloadFormat | None  # None: dense is no larger
    candidates: int  # capacity of the buffer that is trimmed
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

    Returns:
      A Scheme.
    """
    rule = entropy_rule(entropy_rule_name)
    uncompressed = dense()

    def plan(layout: Layout) -> Plan:
        return _plan(layout, bits_per_element, learn_every, key_bits)

    def init(layout: Layout) -> SchemeState:
        weights = predictor.load(family) if seed is None else predictor.initialise(seed, family)
        state = GradpartState(
            step=jnp.int32(0),
            summary=predictor.start(jnp.asarray(layout.sizes, jnp.float32)),
            weights=weights,
            optimizer=predictor.start_learning(weights),
        )
        return SchemeState(shared=state, local=())

    def capacity(layout: Layout) -> int:
        found = plan(layout).format
        return layout.elements if found is None else found.key_capacity + found.sparse_capacity

    def foresee(shared: GradpartState, observed: tuple[jax.Array, jax.Array], layout: Layout) -> Outlook:
        # The very first step has no earlier one to forecast from: it looks at its own histogram.
        first = predictor.observe(shared.summary, *observed)
        known = _where(shared.step == 0, first, shared.summary)
        forecast = predictor.forecast(shared.weights, known, family)
        entropy = entropy_bits(forecast.masses(known.top))
        size = jnp.asarray(layout.sizes, jnp.float32)
        asked = allot(rule(entropy), size, capacity(layout))
        regions = partition(forecast.survival, forecast.quantile, asked, size)
        slope = forecast.slope(asked / jnp.maximum(size, 1.0))
        # One factor on all thresholds asks for MARGIN times the entries, as the forecast sees it.
        mean_slope = jnp.sum(slope * asked) / jnp.maximum(jnp.sum(asked), 1e-30)
        return Outlook(known, regions, regions.sparse * MARGIN**-mean_slope, entropy, slope, mean_slope)

    def digest(
        shared: GradpartState,
        outlook: Outlook,
        realised: jax.Array,
        trim: jax.Array,
        observed: tuple[jax.Array, jax.Array],
        due: jax.Array,
    ) -> tuple[predictor.Summary, Any, Any]:
        known, weights, optimizer = outlook.known, shared.weights, shared.optimizer
        if learn_every != 0:
            weights, optimizer = jax.lax.cond(
                due,
                lambda w, o: predictor.learn(w, o, known, *observed, family),
                lambda w, o: (w, o),
                weights,
                optimizer,
            )
        summary = predictor.advance(
            known,
            threshold=outlook.regions.sparse,
            share=outlook.regions.asked / jnp.maximum(known.size, 1.0),
            asked=outlook.regions.asked,
            realised=realised,
            trim=trim,
            slope=outlook.slope,
        )
        return _where(due, predictor.observe(summary, *observed), summary), weights, optimizer

    def reduce(
        vector: jax.Array, state: SchemeState, layout: Layout, axis_name: AxisName
    ) -> tuple[Reduced, SchemeState]:
        sizes = plan(layout)
        shape = sizes.format
        if shape is None:
            return uncompressed.reduce(vector, state, layout, axis_name)
        shared = state.shared
        first = shared.step == 0
        due = shared.step % sizes.observe_every == 0
        observed, statistics = _observe(vector, due, shared.summary, layout, axis_name)
        outlook = replicated(foresee)(shared, observed, layout=layout)

        def sparse(vector: jax.Array) -> tuple[Reduced, jax.Array]:
            return _sparse_step(vector, outlook, shared.step, sizes, layout, axis_name)

        def dense_step(vector: jax.Array) -> tuple[Reduced, jax.Array]:
            reduced, _ = uncompressed.reduce(vector, state, layout, axis_name)
            report = reduced.report._replace(segment_entropy=outlook.entropy, capacity=jnp.int32(capacity(layout)))
            nothing = Sent(jnp.bool_(True), empty(shape, layout))
            return reduced._replace(sent=nothing, report=report), jnp.float32(1.0)

        warm = shared.step < warmup_steps
        if warmup_steps:
            reduced, trim = jax.lax.cond(warm, dense_step, sparse, vector)
        else:
            reduced, trim = sparse(vector)
        realised = jnp.where(warm, outlook.regions.asked, reduced.report.realised)
        summary, weights, optimizer = replicated(digest)(shared, outlook, realised, trim, observed, due & ~first)
        wire = accounting.add(reduced.wire, Wire(*[jnp.where(due, bits, 0.0) for bits in statistics]))
        fresh = GradpartState(shared.step + 1, summary, weights, optimizer)
        return reduced._replace(wire=wire), SchemeState(fresh, ())

    return Scheme("partition", init, reduce, capacity)


def _plan(layout: Layout, bits_per_element: float, learn_every: int | None, key_bits: int) -> Plan:
    if not layout.elements:
        return Plan(None, 0, 1)
    budget = bits_per_element * layout.elements
    # One histogram, and the all-reduce of its highest bins
    statistics = WORD_BITS * layout.segments * (predictor.BINS + 1)
    every = learn_every or min(max(16, math.ceil(statistics / (STATISTICS_SHARE * budget))), 1000)
    left = budget - statistics / every
    shape = fit_format(layout.total, left, key_share=KEY_SHARE, key_bits=key_bits, sparse_bits=1)
    if bits_per_element >= WORD_BITS or shape.bits >= WORD_BITS * layout.elements:
        return Plan(None, layout.total, every)
    entries = shape.key_capacity + shape.sparse_capacity
    return Plan(shape, min(layout.total, math.ceil(entries * MARGIN * ROOM) + 64), every)


def _observe(
    vector: jax.Array, due: jax.Array, summary: predictor.Summary, layout: Layout, axis_name: AxisName
) -> tuple[tuple[jax.Array, jax.Array], Wire]:
    """Average the histogram of a sample over devices where it is due, else give the last one."""
    positions, owners = sample_positions(layout, SAMPLE)
    segments, devices = layout.segments, axis_size(axis_name)

    def measure(vector: jax.Array) -> tuple[jax.Array, jax.Array]:
        values, owner = jnp.abs(vector[positions]), jnp.asarray(owners)
        valid = jnp.isfinite(values)
        top = greatest(predictor.top_bin(values, owner, valid, segments), axis_name)
        counts = predictor.histogram(values, owner, valid, top, segments)
        # Counts are whole numbers, whose sum is exact in any order; a sum of shares would not be.
        return mean(counts, axis_name), top

    observed = jax.lax.cond(due, measure, lambda _: (summary.mass, summary.top), vector)
    wires = [accounting.reduced(WORD_BITS * segments * k, devices) for k in (1, predictor.BINS)]
    return observed, accounting.add(*wires)


def _sparse_step(
    vector: jax.Array,
    outlook: Outlook,
    step: jax.Array,
    sizes: Plan,
    layout: Layout,
    axis_name: AxisName,
) -> tuple[Reduced, jax.Array]:
    shape = sizes.format
    assert shape is not None
    regions = outlook.regions
    bases = Bases(regions.key, regions.level)
    chosen, finite = jax.lax.optimization_barrier(
        choose(vector, regions, outlook.proposal, outlook.mean_slope, step, shape, sizes.candidates, layout)
    )
    words, own = encode(chosen, bases, finite, step, shape, layout)
    payloads = gather_payloads(words, axis_name)
    headers = shape.header(payloads)
    everywhere = jnp.all(headers.finite)

    def receive(carry: tuple[jax.Array, jax.Array], words: jax.Array) -> tuple[tuple[jax.Array, jax.Array], None]:
        total, counts = carry
        contents = jax.lax.optimization_barrier(decode(words, bases, shape, layout))
        for buffer in (contents.key, contents.sparse):
            total = scatter_add(total, buffer.indices, jnp.where(everywhere, buffer.values, 0.0))
            counts += count_by_segment(buffer.indices, layout)
        return (total, counts), None

    start = (jnp.zeros_like(vector), jnp.zeros(layout.segments, jnp.int32))
    (total, counts), _ = jax.lax.scan(receive, start, payloads)
    devices = payloads.shape[0]
    capacity = shape.key_capacity + shape.sparse_capacity
    realised = counts.astype(jnp.float32) / devices
    trim, key_trim = replicated(_geometric_means)(headers.trim, headers.key_scale)
    report = Report(
        sent=jnp.sum(counts).astype(jnp.float32) / devices,
        capacity=jnp.int32(capacity),
        overflow=jnp.mean(jnp.maximum(headers.candidates - capacity, 0).astype(jnp.float32)),
        threshold=jnp.stack([regions.sparse * trim, regions.key * key_trim], axis=-1),
        asked=regions.asked,
        realised=realised,
        segment_entropy=outlook.entropy,
        forecast_error=jnp.log(trim),
    )
    reduced = Reduced(
        mean=total / devices,
        sent=Sent(jnp.bool_(False), (own.key, own.sparse)),
        finite=everywhere,
        wire=accounting.gathered(shape.bits, devices),
        report=report,
    )
    return reduced, trim


def _geometric_means(*factors: jax.Array) -> tuple[jax.Array, ...]:
    return tuple(jnp.exp(jnp.mean(jnp.log(factor))) for factor in factors)


def _where(flag: jax.Array, new: Any, old: Any) -> Any:
    return jax.tree.map(lambda a, b: jnp.where(flag, a, b), new, old)
