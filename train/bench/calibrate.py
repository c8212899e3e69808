"""What coding takes on this machine: the figures that `gp.plan` and `train.plan` reckon with."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from rich.table import Table

import gradpart_jax as gp
from gradpart_jax.buffers import Buffer, scatter_add
from gradpart_jax.costs import Calibration
from gradpart_jax.payload import Bases, Contents, Header
from gradpart_jax.segments import layout_of
from gradpart_jax.selection import decode
from gradpart_jax.sizes import plan_of
from train import figures, traces
from train.bench import compress
from train.limits import MANY, within
from train.log import write_text
from train.screen import paper, say

SMALL = 100_000  # elements, of the update that shows what does not grow
DENSITIES = (0.01, 0.03)


@dataclasses.dataclass(frozen=True)
class Args:
    """Measure what coding takes on this machine."""

    elements: int = 4_000_000
    """Elements of the larger gradient, at least a million."""
    repeats: int = 9
    """Timings, of which the median counts."""
    json: Path = Path("calibration.json")
    """File to write, for `gp.plan(calibration=...)` and `train.plan --calibration`."""


def machine() -> str:
    """Name this machine: its device, and of a CPU the model and the number of cores."""
    device = jax.devices()[0]
    if device.platform != "cpu":
        return device.device_kind
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{os.cpu_count()} cores of {named[0] if named else platform.machine()}"


def decoding(elements: int, density: float, repeats: int) -> tuple[float, int]:
    """Time one payload's decoding and adding.

    Args:
      elements: n.
      density: share of the entries that the payload holds.
      repeats: timings.

    Returns:
      Median seconds, and the entries.
    """
    layout = layout_of(jax.ShapeDtypeStruct((elements,), jnp.float32))
    shape = plan_of(layout, traces.bits_for(density, layout)).ladder[-1]
    rng = np.random.default_rng(0)
    places = rng.choice(elements, shape.entries, replace=False)
    cuts = (np.sort(places[: shape.key_capacity]), np.sort(places[shape.key_capacity :]))
    buffers = [Buffer(jnp.asarray(cut, jnp.int32), jnp.ones(cut.size), jnp.int32(cut.size)) for cut in cuts]
    one = jnp.float32(1.0)
    header = Header(jnp.bool_(True), jnp.int32(shape.entries), one, one, one)
    bases = tuple(jnp.ones(cut.size) for cut in cuts)
    words, _ = jax.jit(shape.encode)(Contents(header, *buffers), (bases[0], bases[1]))
    known = Bases(jnp.ones(1), jnp.ones(1))

    def add(words: jax.Array, total: jax.Array) -> jax.Array:
        for buffer in decode(words, known, shape, shape, layout)[1:]:
            total = scatter_add(total, buffer.indices, buffer.values)
        return total

    run = jax.jit(add, donate_argnums=1)
    return compress.timed(run, lambda: (words, jnp.zeros(layout.total)), repeats), shape.entries


def measure(elements: int, repeats: int) -> Calibration:
    """Time three updates and the decoding of a payload, and solve for what each part takes.

    Args:
      elements: of the larger gradient.
      repeats: timings.

    Returns:
      Calibration.
    """
    low, high = DENSITIES
    small, large, dense = (
        compress.whole(compress.gradient_of("laplace", n), density, repeats)
        for n, density in ((SMALL, low), (elements, low), (elements, high))
    )
    entries = [float(gp.stats(found["state"]).sent) for found in (small, large, dense)]
    each = max(dense["seconds"] - large["seconds"], 0.0) / (entries[2] - entries[1])
    element = (large["seconds"] - small["seconds"] - each * (entries[1] - entries[0])) / (elements - SMALL)
    fixed = small["seconds"] - element * SMALL - each * entries[0]
    seconds, count = decoding(elements, high, repeats)
    decoded = min(seconds / count, each)
    add = jax.jit(jnp.add, donate_argnums=0)
    added = compress.timed(add, lambda: (jnp.ones(elements), jnp.ones(elements)), repeats) / elements
    return Calibration(machine(), max(fixed, 0.0), max(element, 0.0), each - decoded, decoded, added)


def main(args: Args) -> None:
    """Measure, print and write the figures.

    Args:
      args: of the command line.

    Raises:
      UsageError: an option is out of range.
    """
    within(("--elements", args.elements, 1_000_000, 10**8), ("--repeats", args.repeats, 1, MANY))
    figures.check(None, args.json)
    console = paper()
    found = measure(args.elements, args.repeats)
    table = Table(title=f"coding on {found.machine}")
    table.add_column("")
    table.add_column("time", justify="right")
    table.add_row("a step, whatever its size", f"{1e3 * found.fixed:.2f} ms")
    for name, seconds in (
        ("an element", found.element),
        ("an entry sent", found.entry),
        ("an entry received", found.decoded),
        ("an element of a dense sum", found.added),
    ):
        table.add_row(name, f"{1e9 * seconds:.2f} ns")
    console.print(table)
    write_text(json.dumps(found._asdict(), indent=1) + "\n", args.json)
    say(console, f"written to {args.json}")
