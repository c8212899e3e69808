"""Static sizes: what payloads hold, from the layout, the budget and the way of exchange."""

from __future__ import annotations

import math
from typing import NamedTuple

from gradpart_jax import summaries
from gradpart_jax.accounting import WORD_BITS
from gradpart_jax.codecs import WIDEST_VALUE, index_codec
from gradpart_jax.payload import HEADER_WORDS, PayloadFormat, fit_format, most_within
from gradpart_jax.segments import Layout
from gradpart_jax.shares import share_size
from gradpart_jax.sums import words_added

STATISTICS_SHARE = 0.03  # of the budget, at most, goes to histograms
KEY_SHARE = 0.25  # of the entries sent, those coded precisely, unless the budget allows of all
KEY_BITS = 4  # of a value in the key region, unless the budget allows of more
DENSEST = 0.5  # of a vector, that is sent at most: what is left is small, and thresholds keep their meaning
STEP = 4  # between a rung's entries and the next one's
FEWEST = 16  # entries that are worth a rung
GATHER_UP_TO = 2  # devices, where "auto" gathers: a payload leaves once, and training loses less than by shares
LED_BITS = 6  # of a value that a leader's positions ask for

EXCHANGES = ("all_gather", "reduce_scatter", "leader", "auto")


class Plan(NamedTuple):
    """Static sizes, from the layout and the budget."""

    exchange: str  # one of EXCHANGES but "auto"
    ladder: tuple[PayloadFormat, ...]  # ascending; none: dense is no larger
    entries: int  # that a device sends at most
    observe_every: int  # steps between histograms


def plan_of(
    layout: Layout,
    bits_per_element: float,
    *,
    learn_every: int | None = None,
    key_bits: int | None = None,
    rungs: int = 1,
    exchange: str = "all_gather",
    devices: int | None = None,
) -> Plan:
    """Fix all sizes.

    Args:
      layout: the segments.
      bits_per_element: budget of payload bits: the operands of all collectives.
      learn_every: steps between histograms; None or 0 chooses.
      key_bits: of a value in the key region; None chooses.
      rungs: payload sizes, of "all_gather".
      exchange: one of EXCHANGES.
      devices: W; None where the exchange does not depend on it.

    Returns:
      Plan. By "reduce_scatter" a device sends W payloads of the ladder's only format, one to each owner, and then one
      more, of the sums that it owns.
    """
    exchange = settled(exchange, devices)
    if not layout.elements:
        return Plan(exchange, (), 0, 1)
    budget = bits_per_element * layout.elements
    # One histogram, and the all-reduce of its highest bins
    statistics = WORD_BITS * layout.segments * (summaries.BINS + 1)
    every = learn_every or min(max(16, math.ceil(statistics / (STATISTICS_SHARE * budget))), 1000)
    left = budget - statistics / every - (WORD_BITS if rungs > 1 else 0)
    if bits_per_element >= WORD_BITS:
        return Plan(exchange, (), layout.elements, every)
    if exchange == "leader":
        return Plan(exchange, *_led(layout, left, devices), every)
    size, payloads, parts = layout.total, 1, 1
    if exchange == "reduce_scatter":
        assert devices is not None
        size, payloads, parts = share_size(layout, devices), devices + 1, devices
    shape = best_format(size, left / payloads, key_bits, most=layout.elements)
    if payloads * shape.bits + statistics / every >= WORD_BITS * layout.elements:
        return Plan(exchange, (), layout.elements, every)
    ladder = [shape]
    while len(ladder) < rungs and ladder[0].entries >= STEP * FEWEST:
        ladder.insert(0, ladder[0].smaller(STEP))
    return Plan(exchange, tuple(ladder), parts * shape.entries, every)


def best_format(size: int, bits: float, key_bits: int | None = None, most: int | None = None) -> PayloadFormat:
    """Find the format within a budget that loses least of a vector whose magnitudes are exponential.

    More entries, or finer ones: where few bits are to be had, a key region and a sparse one of signs; where many, all
    of half the vector's entries, ever more precisely.

    Args:
      size: length of the vector.
      bits: budget, header and padding included.
      key_bits: of a key value; None chooses.
      most: entries that there are, where padding makes the vector longer; None: all of it.

    Returns:
      The format.

    >>> best_format(10**6, 1e5), best_format(10**6, 4e6).key_bits
    (PayloadFormat(size=1000000, key_capacity=2200, sparse_capacity=6602, key_bits=4, sparse_bits=1), 6)
    """
    most = min(math.ceil(DENSEST * size), size if most is None else most)
    shapes = [
        fit_format(size, bits, key_share=share, key_bits=width, sparse_bits=1, most=most)
        for share in (KEY_SHARE, 1.0)
        for width in ([key_bits] if key_bits else range(KEY_BITS, WIDEST_VALUE + 1))
    ]
    return min(shapes, key=expected_loss)


def expected_loss(shape: PayloadFormat) -> float:
    """Say which share of the squared norm a payload lacks, where magnitudes are exponential.

    Of x > t with P(x > t) = d, the moments are E[x; x > t] = d (t + 1) and E[x^2; x > t] = d (t^2 + 2 t + 2). What is
    not sent is lost whole; in the sparse region the variance; in the key region, of values spread evenly between levels
    r apart, log(r)^2 / 12.

    Args:
      shape: of the payload.

    Returns:
      Share of the squared norm, from 0 to 1.

    >>> expected_loss(PayloadFormat(1000, 250, 750)) < expected_loss(PayloadFormat(1000, 100, 200)) < 0.2
    True
    """

    def above(count: int) -> tuple[float, float, float]:
        share = count / shape.size
        cut = -math.log(share) if share else 0.0
        return share, share * (cut + 1.0), share * (cut**2 + 2.0 * cut + 2.0)

    sent, key = above(shape.entries), above(shape.key_capacity)
    mass, first, second = (a - b for a, b in zip(sent, key, strict=True))
    spread = second - first**2 / mass if shape.sparse_capacity else 0.0
    return (2.0 - sent[2] + spread + key[2] * math.log(shape.level_ratio) ** 2 / 12.0) / 2.0


def settled(exchange: str, devices: int | None) -> str:
    """Choose where the choice was left open, and where one device alone has none.

    Args:
      exchange: one of EXCHANGES.
      devices: W.

    Returns:
      The exchange, not "auto".

    >>> settled("auto", 2), settled("auto", 64)
    ('all_gather', 'reduce_scatter')
    """
    if exchange == "auto":
        assert devices is not None
        return "all_gather" if devices <= GATHER_UP_TO else "reduce_scatter"
    return "all_gather" if devices == 1 else exchange


def field_bits(devices: int) -> int:
    """Say how wide a field is in which as many values can be added up as there are devices.

    Args:
      devices: W.

    Returns:
      Bits.

    >>> field_bits(1), field_bits(4), field_bits(5)
    (6, 8, 9)
    """
    return LED_BITS + (devices - 1).bit_length()


def led_bits(size: int, entries: int, devices: int) -> int:
    """Say how many bits a device hands to collectives by "leader".

    Args:
      size: length of the vector.
      entries: that the leader chooses.
      devices: W.

    Returns:
      Bits: of a header and positions, and of values and a count of non-finite gradients.
    """
    values = words_added(entries, field_bits(devices))
    return WORD_BITS * (HEADER_WORDS + index_codec(size, entries).words + values)


def _led(layout: Layout, budget: float, devices: int | None) -> tuple[tuple[PayloadFormat, ...], int]:
    """Find the format whose header and positions a leader sends, and how many these are."""
    assert devices is not None

    def cost(entries: int) -> int:
        return led_bits(layout.total, entries, devices)

    entries = most_within(cost, budget, min(math.ceil(DENSEST * layout.total), layout.elements))
    if cost(entries) >= WORD_BITS * layout.elements:
        return (), layout.elements
    return (PayloadFormat(layout.total, entries, 0),), entries
