"""What one update costs beside the physical floor: one pass that reads gradient and memory and writes both."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

import gradpart_jax as gp
from gradpart_jax import outlook, predictor, selection, sizes
from gradpart_jax.buffers import Buffer, scatter_add
from gradpart_jax.feedback import Memory, Sent, subtract
from gradpart_jax.payload import Bases, Contents
from gradpart_jax.regions import entropy_rule
from gradpart_jax.segments import layout_of
from gradpart_jax.states import CompressState
from train import figures, traces
from train.bench import trees
from train.errors import UsageError
from train.limits import MANY, within
from train.log import write_text
from train.screen import paper, say

SIZES = (10**5, 10**6, 10**7, 10**8)
BYTES_NEEDED = 40  # of memory for each element, at the most


@dataclasses.dataclass(frozen=True)
class Args:
    """Time the compressor against one pass over memory, top-k, and a dense sum; ratios within one run."""

    elements: int = 25_000_000
    """Size of the gradient; 10000 to 1000000000."""
    density: float = 0.01
    """Share of the entries sent."""
    data: str = "laplace"
    """laplace (its third power, heavy-tailed) or recorded (a small transformer's gradient, repeated)."""
    repeats: int = 7
    """Timings of each, of which the median counts."""
    grow: bool = True
    """Measure other sizes too, for the picture."""
    leaves: bool = True
    """Measure trees of many leaves too."""
    json: Path | None = None
    """File to write the figures to."""
    figure: Path = Path("compress.png")
    """Picture to draw."""


def timed(function: Callable[..., Any], arguments: Callable[[], tuple[Any, ...]], repeats: int) -> float:
    """Time a compiled function whose arguments may be donated.

    Args:
      function: to call.
      arguments: makes them afresh, outside the timing.
      repeats: timings, after one that is not counted.

    Returns:
      Median seconds.
    """
    seconds = []
    for _ in range(repeats + 1):
        given = jax.block_until_ready(arguments())
        began = time.perf_counter()
        jax.block_until_ready(function(*given))
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[1:])


def gradient_of(kind: str, elements: int) -> jax.Array:
    """Make a gradient to compress.

    Args:
      kind: laplace or recorded.
      elements: N.

    Returns:
      float32[N].
    """
    if kind == "recorded":
        task = traces.task("transformer", 0)
        batch = next(task.batches)
        flat = np.concatenate([np.ravel(x) for x in jax.tree.leaves(task.gradient(task.params, batch))])
        return jnp.asarray(np.resize(flat, elements))
    return jax.random.laplace(jax.random.key(0), (elements,)) ** 3


@functools.partial(jax.jit, donate_argnums=(0, 1))
def floor(gradient: jax.Array, memory: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Read gradient and memory, write output and memory: no compressor can touch less."""
    total = gradient + memory
    sent = jnp.where(jnp.abs(total) > 1.0, total, 0.0)
    return sent, total - sent


def whole(gradient: Any, density: float, repeats: int) -> dict[str, Any]:
    """Time the update of `partition_compress`, settled, donated.

    Args:
      gradient: a tree.
      density: share of the entries sent.
      repeats: timings.

    Returns:
      Seconds, compile seconds, extra memory over the gradient's, ratio; and the last state.
    """
    layout = layout_of(gradient)
    tx = gp.partition_compress(bits_per_element=traces.bits_for(density, layout))
    state = tx.init(gradient)
    began = time.perf_counter()
    update = jax.jit(lambda g, s: tx.update(g, s), donate_argnums=(0, 1)).lower(gradient, state).compile()
    compiling = time.perf_counter() - began
    analysis = update.memory_analysis()
    holder = [state]

    def fresh() -> tuple[Any, CompressState]:
        return jax.tree.map(jnp.copy, gradient), holder[0]

    def step(g: Any, s: Any) -> Any:
        out, holder[0] = update(g, s)
        return out, holder[0]

    for _ in range(5):  # until the thresholds have settled
        jax.block_until_ready(step(*fresh()))
    seconds = timed(step, fresh, repeats)
    stats = gp.stats(holder[0])
    return {
        "seconds": seconds,
        "compile_seconds": compiling,
        "extra_memory": analysis.temp_size_in_bytes / (4 * layout.elements) if analysis else None,
        "payload_ratio": float(stats.payload_ratio),
        "sent": float(stats.sent / stats.capacity),
        "state": holder[0],
    }


def parts(gradient: jax.Array, state: CompressState, density: float, repeats: int) -> dict[str, float]:
    """Time the pieces of an update, each alone, so that they add up to more than the whole.

    Args:
      gradient: float32[N].
      state: settled, of one leaf.
      density: share of the entries sent.
      repeats: timings.

    Returns:
      Seconds by name.
    """
    layout = layout_of(gradient)
    plan = sizes.plan_of(layout, traces.bits_for(density, layout))
    shape = plan.ladder[-1]
    shared, family = state.scheme.shared, predictor.DEFAULT_FAMILY
    vector = jnp.pad(gradient, (0, layout.total - layout.elements)) + state.memory.residual

    @jax.jit
    def foresee(state: outlook.GradpartState) -> outlook.Outlook:
        observed = (state.summary.mass, state.summary.top)
        return outlook.foresee(state, observed, layout.sizes, plan.entries, entropy_rule("entropy"), family)

    view = foresee(shared)
    bases = Bases(view.regions.key, view.regions.level)
    turn = jnp.int32(0)

    @jax.jit
    def choose(vector: jax.Array) -> tuple[selection.Chosen, jax.Array]:
        return selection.choose(vector, view, turn, shape, layout)

    @jax.jit
    def encode(chosen: selection.Chosen) -> tuple[jax.Array, Contents]:
        return selection.encode(chosen, bases, jnp.bool_(True), shape, layout)

    @functools.partial(jax.jit, donate_argnums=1)
    def decode(words: jax.Array, total: jax.Array) -> jax.Array:
        contents = selection.decode(words, bases, shape, shape, layout)
        for buffer in (contents.key, contents.sparse):
            total = scatter_add(total, buffer.indices, buffer.values)
        return total

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def remember(vector: jax.Array, memory: Memory, own: tuple[Buffer, ...]) -> Memory:
        return subtract(vector, memory.velocity, memory, Sent(jnp.bool_(False), own), jnp.bool_(True))

    chosen, _ = choose(vector)
    words, own = encode(chosen)
    top = jax.jit(lambda x: jax.lax.top_k(jnp.abs(x), plan.entries))
    read = jax.jit(lambda x: jnp.max(jnp.abs(x)))
    return {
        "one read pass": timed(read, lambda: (vector,), repeats),
        "forecast": timed(foresee, lambda: (shared,), repeats),
        "select": timed(choose, lambda: (vector,), repeats),
        "encode": timed(encode, lambda: (chosen,), repeats),
        "decode": timed(decode, lambda: (words, jnp.zeros_like(vector)), repeats),
        "memory": timed(
            remember, lambda: (jnp.copy(vector), jax.tree.map(jnp.copy, state.memory), (own.key, own.sparse)), repeats
        ),
        "lax.top_k": timed(top, lambda: (vector,), max(1, repeats // 3)),
    }


def dense_sum(elements: int, repeats: int) -> float | None:
    """Time a dense psum of the vector over four devices, virtual ones where there are CPUs alone."""
    devices = 4
    if len(jax.devices()) < devices:
        return None
    total = jax.pmap(lambda x: jax.lax.psum(x, "w"), "w", devices=jax.devices()[:devices], donate_argnums=0)
    return timed(total, lambda: (jnp.ones((devices, elements), jnp.float32),), repeats)


def main(args: Args) -> None:
    """Measure, print ratios to the floor, and draw how cost grows.

    Args:
      args: of the command line.

    Raises:
      UsageError: an option is out of range.
    """
    within(
        ("--elements", args.elements, 10_000, 10**9),
        ("--density", args.density, 1e-4, 0.1),
        ("--repeats", args.repeats, 1, MANY),
    )
    if args.data not in ("laplace", "recorded"):
        raise UsageError(f"--data {args.data} is unknown: choose one of laplace, recorded")
    figures.check(args.figure, args.json)
    jax.config.update("jax_num_cpu_devices", 4)
    console = paper()
    gradient = gradient_of(args.data, args.elements)
    least = timed(floor, lambda: (jnp.copy(gradient), jnp.zeros_like(gradient)), args.repeats)
    result = whole(gradient, args.density, args.repeats)
    state = result.pop("state")
    rows = {"floor: read both, write both": least, "whole update": result["seconds"]}
    rows |= parts(gradient, state, args.density, args.repeats)
    dense = dense_sum(args.elements, args.repeats)
    if dense is not None:
        rows["dense psum, 4 devices"] = dense
    table = Table(
        title=f"{args.elements:,} elements, {args.density:.2%} sent, {args.data}, {jax.devices()[0].device_kind}"
    )
    for column in ("", "ms", "times the floor"):
        table.add_column(column, justify="left" if not column else "right")
    for name, seconds in rows.items():
        table.add_row(name, f"{1e3 * seconds:.1f}", f"{seconds / least:.2f}")
    console.print(table)
    console.print(
        f"payload ratio {result['payload_ratio']:.1f}, payload {100 * result['sent']:.1f} % full, compiled in "
        f"{result['compile_seconds']:.1f} s, {result['extra_memory'] or 0:.2f} gradients of extra memory; "
        f"select is {rows['select'] / rows['one read pass']:.1f} read passes, "
        f"top_k {rows['lax.top_k'] / rows['select']:.0f} times as long"
    )
    report: dict[str, Any] = {"args": dataclasses.asdict(args), "seconds": rows, "whole": result}
    if args.leaves:
        report["leaves"] = _leaves(args, console)
    if args.grow:
        report["growth"] = _growth(args, console)
    if args.json:
        write_text(json.dumps(report, indent=1, default=str) + "\n", args.json)


def _leaves(args: Args, console: Console) -> dict[str, Any]:
    table = Table(title="many leaves against one of as many elements")
    for column in ("tree", "leaves", "elements", "ms", "times one leaf", "compile, s"):
        table.add_column(column, justify="left" if column == "tree" else "right")
    found = {}
    for name, shapes in trees.TREES.items():
        flat = gradient_of("laplace", trees.elements(shapes()))
        tree = trees.cut(flat, shapes())
        many, one = (whole(g, args.density, args.repeats) for g in (tree, flat))
        found[name] = {"ratio": many["seconds"] / one["seconds"], "compile_seconds": many["compile_seconds"]}
        table.add_row(
            name,
            str(len(tree)),
            f"{flat.size:,}",
            f"{1e3 * many['seconds']:.1f}",
            f"{found[name]['ratio']:.2f}",
            f"{many['compile_seconds']:.1f}",
        )
    console.print(table)
    return found


def _growth(args: Args, console: Console) -> list[dict[str, float]]:
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    lines = []
    for size in SIZES:
        if size * BYTES_NEEDED > free:
            console.print(f"{size:,} elements are left out: they need about {size * BYTES_NEEDED / 1e9:.0f} GB")
            continue
        gradient = gradient_of("laplace", size)
        least = timed(floor, lambda g=gradient: (jnp.copy(g), jnp.zeros_like(g)), args.repeats)  # type: ignore[misc]
        seconds = whole(gradient, args.density, args.repeats)["seconds"]
        lines.append({"elements": size, "floor": least, "whole": seconds})
    table = Table(title="growth")
    for column in ("elements", "floor, ms", "update, ms", "times the floor", "ns an element"):
        table.add_column(column, justify="right")
    for line in lines:
        table.add_row(
            f"{line['elements']:.0e}",
            f"{1e3 * line['floor']:.2f}",
            f"{1e3 * line['whole']:.2f}",
            f"{line['whole'] / line['floor']:.2f}",
            f"{1e9 * line['whole'] / line['elements']:.2f}",
        )
    console.print(table)
    with figures.canvas(1, args.figure) as (axis,):
        sizes = [line["elements"] for line in lines]
        axis.plot(sizes, [1e3 * line["whole"] for line in lines], "o-", label="partition_compress, whole update")
        axis.plot(sizes, [1e3 * line["floor"] for line in lines], "o-", color="#9a9a9a", label="floor")
        axis.set(xscale="log", yscale="log", xlabel="elements", ylabel="ms", title=f"{args.density:.2%} sent")
        axis.legend(frameon=False)
    say(console, f"picture: {args.figure}")
    return lines
