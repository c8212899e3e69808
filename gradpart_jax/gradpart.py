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

import jax
import jax.numpy as jnp

from gradpart_jax import accounting, gathered, led, predictor, scattered, summaries
from gradpart_jax.accounting import WORD_BITS, Wire
from gradpart_jax.baselines.dense import dense
from gradpart_jax.bits import WORD
from gradpart_jax.exchange import AxisName, axis_size, greatest, mean, position
from gradpart_jax.families import family as find_family
from gradpart_jax.outlook import GradpartState, Outcome, digest, foresee, spare
from gradpart_jax.regions import entropy_rule as find_rule
from gradpart_jax.replicated import replicated
from gradpart_jax.scheme import Reduced, Scheme, SchemeState, Settle, early
from gradpart_jax.segments import Layout, sample_positions
from gradpart_jax.shares import owned_by, share_size
from gradpart_jax.sizes import Plan, plan_of

SAMPLE = 2**17  # elements that a histogram is made from


def gradpart(
    bits_per_element: float = 0.32,
    *,
    warmup_steps: int = 0,
    learn_every: int | None = None,
    seed: int | None = None,
    family: str = predictor.DEFAULT_FAMILY,
    entropy_rule: str = "entropy",
    key_bits: int | None = None,
    rungs: int = 1,
    exchange: str = "all_gather",
    devices: int | None = None,
    remember: bool = True,
) -> Scheme:
    """Make the scheme behind `partition_compress`, which has checked all of these arguments but the names.

    Args:
      bits_per_element: budget of payload bits, everything counted.
      warmup_steps: first steps that are exchanged dense.
      learn_every: steps between histograms, each with one step of the predictor's training; None chooses, 0 leaves the
        predictor as it was trained beforehand.
      seed: None for the shipped predictor, a number for a freshly initialised one.
      family: of magnitude distributions.
      entropy_rule: how entropy shares the budget among segments.
      key_bits: of a value in the key region, sign included; None chooses.
      rungs: payload sizes, of which each step takes the smallest that holds every device's entries.
      exchange: one of `sizes.EXCHANGES`.
      devices: that the axis has; needed by all but "all_gather".
      remember: whether an owner of sums remembers what it has not passed on.

    Returns:
      A Scheme.

    Raises:
      ValueError: no such family or rule, or (in reduce) devices is not the axis' number.
    """
    rule = find_rule(entropy_rule)
    find_family(family)  # refuses an unknown one here, at construction
    uncompressed = dense()

    def plan(layout: Layout) -> Plan:
        return plan_of(
            layout,
            bits_per_element,
            learn_every=learn_every,
            key_bits=key_bits,
            rungs=rungs,
            exchange=exchange,
            devices=devices,
        )

    def init(layout: Layout) -> SchemeState:
        weights = predictor.load(family) if seed is None else predictor.initialise(seed, family)
        sizes = plan(layout)
        state = GradpartState(
            step=jnp.int32(0),
            summary=summaries.start(jnp.asarray(layout.sizes, jnp.float32)),
            stirred=jnp.bool_(False),
            spared=jnp.float32(spare(sizes.observe_every)),
            weights=weights,
            optimizer=predictor.start_learning(weights),
        )
        owed = _owned(sizes, layout, devices) if remember else 0
        return SchemeState(shared=state, local=jnp.zeros(owed, jnp.float32))

    def capacity(layout: Layout) -> int:
        return plan(layout).entries

    def reduce(
        vector: jax.Array, state: SchemeState, layout: Layout, axis_name: AxisName, settle: Settle
    ) -> tuple[Reduced, SchemeState]:
        sizes = plan(layout)
        found = axis_size(axis_name)
        if devices not in (None, found):
            raise ValueError(f"devices={devices}, but axis_name={axis_name!r} has {found}: give their number")
        if not sizes.ladder:
            return uncompressed.reduce(vector, state, layout, axis_name, settle)
        shared = state.shared
        due, hasty, first = _due(shared, sizes.observe_every)
        own = owned_by(position(axis_name), layout, found) if sizes.exchange == "reduce_scatter" else None
        observed, statistics = _observe(vector, due, shared.summary, layout, axis_name, own)
        outlook = replicated(foresee)(
            shared, observed, sizes=layout.sizes, capacity=sizes.entries, rule=rule, family=family
        )
        owed = state.local

        def sparse(vector: jax.Array) -> tuple[Reduced, Outcome, jax.Array]:
            common = (outlook, shared.step, sizes, layout, axis_name, settle)
            if sizes.exchange == "reduce_scatter":
                return scattered.step(vector, owed, *common)
            step = led.step if sizes.exchange == "leader" else gathered.step
            return *step(vector, *common), owed

        def dense_step(vector: jax.Array) -> tuple[Reduced, Outcome, jax.Array]:
            reduced, _ = uncompressed.reduce(vector, state, layout, axis_name, settle)
            report = reduced.report._replace(segment_entropy=outlook.entropy, capacity=jnp.int32(sizes.entries))
            return reduced._replace(report=report), Outcome(jnp.float32(0.0), jnp.float32(0.0)), owed

        warm = early(shared.step, warmup_steps)
        if warmup_steps:
            reduced, outcome, owed = jax.lax.cond(warm, dense_step, sparse, vector)
        else:
            reduced, outcome, owed = sparse(vector)
        # What is dense tells nothing of thresholds; a segment of zeros, as in any other step, has taken nothing.
        as_asked = jnp.where(summaries.unseen(outlook.known), 0.0, outlook.regions.asked)
        realised = jnp.where(warm, as_asked, reduced.report.realised)
        fresh = replicated(digest)(
            shared,
            outlook,
            realised,
            outcome,
            observed,
            due & ~first,
            hasty,
            every=sizes.observe_every,
            family=family,
            learning=learn_every != 0,
        )
        wire = accounting.add(reduced.wire, Wire(*[jnp.where(due, bits, 0.0) for bits in statistics]))
        return reduced._replace(wire=wire), SchemeState(fresh, owed)

    return Scheme("partition", init, reduce, capacity)


def _owned(sizes: Plan, layout: Layout, devices: int | None) -> int:
    """Say how much a device owes as an owner of sums."""
    return share_size(layout, devices or 1) if sizes.ladder and sizes.exchange == "reduce_scatter" else 0


def _due(shared: GradpartState, every: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Say whether a step's histogram is due, whether it comes out of turn, and whether there is none before it.

    At the start a gradient may be zero: of a layer whose factor starts at zero, or of all where a rate rises from zero.
    Where a segment has shown only zeros, all steps that are powers of two look anew; and, out of turn and as long as
    any are spared, every step after one in which such a segment, or one that has grown all at once, has taken the room
    of others.
    """
    step, unseen = shared.step, summaries.unseen(shared.summary)
    doubled = jnp.any(unseen) & (step & (step - 1) == 0)
    turn = (step % every == 0) | doubled
    hasty = shared.stirred & ~turn & (shared.spared >= 1.0)
    return turn | hasty, hasty, jnp.all(unseen)


def _observe(
    vector: jax.Array,
    due: jax.Array,
    summary: summaries.Summary,
    layout: Layout,
    axis_name: AxisName,
    without: jax.Array | None,
) -> tuple[tuple[jax.Array, jax.Array], Wire]:
    """Average the histogram of a sample, some words left out, over devices where it is due, else give the last one."""
    positions, owners = sample_positions(layout, SAMPLE)
    segments, devices = layout.segments, axis_size(axis_name)

    def measure(vector: jax.Array) -> tuple[jax.Array, jax.Array]:
        values, owner = jnp.abs(vector[positions]), jnp.asarray(owners)
        valid = jnp.isfinite(values)
        if without is not None:  # what is not sent tells nothing of what is
            valid &= ~without[positions // WORD]
        top = greatest(summaries.top_bin(values, owner, valid, segments), axis_name)
        counts = summaries.histogram(values, owner, valid, top, segments)
        # Counts are whole numbers, whose sum is exact in any order; a sum of shares would not be.
        return mean(counts, axis_name), top

    observed = jax.lax.cond(due, measure, lambda _: (summary.mass, summary.top), vector)
    wires = [accounting.reduced(WORD_BITS * segments * k, devices) for k in (1, summaries.BINS)]
    return observed, accounting.add(*wires)
