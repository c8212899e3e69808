"""What each method costs: bytes at equal budgets, and the time of a whole update, by number of devices."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from rich.progress import track

import gradpart_jax as gp
from gradpart_jax import exchange
from train import figures, methods, options, registry
from train.bench import rivals_picture, trees
from train.bench.compress import floor, gradient_of, timed
from train.bench.kept import Row, rows_in
from train.bench.rivals_picture import BUDGETS
from train.config import Exchange
from train.errors import UsageError
from train.labels import Label, parse_label, parse_labels
from train.limits import MANY, within
from train.screen import paper, say

AXIS = "devices"
# Options without which a method has nothing to send, or would be looked at while it still learns
GIVEN = {"threshold": "value=100.0", "lgc": "train_steps=1"}
# Methods whose bytes differ from step to step, and the steps after which they repeat
PERIODS = {"partition": 64, "oktopk": 64}
SETTLED = 5  # updates before anything is timed
WAYS = ("all_gather", "reduce_scatter")  # in which partition is looked at


@dataclasses.dataclass(frozen=True)
class Args:
    """Compare all methods at equal payload bits, and at equal link bits: bytes, and one device's time for an update.

    Timed is what one device does in a step: it encodes its gradient, and decodes what arrives from all. Of collectives
    only their results are there, as if all devices held the same: what the wire takes is counted in bits, not timed.
    """

    devices: str = "2,4,8,64"
    """Numbers of devices."""
    ratio: float = 100.0
    """Payload ratio asked for in the first comparison."""
    budget: float = 30.0
    """Link ratio asked for in the second: how many times fewer bits leave a device than in dense training."""
    methods: str = ",".join(
        [f"partition:exchange={way}" for way in WAYS] + [m for m in registry.METHODS if m != "partition"]
    )
    """Methods, such as partition,topk,powersgd:rank=2."""
    width: int = 512
    """Of the transformer layer whose gradient is exchanged: 12 times its square elements."""
    repeats: int = 5
    """Timings of each, of which the median counts."""
    json: Path | None = None
    """File of the figures; those that it holds already, under the same settings, are not measured again."""
    figure: Path = Path("rivals.png")
    """Picture to draw."""


def alike(devices: int, place: jax.Array) -> SimpleNamespace:
    """Stand in for the collectives among devices that all hold the same.

    Args:
      devices: W.
      place: int32[], which of them this is; in the place of the leader, where there is one.

    Returns:
      What `gradpart_jax.exchange` asks of `jax.lax`.
    """

    def gather(x: jax.Array, axis_name: str) -> jax.Array:
        # Behind the barrier the payloads are not known to be equal, so that each is decoded.
        return jax.lax.optimization_barrier(jnp.broadcast_to(x, (devices, *x.shape)))

    def same(x: Any, *_: Any, **__: Any) -> Any:
        return x

    return SimpleNamespace(
        axis_size=lambda axis_name: devices,
        axis_index=lambda axis_name: place,
        all_gather=gather,
        all_to_all=same,
        pmean=same,
        pmax=same,
        pmin=same,
        psum=same,
    )


def measure(label: Label, ratio: float, devices: int, gradient: Any, repeats: int) -> Row:
    """Update some times as one of several devices.

    Args:
      label: of the method.
      ratio: payload ratio asked for.
      devices: W.
      gradient: a tree.
      repeats: timings; 0 counts bits alone.

    Returns:
      Bits and ratios, means over steps, and median seconds.
    """
    tx = methods.build(label, Exchange(), AXIS, ratio, devices)

    def update(updates: Any, state: Any, place: jax.Array) -> tuple[Any, Any]:
        with mock.patch.object(exchange, "jax", SimpleNamespace(lax=alike(devices, place))):
            return tx.update(updates, state, updates)

    holder, steps, stats = [tx.init(gradient)], 0, []

    def arguments() -> tuple[Any, Any, jax.Array]:
        nonlocal steps
        steps += 1
        return jax.tree.map(jnp.copy, gradient), holder[0], jnp.int32((steps - 1) % devices)

    if not repeats and label.kind not in PERIODS:
        # Of a program that gives nothing but the counts, little is left to compile.
        counted = jax.jit(lambda *given: _bits(update(*given)[1]))(*arguments())
        return _ratios([jax.device_get(counted)])
    compiled = jax.jit(update, donate_argnums=(0, 1))

    def step(*given: Any) -> Any:
        out, holder[0] = compiled(*given)
        return out, holder[0]

    for _ in range(PERIODS.get(label.kind, SETTLED)):
        jax.block_until_ready(step(*arguments()))
        stats.append(jax.device_get(_bits(holder[0])))
    return _ratios(stats) | ({"seconds": timed(step, arguments, repeats)} if repeats else {})


def _bits(state: Any) -> tuple[jax.Array, ...]:
    found = gp.stats(state)
    return found.payload_bits, found.link_bits, found.dense_payload_bits, found.dense_link_bits


def _ratios(counts: list[Any]) -> Row:
    payload, link, dense_payload, dense_link = np.asarray(counts, np.float64).mean(axis=0).tolist()
    return {
        "payload_bits": payload,
        "link_bits": link,
        "payload_ratio": dense_payload / payload,
        "link_ratio": dense_link / link,
    }


def rows_of(args: Args, labels: list[Label], counts: list[int], known: list[Row]) -> Iterator[Row]:
    """Measure method by method, or take what is known.

    Args:
      args: of the command line.
      labels: of the methods.
      counts: of devices.
      known: rows of an earlier run under the same settings.

    Yields:
      Rows.
    """
    shapes = trees.layer(args.width)
    flat = gradient_of("laplace", trees.elements(shapes))
    gradient = trees.cut(flat, shapes)
    found = {(row["method"], row["budget"], row["devices"]): row for row in known}
    for label, budget, devices in itertools.product(labels, BUDGETS, counts):
        key = (label.text, budget, devices)
        if key not in found:
            extra = GIVEN.get(label.kind)
            built = parse_label(f"{label.text}:{extra}") if extra and not label.options else label
            if budget == "payload":
                row = measure(built, args.ratio, devices, gradient, args.repeats)
                row["floor_seconds"] = timed(floor, lambda: (jnp.copy(flat), jnp.zeros_like(flat)), 4 * args.repeats)
            elif label.budgeted:
                wanted = methods.payload_ratio(label, Exchange(), args.budget, devices)
                row = measure(built, max(wanted, 1.0), devices, gradient, 0)
            else:
                row = found[label.text, "payload", devices]
            named = {"method": label.text, "budget": budget, "devices": devices}
            found[key] = named | {"budgeted": label.budgeted} | row | named
        yield found[key]


def main(args: Args) -> None:
    """Measure, print two tables and draw the picture.

    Args:
      args: of the command line.

    Raises:
      UsageError: an option is out of range.
    """
    try:
        counts = [int(number) for number in args.devices.split(",")]
    except ValueError:
        counts = []
    if not counts or not all(2 <= number <= 4096 for number in counts):
        raise UsageError(f"--devices {args.devices} is no list of numbers: give some from 2 to 4096, such as 2,4,8,64")
    within(
        ("--ratio", args.ratio, 1, 10_000),
        ("--budget", args.budget, 1, 10_000),
        ("--width", args.width, 32, 4096),
        ("--repeats", args.repeats, 1, MANY),
    )
    labels = parse_labels(args.methods)
    figures.check(args.figure, args.json)
    settings = {"ratio": args.ratio, "budget": args.budget, "width": args.width}
    known = rows_in(args.json, "rows", ("method", "budget", "devices"), settings)
    rows: list[Row] = []
    total = len(labels) * len(BUDGETS) * len(counts)
    for row in track(rows_of(args, labels, counts, known), "measuring", total, transient=True):
        rows.append(row)
        if args.json:
            kept = [r for r in known if r not in rows]
            options.write_json({"settings": settings, "rows": rows + kept}, args.json)
    console = paper()
    about = f"{12 * args.width**2 / 1e6:.3g} million parameters, {' / '.join(map(str, counts))} devices"
    for shown in rivals_picture.tables(rows, about, args.ratio, args.budget):
        console.print(shown)
    rivals_picture.draw(rows, counts, args.ratio, args.budget, args.figure)
    say(console, f"picture: {args.figure}")
