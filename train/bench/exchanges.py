"""Link bits and step time of each way of exchange against the number of devices: measured, and foretold."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import os
import re
import statistics
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import gradpart_jax as gp
from gradpart_jax.costs import Calibration, Link
from gradpart_jax.planner import duration, estimate
from gradpart_jax.segments import layout_of
from gradpart_jax.sizes import settled
from train import figures, options
from train.bench.exchanges_picture import MODELLED, WAYS, draw, tables
from train.bench.kept import rows_in
from train.calibration import calibration_of
from train.errors import UsageError
from train.limits import MANY, within
from train.screen import paper, say

CHIPS = 2  # of a host, in "hierarchical"


@dataclasses.dataclass(frozen=True)
class Args:
    """Measure exchanges on virtual devices, and foretell them to 10,000 devices."""

    elements: int = 500_000
    """Of the gradient."""
    ratio: float = 100.0
    """Payload ratio."""
    devices: tuple[int, ...] = (2, 4, 8, 16)
    """Numbers of virtual devices to measure."""
    ways: tuple[str, ...] = WAYS
    """Ways of exchange to measure."""
    repeats: int = 9
    """Timings, of which the median counts."""
    link_mbit: float = 100.0
    """Of the links for which a step is foretold."""
    latency_ms: float = 1.0
    """Of those links."""
    calibration: Path | None = None
    """File of `python -m train.bench calibrate`, made on this machine."""
    json: Path | None = None
    """File of the figures; rows that it holds already are not measured again."""
    figure: Path = Path("exchanges.png")
    """Picture to draw."""


def carried(text: str) -> float:
    """Add up what the collectives of a compiled program put on the link, by their algorithms.

    Args:
      text: of the program.

    Returns:
      Bits that leave one device: (W - 1) times the operand of an all-gather, 2 (W - 1) / W of an all-reduce's,
      (W - 1) / W of an all-to-all's.

    Raises:
      ValueError: there is a collective of another kind.

    >>> carried("a = u32[4,10]{1,0} all-gather(b), replica_groups=[1,4]<=[4]")
    960.0
    """
    if others := re.findall(r"(?:reduce-scatter|collective-permute|collective-broadcast)\(", text):
        raise ValueError(f"{others[0]} is not accounted for")
    bits = 0.0
    for line in text.splitlines():
        found = re.search(r"= (.*?) (all-gather|all-reduce|all-to-all)\(", line)
        if found is None:
            continue
        kind = found[2]
        shapes = re.findall(r"(?:u|s|f|pred)(\d*)\[([\d,]*)\]", found[1])
        size = float(sum(int(width or 8) * math.prod(int(n) for n in dims.split(",") if n) for width, dims in shapes))
        groups = re.search(r"replica_groups=(?:\[\d+,(\d+)\]|\{\{([\d,]+)\})", line)
        assert groups is not None, line
        devices = int(groups[1]) if groups[1] else groups[2].count(",") + 1
        share = (devices - 1) / devices
        bits += size * share * (2 if kind == "all-reduce" else 1)
    return bits


def compressor(way: str, devices: int, ratio: float) -> optax.GradientTransformationExtraArgs:
    """Make the transformation of one way of exchange on a mesh of hosts and chips.

    Args:
      way: one of WAYS.
      devices: hosts.
      ratio: payload ratio.

    Returns:
      The transformation.
    """
    if way == "dense":
        return gp.dense_mean("hosts")
    if way == "hierarchical":
        return gp.partition_compress("hosts", inner_axis="chips", ratio=ratio, exchange="auto", devices=devices)
    return gp.partition_compress("hosts", ratio=ratio, exchange=way, devices=devices)


def measure(way: str, devices: int, elements: int, ratio: float, repeats: int) -> dict[str, Any]:
    """Run one way of exchange on virtual devices.

    Args:
      way: one of WAYS.
      devices: W, at most as many as there are.
      elements: of the gradient.
      ratio: payload ratio.
      repeats: timings.

    Returns:
      A row of figures.
    """
    chips = CHIPS if way == "hierarchical" else 1
    hosts = devices // chips
    mesh = jax.make_mesh(
        (hosts, chips), ("hosts", "chips"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:devices]
    )
    tx = compressor(way, hosts, ratio)
    like = jax.ShapeDtypeStruct((elements,), jnp.float32)
    specs = gp.state_specs(jax.eval_shape(tx.init, like), "hosts")
    own = P(("hosts", "chips"))
    mapped = functools.partial(jax.shard_map, mesh=mesh, check_vma=False)
    state = jax.jit(mapped(lambda: tx.init(jnp.zeros(elements)), in_specs=(), out_specs=specs))()
    gradients = jax.device_put(
        jax.random.laplace(jax.random.key(0), (devices, elements)) ** 3, NamedSharding(mesh, own)
    )

    def update(gradient: jax.Array, state: Any) -> tuple[jax.Array, Any]:
        return tx.update(gradient[0], state)

    step = jax.jit(mapped(update, in_specs=(own, specs), out_specs=(P(), specs)), donate_argnums=1)
    compiled = step.lower(gradients, state).compile()
    _, state = compiled(gradients, state)
    first = gp.stats(state)  # the first step has its histogram, and so runs every collective of the program
    seconds = []
    for _ in range(3 + repeats):
        began = time.perf_counter()
        out, state = jax.block_until_ready(compiled(gradients, state))
        seconds.append(time.perf_counter() - began)
    copies = [shard.data for shard in out.addressable_shards]
    if any((copy != copies[0]).any() for copy in jax.device_get(copies)):
        raise AssertionError(f"{way} on {devices} devices: replicas differ")
    last, counted, found = gp.stats(state), float(first.link_bits + first.inner_bits), carried(compiled.as_text() or "")
    if not math.isclose(counted, found, rel_tol=1e-5):
        raise AssertionError(f"{way} on {devices} devices counts {counted:.0f} bits, its collectives carry {found:.0f}")
    return {
        "way": way,
        "devices": devices,
        "elements": elements,
        "ratio": ratio,
        "payload_bits": float(last.payload_bits),
        "link_bits": float(last.link_bits),
        "inner_bits": float(last.inner_bits),
        "first_bits": counted,
        "compiled_bits": found,
        "seconds": statistics.median(seconds[3:]),
    }


def foretold(row: dict[str, Any], one: Calibration, added: float) -> float:
    """Foretell a step on virtual devices: they share this machine's cores, and its memory is their link.

    Args:
      row: of `measure`.
      one: what coding takes on this machine.
      added: seconds that this machine takes for a bit of one device's all-reduce, by the dense sum of two devices.

    Returns:
      Seconds.
    """
    devices, way = row["devices"], row["way"]
    layout = layout_of(jax.ShapeDtypeStruct((row["elements"],), jnp.float32))
    chips = CHIPS if way == "hierarchical" else 1
    exchange = settled("auto", devices // chips) if chips > 1 else way
    found = estimate(layout, exchange, row["ratio"], devices // chips, Link(1 / added), one)
    fixed = one.fixed if way != "dense" else 0.0
    cores = min(devices, os.cpu_count() or 1)
    return devices * (found.code_s - fixed + fixed / cores + found.link_s + row["inner_bits"] * added)


def modelled(way: str, devices: int, args: Args, calibration: Calibration) -> tuple[float, float]:
    """Foretell one way of exchange on real links.

    Args:
      way: one of WAYS.
      devices: W.
      args: of the command line.
      calibration: what coding takes.

    Returns:
      Bits that leave a device (a host, if there are several chips), and seconds of a step without computing.
    """
    layout = layout_of(jax.ShapeDtypeStruct((args.elements,), jnp.float32))
    hosts = devices // CHIPS if way == "hierarchical" else devices
    exchange = settled("auto", hosts) if way == "hierarchical" else way
    link = Link(args.link_mbit * 1e6, args.latency_ms * 1e-3)
    found = estimate(layout, exchange, args.ratio, hosts, link, calibration)
    return found.link_bits, found.step_s


def check(args: Args) -> None:
    """Refuse what cannot be measured, and files that cannot be written.

    Args:
      args: of the command line.

    Raises:
      UsageError: an option is out of range.
    """
    if unknown := [way for way in args.ways if way not in WAYS]:
        raise UsageError(f"--ways {unknown[0]} is unknown: choose among {', '.join(WAYS)}")
    for option, values in (("--ways", args.ways), ("--devices", args.devices)):
        if not values:
            raise UsageError(f"{option} is empty: give at least one")
    if wrong := [n for n in args.devices if not 2 <= n <= 64 or n % CHIPS]:
        raise UsageError(f"--devices {wrong[0]} is out of range: give even numbers from 2 to 64")
    within(
        ("--elements", args.elements, 10_000, 10**8),
        ("--ratio", args.ratio, 1, 10_000),
        ("--repeats", args.repeats, 1, MANY),
        ("--link-mbit", args.link_mbit, 1e-3, 1e9),
        ("--latency-ms", args.latency_ms, 0, 1e6),
    )
    figures.check(args.figure, args.json)


def main(args: Args) -> None:
    """Measure what is not measured yet, print the table, and draw the picture.

    Args:
      args: of the command line.

    Raises:
      UsageError: an option is out of range.
    """
    check(args)
    calibrated = calibration_of(args.calibration)
    kept = rows_in(args.json, "measured", ("elements", "ratio", "way", "devices", "seconds", "link_bits"))
    with contextlib.suppress(RuntimeError):  # where JAX has started already there are as many as there are
        jax.config.update("jax_num_cpu_devices", max(args.devices))
    if max(args.devices) > len(jax.devices()):
        raise UsageError(
            f"--devices {max(args.devices)} is more than the {len(jax.devices())} that JAX finds: use fewer"
        )
    console = paper()
    rows = [row for row in kept if (row["elements"], row["ratio"]) == (args.elements, args.ratio)]
    others = [row for row in kept if row not in rows]

    def write(**more: Any) -> None:
        if args.json:
            given = {key: str(x) if isinstance(x, Path) else x for key, x in dataclasses.asdict(args).items()}
            found = {"args": given, "calibration": calibrated._asdict(), "measured": rows + others}
            options.write_json(found | more, args.json)

    for devices in sorted(args.devices):
        for way in args.ways:
            known = any((row["way"], row["devices"]) == (way, devices) for row in rows)
            if known or (way == "hierarchical" and devices <= CHIPS):
                continue
            rows.append(measure(way, devices, args.elements, args.ratio, args.repeats))
            write()  # after each: an interrupted run loses none
            console.print(f"{way}, {devices} devices: {duration(rows[-1]['seconds'])}")
    rows.sort(key=lambda row: (row["devices"], WAYS.index(row["way"])))
    base = next((row for row in rows if row["way"] == "dense"), None)
    for row in rows if base else ():
        assert base is not None
        # A dense step of the fewest devices says what a bit of an all-reduce takes here, adding included.
        spent = base["seconds"] / base["devices"] - calibrated.added * args.elements
        row["foretold"] = foretold(row, calibrated, max(spent, 1e-9) / base["link_bits"])
    future = [
        {
            "way": way,
            "devices": n,
            **dict(zip(("link_bits", "seconds"), modelled(way, n, args, calibrated), strict=True)),
        }
        for n in MODELLED
        for way in WAYS
        if n > CHIPS or way != "hierarchical"
    ]
    links = f"{args.link_mbit:g} Mbit/s, {args.latency_ms:g} ms"
    for table in tables(rows, future, f"{args.elements:,} elements, payload ratio {args.ratio:g}", links):
        console.print(table)
    write(foretold=future)
    draw(rows, future, args.devices, links, args.figure)
    say(console, f"picture: {args.figure}")
