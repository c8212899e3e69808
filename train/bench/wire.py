"""Bits on the wire against what mathematics allows, over densities and sizes."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.table import Table

from gradpart_jax.codecs import WIDEST_VALUE, index_codec
from gradpart_jax.payload import PayloadFormat
from gradpart_jax.sizes import KEY_BITS, KEY_SHARE
from train import figures
from train.limits import within
from train.log import write_text
from train.screen import paper, say

SIZES = (10**4, 10**5, 10**6, 10**7, 10**8)
DENSITIES = (0.1, 0.03, 0.01, 0.003, 0.001, 0.0003, 0.0001)
VERIFIED = 10**6  # largest size at which positions are encoded and decoded, not only counted


@dataclasses.dataclass(frozen=True)
class Args:
    """Compare index and payload sizes with the entropy bound."""

    key_bits: int = KEY_BITS
    """Bits of a value in the key region, sign included; 2 to 8."""
    json: Path | None = None
    """File to write the figures to."""
    figure: Path = Path("wire.png")
    """Picture to draw."""


def choose_bits(n: int, k: int) -> float:
    """Count the bits of naming k of n: log2 of n choose k.

    >>> round(choose_bits(4, 2), 6) == round(math.log2(6), 6)
    True
    """
    return (math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)) / math.log(2)


def measure(size: int, density: float, key_bits: int) -> dict[str, Any]:
    """Size the codes for one size and density; they are static, whatever the values.

    Args:
      size: n.
      density: k / n.
      key_bits: of a key value.

    Returns:
      Bits per entry, and their ratios to the bounds.
    """
    count = max(2, round(size * density))
    key = max(1, round(KEY_SHARE * count))
    codec, shape = index_codec(size, count), PayloadFormat(size, key, count - key, key_bits, 1)
    if size <= VERIFIED:
        places = np.sort(np.random.default_rng(size + count).choice(size, count, replace=False)).astype(np.int32)
        found = jax.jit(lambda x: codec.decode(codec.encode(x, jnp.int32(count)), jnp.int32(count)))(places)
        if not np.array_equal(found, places):
            raise AssertionError(f"{count} positions of {size} do not come back from {codec}")
    bound = choose_bits(size, count)
    # Two regions: which entries are in which is part of what is told
    payload_bound = choose_bits(size, key) + choose_bits(size - key, count - key) + key * key_bits + (count - key)
    return {
        "size": size,
        "density": density,
        "index_bits": codec.bits / count,
        "index_bound": bound / count,
        "index_ratio": codec.bits / bound,
        "payload_bits": shape.bits / count,
        "payload_bound": payload_bound / count,
        "payload_ratio": shape.bits / payload_bound,
    }


def main(args: Args) -> None:
    """Print the table and draw the picture.

    Args:
      args: of the command line.

    Raises:
      UsageError: an option is out of range.
    """
    within(("--key-bits", args.key_bits, 2, WIDEST_VALUE))
    figures.check(args.figure, args.json)
    console = paper()
    rows = [measure(n, d, args.key_bits) for n in SIZES for d in DENSITIES if n * d >= 10]
    table = Table(title="bits an entry sent; the payload has a header, two regions, values and padding")
    for column in ("size", "density", "index", "bound", "over", "payload", "bound", "over"):
        table.add_column(column, justify="right")
    last = SIZES[0]
    for row in rows:
        if row["size"] != last:
            table.add_section()
            last = row["size"]
        table.add_row(
            f"{row['size']:.0e}",
            f"{row['density']:.2%}",
            f"{row['index_bits']:.2f}",
            f"{row['index_bound']:.2f}",
            f"{row['index_ratio'] - 1:.1%}",
            f"{row['payload_bits']:.2f}",
            f"{row['payload_bound']:.2f}",
            f"{row['payload_ratio'] - 1:.1%}",
        )
    console.print(table)
    if args.json:
        write_text(json.dumps(rows, indent=1) + "\n", args.json)
    with figures.canvas(2, args.figure) as axes:
        for axis, name in zip(axes, ("index", "payload"), strict=True):
            for n in SIZES:
                line = [(r["density"], 100 * (r[f"{name}_ratio"] - 1)) for r in rows if r["size"] == n]
                axis.plot(*zip(*line, strict=True), "o-", ms=3, label=f"n = {n:.0e}")
            axis.set(xscale="log", xlabel="density", ylabel="over the bound, %", title=name, ylim=(0, 25))
        axes[0].legend(frameon=False)
    say(console, f"picture: {args.figure}")
