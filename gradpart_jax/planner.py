"""Foretell what a step takes on given links, and choose how to exchange: no device, no tracing, arithmetic alone."""

from __future__ import annotations

import functools
import math
import os
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gradpart_jax.accounting import WORD_BITS
from gradpart_jax.checks import check_integer, check_number
from gradpart_jax.costs import MEASURED, ROUNDS, Calibration, Link
from gradpart_jax.segments import Layout, layout_of, segment_names
from gradpart_jax.sizes import Plan, led_bits, plan_of

RATIOS = (10, 20, 30, 50, 100, 200, 300, 500, 1000)
EXCHANGES = ("all_gather", "reduce_scatter", "leader")
DENSE = "dense"
TOLERANCE = 1.1  # a milder exchange is as good, if its step takes no longer than so many times the fastest one's
LARGEST_PART = 2**30  # elements


class Estimate(NamedTuple):
    """One way of exchange, foretold; seconds and bits of one step of one device."""

    exchange: str
    ratio: float  # payload ratio asked for; 1 for dense
    payload_bits: float  # handed to collectives, on the slow link
    link_bits: float  # leaving the device
    code_s: float  # encoding and decoding
    link_s: float  # on the slow link
    inner_s: float  # on the fast one
    step_s: float  # all of it, and computing


class StepPlan(NamedTuple):
    """What `plan` foretells and advises; str() makes it text."""

    best: Estimate
    dense: Estimate
    others: tuple[Estimate, ...]  # the best ratio of each exchange that was not chosen
    devices: int  # on the slow link: hosts, if a host has several chips
    elements: int
    compute_s: float
    speedup: float  # dense step over best step
    wanted: bool  # whether the step takes no longer than was wanted
    machine: str  # whose encoding and decoding figures these are

    @property
    def compress(self) -> bool:
        """Whether compressing is of use at all."""
        return self.best.exchange != DENSE

    def __str__(self) -> str:
        best, dense = self.best, self.dense
        if self.compress:
            advice = (
                f"gp.partition_compress(axis_name, exchange={best.exchange!r}, ratio={best.ratio:g}, "
                f"devices={self.devices}): {_short(self.speedup)} times as fast as a dense sum"
            )
        else:
            advice = "leave gradients uncompressed (gp.dense_mean or pmean): no exchange makes a step much faster"
        lines = [f"{self.elements:,} elements, {self.devices} devices: {advice}"]
        if not self.wanted:
            lines.append("no exchange makes the step as short as was wanted")
        lines += [
            f"  {one.exchange:15}{one.ratio:6g} times  step {duration(one.step_s):>8}: computing "
            f"{duration(self.compute_s)}, coding {duration(one.code_s)}, link {duration(one.link_s)}"
            + (f", inside {duration(one.inner_s)}" if one.inner_s else "")
            + f"; {_short(one.link_bits / 8e6)} MB leave a device"
            for one in sorted({best, dense, *self.others}, key=lambda one: one.step_s)
        ]
        lines.append(f"  coding as on {self.machine}")
        return "\n".join(lines)


def plan(
    params: Any,
    devices: int,
    link_mbit: float,
    latency_ms: float = 0.0,
    compute_s: float = 0.0,
    *,
    ratio: float | None = None,
    step_s: float | None = None,
    chips: int = 1,
    inner_gbit: float | None = None,
    rounds: str = "ring",
    calibration: Calibration | str | os.PathLike[str] | None = None,
) -> StepPlan:
    """Foretell the step time of every exchange, and choose the mildest that is (nearly) the fastest.

    A step is computing, encoding and decoding, and collectives, one after the other: a collective takes its rounds'
    latencies and its bits' time (see `costs`). Where nothing is more than a tenth faster than a dense sum, the advice
    is the dense sum; of several ratios it is the lowest whose step is within a tenth of the fastest, or, if step_s is
    given, the lowest that keeps to it.

    Args:
      params: a tree of anything with shapes, or a number of elements.
      devices: in all, 1 to 2^20.
      link_mbit: what one device (one host, if it has several chips) can send, in Mbit/s.
      latency_ms: of one message.
      compute_s: of one step's forward and backward pass.
      ratio: the payload ratio, at least 1; None chooses.
      step_s: the step time wanted.
      chips: of a host, which average among themselves first (`inner_axis`); divides devices.
      inner_gbit: what one chip can send to another of its host, in Gbit/s; needed if chips is more than 1.
      rounds: of collectives, "ring" or "tree".
      calibration: what coding takes, or a file of `python -m train.bench calibrate`; None takes figures measured on
        two cores of a CPU: on an accelerator coding takes less.

    Returns:
      StepPlan.

    Raises:
      TypeError: an argument is of a wrong type.
      ValueError: an argument is out of range.

    >>> import gradpart_jax as gp
    >>> slow = gp.plan(25_000_000, devices=8, link_mbit=100, compute_s=0.5)
    >>> slow.compress, slow.speedup > 10
    (True, True)
    >>> gp.plan(25_000_000, devices=8, link_mbit=100_000, compute_s=0.5).best.exchange
    'dense'
    """
    check_integer("devices", devices, 1, 2**20)
    check_integer("chips", chips, 1, devices)
    for name, value in (("link_mbit", link_mbit), ("inner_gbit", inner_gbit), ("step_s", step_s)):
        check_number(name, value, above=0.0, below=math.inf, optional=name != "link_mbit", static=True)
    for name, value in (("latency_ms", latency_ms), ("compute_s", compute_s)):
        check_number(name, value, at_least=0.0, below=math.inf, static=True)
    check_number("ratio", ratio, at_least=1.0, below=math.inf, optional=True, static=True)
    if devices % chips:
        raise ValueError(f"chips={chips} does not divide devices={devices}: give the chips of one host")
    if chips > 1 and inner_gbit is None:
        raise ValueError(f"chips={chips} share a fast link: give its inner_gbit")
    if rounds not in ROUNDS:
        raise ValueError(f"rounds={rounds!r} is unknown: choose one of {', '.join(ROUNDS)}")
    if calibration is None:
        calibration = MEASURED
    elif not isinstance(calibration, Calibration):
        if not isinstance(calibration, str | os.PathLike):
            raise TypeError(
                f"calibration={calibration!r} is no Calibration: give one, or a file of `train.bench calibrate`"
            )
        calibration = Calibration.read(calibration)
    layout, parts = _layout(params)
    hosts = devices // chips
    link = Link(link_mbit * 1e6, latency_ms * 1e-3, rounds)
    inner = 0.0
    if inner_gbit is not None:
        inner = Link(inner_gbit * 1e9).reduce(float(WORD_BITS * layout.elements * parts), chips)

    def at(exchange: str, ratio: float) -> Estimate:
        return estimate(layout, exchange, ratio, hosts, link, calibration, compute_s + inner, parts, inner)

    dense = at(DENSE, 1.0)
    ratios = RATIOS if ratio is None else (ratio,)
    found = {way: [at(way, r) for r in ratios] for way in EXCHANGES} if hosts > 1 else {}
    everything = [dense, *(one for ways in found.values() for one in ways)]
    bound = step_s or TOLERANCE * min(one.step_s for one in everything)
    best = _mildest(everything, bound)
    others = tuple(_mildest(ways, bound) for way, ways in found.items() if way != best.exchange)
    elements = layout.elements * parts
    met = step_s is None or best.step_s <= step_s
    speedup = dense.step_s / best.step_s if best.step_s else 1.0
    return StepPlan(best, dense, others, hosts, elements, compute_s, speedup, met, calibration.machine)


def estimate(
    layout: Layout,
    exchange: str,
    ratio: float,
    devices: int,
    link: Link,
    calibration: Calibration,
    before_s: float = 0.0,
    parts: int = 1,
    inner_s: float = 0.0,
) -> Estimate:
    """Foretell one way of exchange.

    Args:
      layout: the segments.
      exchange: "dense", "all_gather", "reduce_scatter" or "leader".
      ratio: payload ratio.
      devices: W on the link.
      link: the slow one.
      calibration: what coding takes.
      before_s: of computing, and of what was averaged inside.
      parts: how many times all of it is exchanged.
      inner_s: the part of before_s that was inside.

    Returns:
      Estimate.
    """
    n, one = layout.elements * parts, calibration
    sizes = None if exchange == DENSE else _sizes(layout, exchange, ratio, devices)
    if sizes is None or not sizes.ladder:
        bits = float(WORD_BITS * n)
        seconds, code = link.reduce(bits, devices), one.added * n
        sent = 2 * bits * (devices - 1) / devices
        return Estimate(DENSE, 1.0, bits, sent, code, seconds, inner_s, before_s + code + seconds)
    shape, entries = sizes.ladder[-1], sizes.entries * parts
    code = one.fixed + one.element * n + one.entry * entries
    if exchange == "reduce_scatter":
        payload = float(shape.bits * parts)
        seconds = link.deal(payload * devices, devices) + link.gather(payload, devices)
        bits, sent = payload * (devices + 1), 2 * payload * (devices - 1)
        # An owner selects once more, from its share; each entry is received twice, by its owner and by all.
        code += (one.element * n + one.entry * entries) / devices + 2 * one.decoded * entries
    elif exchange == "leader":
        bits = float(led_bits(layout.total, sizes.entries, devices) * parts)
        seconds, sent = link.reduce(bits, devices) + link.reduce(0.0, devices), 2 * bits * (devices - 1) / devices
        code += one.decoded * entries
    else:
        bits = float(shape.bits * parts)
        seconds, sent = link.gather(bits, devices), bits * (devices - 1)
        code += devices * one.decoded * entries
    # Histograms are rare: their bits, averaged over steps, and no latency.
    statistics = n * WORD_BITS / ratio - bits if exchange != "leader" else 0.0
    if 0 < statistics < 0.05 * bits:
        bits, sent = bits + statistics, sent + 2 * statistics * (devices - 1) / devices
        seconds += 2 * statistics * (devices - 1) / devices / link.bits_per_s
    return Estimate(exchange, ratio, bits, sent, code, seconds, inner_s, before_s + code + seconds)


def duration(seconds: float) -> str:
    """Write a time down, in the unit that suits it.

    Args:
      seconds: the time.

    Returns:
      Three digits, or a whole number, and a unit.

    >>> duration(0.0123), duration(75.0), duration(1500.0), duration(1e8), duration(0.0)
    ('12.3 ms', '75 s', '25 min', '27,778 h', '0 s')
    """
    for unit, size, least in (("h", 3600.0, 10), ("min", 60.0, 10), ("s", 1.0, 1), ("ms", 1e-3, 1), ("µs", 1e-6, 1)):
        if seconds >= least * size:
            return f"{_short(seconds / size)} {unit}"
    return f"{seconds:.3g} s"


def _short(value: float) -> str:
    """Write three digits, or a whole number.

    >>> _short(0.0123), _short(999.8)
    ('0.0123', '1,000')
    """
    return f"{value:,.0f}" if value >= 999.5 else f"{value:.3g}"


@functools.lru_cache(maxsize=4096)
def _sizes(layout: Layout, exchange: str, ratio: float, devices: int) -> Plan:
    return plan_of(layout, WORD_BITS / ratio, exchange=exchange, devices=devices)


def _mildest(estimates: list[Estimate], bound: float) -> Estimate:
    """Choose the lowest ratio within a bound, the fastest at it; the fastest of all if none is.

    One device's positions suit the others less: a leader is the last choice at a ratio.
    """
    fit = [one for one in estimates if one.step_s <= bound]
    if fit:
        return min(fit, key=lambda one: (one.ratio, one.exchange == "leader", one.step_s))
    return min(estimates, key=lambda one: one.step_s)


def _layout(params: Any) -> tuple[Layout, int]:
    if isinstance(params, int | float | np.number):
        check_integer("params", params, 1, 2**50)
        elements = int(params)
        parts = -(-elements // LARGEST_PART)
        return layout_of(jax.ShapeDtypeStruct((elements // parts,), jnp.float32)), parts
    for name, leaf in zip(segment_names(params), jax.tree.leaves(params), strict=True):
        if not (isinstance(leaf, int | float) or hasattr(leaf, "shape")):
            raise TypeError(f"params has the leaf {name!r}, which is {leaf!r}: give arrays, or a number of elements")
    layout = layout_of(params)
    if not layout.elements:
        raise ValueError("params has no elements: give a tree with some, or their number")
    return layout, 1
