"""The network benchmark's figures: which steps count, and what a training's metrics and the kernel's counters say."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from train.bench.links import UNSHAPED, bits

COLD = 2  # first periods, which are not counted: the first compiles, the second finds cold connections
MEANT = 20  # steps whose mean loss is compared with the one to reach


class Stretch(NamedTuple):
    """Steps of a training at one rate."""

    rate: str  # as tc writes it, or UNSHAPED
    start: int  # steps done before the first that is counted
    stop: int


def plan(rates: Sequence[str], steps: int, period: int, before: int = 0) -> list[Stretch]:
    """Lay out a training: a period in which the rate changes is not counted.

    Args:
      rates: asked for.
      steps: to count at each, rounded up to periods, of which there are two at least.
      period: steps to an exchange.
      before: first steps, of another kind, that come before all.

    Returns:
      Stretches, the first without a shaper.

    >>> plan(["20mbit", "none"], 3, 1)
    [Stretch(rate='none', start=2, stop=5), Stretch(rate='20mbit', start=6, stop=9)]
    """
    found, done, counted = [], before + COLD * period, max(2, -(-steps // period)) * period
    for rate in dict.fromkeys([UNSHAPED, *(rate.strip() for rate in rates)]):
        found.append(Stretch(rate, done, done + counted))
        done += counted + period
    return found


def rows_of(
    lines: list[dict[str, Any]],
    phases: dict[str, Any],
    stretches: list[Stretch],
    counted: list[list[tuple[int, list[int]]]],
    period: int,
) -> list[dict[str, Any]]:
    """Take a training's figures.

    Args:
      lines: of metrics.jsonl.
      phases: of phases.json, timed without a shaper.
      stretches: of `plan`.
      counted: of each stretch, at both ends: steps done, and bytes that had left each host.
      period: steps to an exchange.

    Returns:
      A row for each stretch: seconds a step, now, without a shaper, and of its pieces; bytes a step that leave one
      host, by `gp.stats` and by the kernel.
    """
    seconds, sent = (np.array([0.0, *(line[key] for line in lines)]) for key in ("seconds", "link_bytes"))
    rows: list[dict[str, Any]] = []
    for (rate, start, stop), ((first, before), (last, after)) in zip(stretches, counted, strict=True):
        step = float(np.median(np.diff(seconds[start : stop + 1 : period]))) / period
        link = float(sent[stop] - sent[start]) / (stop - start)
        # A counter may have been read a step late
        overhead = float(np.mean(np.subtract(after, before)) / (sent[last] - sent[first])) - 1
        unshaped = rows[0]["step_time_s"] if rows else step
        rows.append(
            {
                "rate": bits(rate),
                "step_time_s": step,
                "unshaped_s": unshaped,
                "compute_s": phases["forward_backward"] + phases["optimizer"],
                "encode_s": phases["encode"],
                "wire_s": max(0.0, phases["wire"] + step - unshaped),
                "decode_s": phases["decode"],
                "link_bytes": link,
                "kernel_bytes": link * (1 + overhead),
                "overhead": overhead,
                "steps": stop - start,
            }
        )
    return rows


def reached(lines: list[dict[str, Any]], loss: float) -> int | None:
    """Find the steps after which the mean of the last losses is as low as asked for.

    Args:
      lines: of metrics.jsonl.
      loss: to reach.

    Returns:
      Steps; None where it is never reached.

    >>> reached([{"loss": 3.0}] * 10 + [{"loss": 1.0}] * 30, 1.5)
    25
    """
    totals = np.cumsum([0.0, *(line["loss"] for line in lines)])
    low = np.flatnonzero(totals[MEANT:] - totals[:-MEANT] <= MEANT * loss)
    return int(low[0]) + MEANT if low.size else None
