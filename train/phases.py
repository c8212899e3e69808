"""Where a step's time goes, measured on a run's own model, data and method."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import gradpart_jax as gp
from train import methods, optimizer, step
from train.config import Config
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
    options: dict[str, Any] = {"axis_name": step.AXIS, "devices": list(mesh.devices.flat)}
    placed = step.place(batch, 0, mesh)

    forward = jax.pmap(
        lambda s, b: step.gradient_of(program.network, s, b, key)[0], in_axes=(axes, 0), out_axes=0, **options
    )
    gradient = forward(state, placed)
    times = {"forward_backward": _median(lambda _: forward(state, placed), None)}

    kept, own = state.opt_state[1], axes.opt_state[1]
    payload = float(np.asarray(step.one(gp.stats(kept)).payload_bits))
    exchange = methods.build(program.label, config.exchange, step.AXIS, program.ratio, devices)
    run = jax.pmap(exchange.update, in_axes=(0, own), out_axes=(None, own), donate_argnums=1, **options)
    whole = _median(lambda s: run(gradient, s)[1], _copy(kept))
    wire = _collective(config, program, math.ceil(payload / 32), options)
    encode, decode, way = _split(config, program, gradient, kept, own, whole, wire, options)
    times |= {"encode": encode, "wire": wire, "decode": decode}

    after = optimizer.after_exchange(config, program.label)
    clip = optax.clip_by_global_norm(config.training.clip)

    def apply(gradient: Any, params: Any, inner: Any) -> tuple[Any, Any]:
        clipped, _ = clip.update(gradient, clip.init(params))
        updates, inner = after.update(clipped, inner, params)
        return optax.apply_updates(params, updates), inner

    finish = jax.pmap(apply, in_axes=(0, None, None), out_axes=(0, 0), donate_argnums=2, **options)
    inner = jax.tree.map(np.asarray, step.one(state.opt_state[2]))
    times["optimizer"] = _median(lambda _: finish(gradient, state.params, inner), None)
    return times | {"note": f"{_where(devices)} {way}"}


def _split(
    config: Config, program: Program, gradient: Any, kept: Any, own: Any, whole: float, wire: float, options: Any
) -> tuple[float, float, str]:
    devices = program.mesh.size
    if methods.way(program.label, config.exchange, devices) != "all_gather":
        way = "The wire is the collective alone; the rest of the exchange is counted as encoding."
        return max(0.0, whole - wire), 0.0, way
    if devices == 1:
        return whole, 0.0, "With one device there is no wire, and decoding is counted as encoding."
    solitary = methods.build(program.label, config.exchange, None, program.ratio, 1)
    everywhere = step.place(
        jax.tree.map(
            lambda x, axis: np.broadcast_to(x, (devices, *x.shape)) if axis is None else np.asarray(x),
            jax.tree.map(np.asarray, kept),
            own,
            is_leaf=lambda x: x is None,
        ),
        0,
        program.mesh,
    )
    alone = jax.pmap(solitary.update, in_axes=(0, 0), out_axes=(0, 0), donate_argnums=1, **options)
    single = _median(lambda s: alone(gradient, s)[1], everywhere)
    each = (whole - wire - single) / (devices - 1)
    way = (
        "Encoding and decoding are told apart by a second program, in which each device decodes one payload "
        f"in place of {devices}; the wire is a bare collective of the payload's size."
    )
    if each < 0:
        return single, 0.0, f"{way} Decoding was too short to be told from encoding, and is counted there."
    return max(0.0, single - each), devices * each, way


def _collective(config: Config, program: Program, words: int, options: Any) -> float:
    """Time a collective of so many words, of the method's kind."""
    devices = program.mesh.size
    if devices == 1:
        return 0.0
    gathers = methods.way(program.label, config.exchange, devices) == "all_gather"

    def send(x: jax.Array) -> jax.Array:
        return jax.lax.all_gather(x, step.AXIS) if gathers else jax.lax.psum(x, step.AXIS)

    kind = np.uint32 if gathers else np.float32
    operand = step.place(np.zeros((devices, max(1, words)), kind), 0, program.mesh)
    run = jax.pmap(send, out_axes=None, **options)
    return _median(lambda _: run(operand), None)


def _median(call: Callable[[Any], Any], carry: Any) -> float:
    """Time calls, each given what the one before returned; the first compiles and is not counted."""
    carry = jax.block_until_ready(call(carry))
    times: list[float] = []
    while len(times) < LEAST or (sum(times) < ENOUGH and len(times) < MOST):
        began = time.perf_counter()
        carry = jax.block_until_ready(call(carry))
        times.append(time.perf_counter() - began)
    return float(np.median(times))


def _copy(tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.device_put(jnp.copy(x), x.sharding), tree)


def _where(devices: int) -> str:
    kind = jax.devices()[0]
    text = f"Medians of pieces compiled apart and run on {devices} devices ({kind.device_kind}) at once."
    if kind.platform == "cpu" and devices > 1:
        text += f" These devices share {os.cpu_count()} cores, and their wire is memory: on a network it takes longer."
    return text
