"""Where a step's time goes, measured on a run's own model, data and method."""

from __future__ import annotations

import math
import os
import time
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import gradpart_jax as gp
from gradpart_jax.placement import each_leaf
from gradpart_jax.states import find_state
from train import hosts, methods, optimizer, step
from train.config import Config, change
from train.placing import AXIS, one, place, rows, spread_out
from train.program import Program

LEAST, MOST = 3, 50  # calls timed of each piece
ENOUGH = 1.0  # seconds spent on a piece after which LEAST calls are enough


def measure(config: Config, program: Program, state: step.State, batch: dict[str, np.ndarray]) -> dict[str, Any]:
    """Time the pieces of a step, each compiled on its own and run on all devices at once.

    Forward and backward pass, the whole exchange, a bare collective on as many bytes, and the optimizer are timed as
    they are. Encoding and decoding cannot be run apart for any method whatever; but the same exchange compiled for one
    device alone encodes once and decodes one payload where the real one decodes all W: the difference of the two,
    without the collective, is W - 1 decodings.

    Args:
      config: settled.
      program: of the run.
      state: placed; it stays as it is.
      batch: with leading axes of devices and parts.

    Returns:
      Medians in seconds, and how they were measured, as in phases.json.
    """
    mesh, devices = program.mesh, program.mesh.size
    axes, key = program.axes, jax.random.key(0)
    placed = place(batch, 0, mesh)

    forward = gp.over_devices(lambda s, b: step.gradient_of(program.network, s, b, key)[0], mesh, AXIS, (axes, 0), 0)
    gradient = forward(state, placed)
    times = {"forward_backward": _median(lambda _: forward(state, placed), None)}

    config = methods.tuned(config, program.label)
    every = config.exchange.local_steps
    kept, own = find_state(state.opt_state), find_state(axes.opt_state)
    exchange = methods.build(program.label, config.exchange, AXIS, program.ratio, devices)
    run = gp.over_devices(exchange.update, mesh, AXIS, (0, own), (None, own), donate_argnums=1)
    met = run(gradient, _copy(kept))[1]  # of the last step nothing may have been sent
    payload = float(np.asarray(one(gp.stats(met)).payload_bits))
    whole = _median(lambda s: run(gradient, s)[1], met)
    wire = _collective(config, program, math.ceil(payload / 32))
    encode, decode, way = _split(config, program, gradient, kept, own, whole, wire)
    times |= {"encode": encode / every, "wire": wire / every, "decode": decode / every}
    if every > 1:
        way += f" Of an exchange, which there is each {every} steps, a step's share is shown."

    shared = jax.tree.map(np.asarray, one(gp.agreed(state.params, state.opt_state)))
    # Where all is sent there is nothing to keep, and how gradients agree is told by a collective
    without = change(config, keep_own=None, agreement=0.0)
    rest = optimizer.build(without, program.label, optax.identity(), program.ratio)

    def apply(gradient: Any, held: tuple[Any, Any]) -> tuple[Any, Any]:
        params, inner = held
        updates, inner = rest.update(gradient, inner, params)
        return gp.apply_updates(params, updates, inner), inner

    finish = gp.over_devices(apply, mesh, AXIS, (0, 0), 0, donate_argnums=1)
    held = spread_out((shared, rest.init(shared)), 0, devices // hosts.count())
    times["optimizer"] = _median(lambda held: finish(gradient, held), place(held, 0, mesh))
    return times | {"note": f"{_where(devices)} {way}"}


def _split(
    config: Config,
    program: Program,
    gradient: Any,
    kept: gp.CompressState,
    own: gp.CompressState,
    whole: float,
    wire: float,
) -> tuple[float, float, str]:
    devices = program.mesh.size
    if methods.way(program.label, config.exchange, devices) != "all_gather":
        way = "The wire is the collective alone; the rest of the exchange is counted as encoding."
        return max(0.0, whole - wire), 0.0, way
    if devices == 1:
        return whole, 0.0, "With one device there is no wire, and decoding is counted as encoding."
    solitary = methods.build(program.label, config.exchange, None, program.ratio, 1)
    here = devices // hosts.count()
    everywhere = each_leaf(lambda x, axis: np.broadcast_to(x, (here, *x.shape)) if axis is None else x, rows(kept), own)
    alone = gp.over_devices(solitary.update, program.mesh, AXIS, (0, 0), (0, 0), donate_argnums=1)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "axis_name=None")  # each device by itself is what is to be timed
        single = _median(lambda s: alone(gradient, s)[1], place(everywhere, 0, program.mesh))
    encode, decode = _told_apart(max(0.0, whole - wire), single, devices)
    way = (
        "Encoding and decoding are told apart by a second program, in which each device decodes one payload "
        f"in place of {devices}; the wire is a bare collective of the payload's size."
    )
    if not decode:
        way += " Decoding was too short to be told from encoding, and is counted there."
    return encode, decode, way


def _told_apart(exchange: float, single: float, devices: int) -> tuple[float, float]:
    """Part an exchange, of an encoding and W decodings, by one of a single decoding.

    >>> _told_apart(5.0, 2.0, 4), _told_apart(1.0, 2.0, 4), _told_apart(9.0, 1.0, 2)
    ((1.0, 4.0), (1.0, 0.0), (0.0, 9.0))
    """
    each = (exchange - single) / (devices - 1)
    encode = exchange if each < 0 else max(0.0, single - each)  # which, by chance, a timing can be beyond
    return encode, exchange - encode


def _collective(config: Config, program: Program, words: int) -> float:
    """Time a collective of so many words, of the method's kind."""
    devices = program.mesh.size
    if devices == 1:
        return 0.0
    gathers = methods.way(program.label, config.exchange, devices) == "all_gather"

    def send(x: jax.Array) -> jax.Array:
        return jax.lax.all_gather(x, AXIS) if gathers else jax.lax.psum(x, AXIS)

    kind = np.uint32 if gathers else np.float32
    operand = place(np.zeros((devices // hosts.count(), max(1, words)), kind), 0, program.mesh)
    run = gp.over_devices(send, program.mesh, AXIS, (0,), None)
    return _median(lambda _: run(operand), None)


def _median(call: Callable[[Any], Any], carry: Any) -> float:
    """Time calls, each given what the one before returned; the first compiles and is not counted."""
    carry = jax.block_until_ready(call(carry))
    times: list[float] = []
    # Collectives want as many calls on each process: process 0 says how many
    calls = LEAST
    while len(times) < calls:
        began = time.perf_counter()
        carry = jax.block_until_ready(call(carry))
        times.append(time.perf_counter() - began)
        if len(times) == LEAST:
            calls = hosts.lead(lambda: int(np.clip(LEAST * ENOUGH / sum(times), LEAST, MOST)), "the timing of a step")
    return float(np.median(times))


def _copy(tree: Any) -> Any:
    # Placed as it was: else the first call, which is given it, is compiled apart from those that follow
    shardings = jax.tree.map(lambda x: x.sharding, tree)
    return jax.jit(lambda tree: jax.tree.map(jnp.copy, tree), out_shardings=shardings)(tree)


def _where(devices: int) -> str:
    kind = jax.devices()[0]
    text = f"Medians of pieces compiled apart and run on {devices} devices ({kind.device_kind}) at once."
    if kind.platform == "cpu" and devices > 1:
        text += f" These devices share {os.cpu_count()} cores, and their wire is memory: on a network it takes longer."
    return text
