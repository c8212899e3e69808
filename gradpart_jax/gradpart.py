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
from gradpart_jax.bits import bitmask, keep, select
from gradpart_jax.buffers import Buffer, compact, gather, largest, scatter_add
from gradpart_jax.exchange import AxisName, axis_size, greatest, mean
from gradpart_jax.exchange import gather as gather_payloads
from gradpart_jax.feedback import Sent
from gradpart_jax.payload import Bases, Contents, Header, PayloadFormat, bfloat16_factor, fit_format
from gradpart_jax.regions import Regions, allot, entropy_bits, entropy_rule, partition
from gradpart_jax.scheme import Reduced, Report, Scheme, SchemeState
from gradpart_jax.segments import Layout, count_by_segment, sample_positions, segment_of, spread

MARGIN = 1.25  # candidates proposed over entries sent
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

    def reduce(
        vector: jax.Array, state: SchemeState, layout: Layout, axis_name: AxisName
    ) -> tuple[Reduced, SchemeState]:
        sizes = plan(layout)
        if sizes.format is None:
            return uncompressed.reduce(vector, state, layout, axis_name)
        shared, devices = state.shared, axis_size(axis_name)
        first = shared.step == 0
        due = shared.step % sizes.observe_every == 0
        observed, statistics = _observe(vector, due, shared.summary, layout, axis_name)
        # The very first step has no earlier one to forecast from: it looks at its own histogram.
        known = _where(first, predictor.observe(shared.summary, *observed), shared.summary)
        forecast = predictor.forecast(shared.weights, known, family)
        entropy = entropy_bits(forecast.masses(known.top))
        size = jnp.asarray(layout.sizes, jnp.float32)
        asked = allot(rule(entropy), size, sizes.format.key_capacity + sizes.format.sparse_capacity)
        regions = partition(forecast.survival, forecast.quantile, asked, size)
        share = asked / jnp.maximum(size, 1.0)
        slope = forecast.slope(share)
        # One factor on all thresholds asks for MARGIN times the entries, as the forecast sees it.
        mean_slope = jnp.sum(slope * asked) / jnp.maximum(jnp.sum(asked), 1e-30)

        def sparse(vector: jax.Array) -> tuple[Reduced, jax.Array]:
            return _sparse_step(vector, regions, mean_slope, entropy, shared.step, sizes, layout, axis_name)

        def dense_step(vector: jax.Array) -> tuple[Reduced, jax.Array]:
            reduced, _ = uncompressed.reduce(vector, state, layout, axis_name)
            report = reduced.report._replace(segment_entropy=entropy, capacity=jnp.int32(capacity(layout)))
            nothing = Sent(reduced.sent.everything, _no_buffers(sizes.format, layout))
            return reduced._replace(sent=nothing, report=report), jnp.float32(1.0)

        warm = shared.step < warmup_steps
        if warmup_steps:
            reduced, trim = jax.lax.cond(warm, dense_step, sparse, vector)
        else:
            reduced, trim = sparse(vector)
        summary = predictor.advance(
            known,
            threshold=regions.sparse,
            share=share,
            asked=asked,
            realised=jnp.where(warm, asked, reduced.report.realised),
            trim=trim,
            slope=slope,
        )
        weights, optimizer = shared.weights, shared.optimizer
        if learn_every != 0:
            weights, optimizer = jax.lax.cond(
                due & ~first,
                lambda w, o: predictor.learn(w, o, known, *observed, family),
                lambda w, o: (w, o),
                weights,
                optimizer,
            )
        summary = _where(due & ~first, predictor.observe(summary, *observed), summary)
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
        sampled = jnp.maximum(jnp.asarray([(owners == s).sum() for s in range(segments)], jnp.float32), 1.0)
        return mean(counts / sampled[:, None], axis_name), top

    observed = jax.lax.cond(due, measure, lambda _: (summary.mass, summary.top), vector)
    wires = [accounting.reduced(WORD_BITS * segments * k, devices) for k in (1, predictor.BINS)]
    return observed, accounting.add(*wires)


def _sparse_step(
    vector: jax.Array,
    regions: Regions,
    slope: jax.Array,
    entropy: jax.Array,
    step: jax.Array,
    sizes: Plan,
    layout: Layout,
    axis_name: AxisName,
) -> tuple[Reduced, jax.Array]:
    shape = sizes.format
    assert shape is not None
    bases = Bases(regions.key, regions.level)
    regions, slope = jax.lax.optimization_barrier((regions, slope))
    chosen, finite = jax.lax.optimization_barrier(_select(vector, regions, slope, step, sizes, layout))
    words, own = _encode(chosen, bases, finite, shape, layout)
    payloads = gather_payloads(words, axis_name)
    headers = shape.header(payloads)
    everywhere = jnp.all(headers.finite)

    def decode(
        carry: tuple[jax.Array, jax.Array], words: jax.Array
    ) -> tuple[tuple[jax.Array, jax.Array], None]:
        total, counts = carry
        contents = _decode(words, bases, shape, layout)
        for buffer in (contents.key, contents.sparse):
            total = scatter_add(total, buffer.indices, jnp.where(everywhere, buffer.values, 0.0))
            counts += count_by_segment(buffer.indices, layout)
        return (total, counts), None

    start = (jnp.zeros_like(vector), jnp.zeros(layout.segments, jnp.int32))
    (total, counts), _ = jax.lax.scan(decode, start, payloads)
    devices = payloads.shape[0]
    capacity = shape.key_capacity + shape.sparse_capacity
    realised = counts.astype(jnp.float32) / devices
    # In device order, as a product would not be: the mean of logs is the same on all devices either way.
    trim = jnp.exp(jnp.mean(jnp.log(headers.trim)))
    key_trim = jnp.exp(jnp.mean(jnp.log(headers.key_scale)))
    report = Report(
        sent=jnp.sum(realised),
        capacity=jnp.int32(capacity),
        overflow=jnp.mean(jnp.maximum(headers.candidates - capacity, 0).astype(jnp.float32)),
        threshold=jnp.stack([regions.sparse * trim, regions.key * key_trim], axis=-1),
        asked=regions.asked,
        realised=realised,
        segment_entropy=entropy,
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


class Chosen(NamedTuple):
    """This device's selection, before its values are coded."""

    key: Buffer
    sparse: Buffer
    candidates: jax.Array  # int32[]
    trim: jax.Array  # float32[]
    key_scale: jax.Array  # float32[]


def _select(
    vector: jax.Array, regions: Regions, slope: jax.Array, step: jax.Array, sizes: Plan, layout: Layout
) -> tuple[Chosen, jax.Array]:
    """Read the vector once, gather what lies above the thresholds, trim it to what the payload holds."""
    shape = sizes.format
    assert shape is not None
    threshold = spread(regions.sparse * MARGIN**-slope, layout)
    # Not "above", but "not at or below": a NaN is a candidate too, so that no separate pass need look for one.
    flags = ~(jnp.abs(vector).reshape(-1, 32) <= threshold[:, None])
    words = bitmask(flags.reshape(-1))
    kept = keep(words, sizes.candidates, step)
    positions, _ = jax.lax.optimization_barrier(select(jax.lax.optimization_barrier(kept), sizes.candidates))
    candidates = jnp.sum(jax.lax.population_count(words).astype(jnp.int32))
    values = gather(vector, positions)
    finite = jnp.all(jnp.isfinite(values))
    if sizes.candidates < layout.total:
        crowded = candidates > sizes.candidates
        finite &= jax.lax.cond(crowded, lambda v: jnp.all(jnp.isfinite(v)), lambda _: jnp.bool_(True), vector)
    values = jnp.nan_to_num(values)
    owner = segment_of(positions, layout)
    score = jnp.abs(values) / regions.sparse[owner]
    entries = shape.key_capacity + shape.sparse_capacity
    count = jnp.minimum(candidates, sizes.candidates)
    flagged, trim = largest(score, count, entries, step)
    chosen = compact(positions, values, flagged, entries, layout.total)
    owner = segment_of(chosen.indices, layout)
    score = jnp.abs(chosen.values) / regions.key[owner]
    is_key, key_scale = largest(score, chosen.count, shape.key_capacity, step)
    filled = jnp.arange(entries) < chosen.count
    key = compact(chosen.indices, chosen.values, is_key, shape.key_capacity, layout.total)
    sparse = compact(chosen.indices, chosen.values, filled & ~is_key, shape.sparse_capacity, layout.total)
    # A payload that is not full says nothing of the exact threshold but that it is lower: by about what is missing.
    short = (chosen.count.astype(jnp.float32) + 1.0) / (MARGIN * (entries + 1.0))
    trim = jnp.where(chosen.count < entries, jnp.maximum(short, 0.01) ** slope, trim)
    factors = [jnp.clip(bfloat16_factor(f), 1e-30, 1e29) for f in (trim, key_scale)]
    return Chosen(key, sparse, candidates, *factors), finite


def _encode(
    chosen: Chosen, bases: Bases, finite: jax.Array, shape: PayloadFormat, layout: Layout
) -> tuple[jax.Array, Contents]:
    level = bases.level[segment_of(chosen.sparse.indices, layout)]
    # The factor on the levels that leaves the least squared error on this device
    product = jnp.sum(jnp.abs(chosen.sparse.values) * (level / jnp.max(level)))
    power = jnp.sum(jnp.where(chosen.sparse.indices < layout.total, level * (level / jnp.max(level)), 0.0))
    scale = jnp.where(power > 0, product / jnp.maximum(power, 1e-37), 1.0)
    header = Header(finite, chosen.candidates, chosen.trim, chosen.key_scale, jnp.clip(scale, 1e-30, 1e29))
    contents = Contents(header, chosen.key, chosen.sparse)
    return shape.encode(contents, _entry_bases(contents, bases, layout))


def _decode(words: jax.Array, bases: Bases, shape: PayloadFormat, layout: Layout) -> Contents:
    key, sparse = shape.indices(words)
    contents = Contents(shape.header(words), key, sparse)
    return shape.decode(words, _entry_bases(contents, bases, layout))


def _entry_bases(contents: Contents, bases: Bases, layout: Layout) -> tuple[jax.Array, jax.Array]:
    """Look up what each entry's value is coded against."""
    header = contents.header
    pairs = (
        (contents.key, bases.key * header.key_scale),
        (contents.sparse, bases.level * header.level_scale),
    )
    key, sparse = (jnp.clip(base, 0.0, 1e36)[segment_of(buffer.indices, layout)] for buffer, base in pairs)
    return key, sparse


def _no_buffers(shape: PayloadFormat, layout: Layout) -> tuple[Buffer, Buffer]:
    key, sparse = (
        Buffer(jnp.full(k, layout.total, jnp.int32), jnp.zeros(k, jnp.float32), jnp.int32(0))
        for k in (shape.key_capacity, shape.sparse_capacity)
    )
    return key, sparse


def _where(flag: jax.Array, new: Any, old: Any) -> Any:
    return jax.tree.map(lambda a, b: jnp.where(flag, a, b), new, old)
