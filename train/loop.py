"""Training as a function of a configuration: what the program, the tests and notebooks call."""

from __future__ import annotations

import functools
import json
import shlex
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console

import gradpart_jax as gp
from train import checkpoint, config, data, log, models, report, step
from train.errors import NonFiniteError, UsageError

EVALUATION_BATCH = 512


def run(settings: config.Config, console: Console) -> list[dict[str, Any]]:
    """Train compressed, then uncompressed, and write the run folder.

    Args:
      settings: filled and checked.
      console: to draw on.

    Returns:
      One summary a method, as in summary.json.

    Raises:
      UsageError: the data set or the devices cannot be had.
      NonFiniteError: the loss is not finite any more.
      KeyboardInterrupt: after a checkpoint was written.
    """
    if len(jax.devices()) < settings.devices:
        raise UsageError(
            f"--devices {settings.devices} is more than the {len(jax.devices())} that JAX finds: use fewer"
        )
    dataset = data.load(settings.data, settings.data_dir)
    folder = settings.folder
    if settings.overwrite and folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config.write(settings, folder / "config.json")
    (folder / "command.txt").write_text(shlex.join(["python", "-m", "train.main", *sys.argv[1:]]) + "\n")
    methods = ["partition", "dense"] if settings.dense_reference else ["partition"]
    summaries = [train(settings, dataset, method, console) for method in methods]
    (folder / "summary.json").write_text(json.dumps(summaries, indent=2) + "\n")
    console.print(log.table(summaries))
    console.print(f"pictures: {report.draw(folder)}")
    return summaries


def train(settings: config.Config, dataset: data.Dataset, method: str, console: Console) -> dict[str, Any]:
    """Train by one method.

    Args:
      settings: filled and checked.
      dataset: to learn.
      method: partition or dense.
      console: to draw on.

    Returns:
      What came of it, with bytes of one device.
    """
    assert settings.model is not None
    assert settings.batch is not None
    assert settings.steps is not None
    folder, devices = settings.folder, settings.devices
    model = models.build(settings.model, dataset.classes)
    tx = step.optimizer(settings, method == "partition")
    first = dataset.train.read(np.arange(1))["input"]
    params = model.init(jax.random.key(settings.seed), first)["params"]
    state = step.State(params, tx.init(params))
    axes, mesh = step.axes_of(state), step.mesh_of(devices)
    state = step.spread_out(state, axes, devices)
    names = gp.segment_names(params)
    elements = sum(x.size for x in jax.tree.leaves(params))
    console.print(
        f"[bold]{method}[/]: {settings.model} of {elements:,} parameters on {settings.data}, {devices} devices, "
        f"batch {settings.batch}, {settings.steps} steps, "
        f"about {log.amount(4 * elements / (settings.ratio if method == 'partition' else 1))} a step and device"
    )
    saved = checkpoint.Checkpoints(folder / "checkpoints" / method)
    done = 0
    if settings.resume:
        found = saved.restore(state, lambda text: console.print(f"[yellow]{text}[/]"))
        if found:
            done, state = found
            console.print(f"resumed at step {done}")
    state = step.place(state, axes, mesh)
    advance = step.make_step(model, tx, axes, mesh)
    evaluate = jax.jit(functools.partial(step.losses, model))
    path = folder / "metrics.jsonl"
    past = [line for line in log.read(path, method) if line["step"] <= done]
    payload, link, seconds = (past[-1][k] if past else 0.0 for k in ("payload_bytes", "link_bytes", "seconds"))
    batches = data.batches(dataset.train, settings.batch, settings.seed, done)
    began = time.perf_counter() - seconds
    scores = _evaluate(evaluate, _one(state.params), dataset.test) if done else (float("nan"), float("nan"))
    with log.Log(path, console, method, done, settings.steps) as out:
        try:
            while done < settings.steps:
                batch = {k: v.reshape(devices, -1, *v.shape[1:]) for k, v in next(batches).items()}
                state, metrics = advance(state, step.place(batch, 0, mesh))
                stats = jax.tree.map(np.asarray, _one(gp.stats(state.opt_state)))
                loss, accuracy = float(metrics["loss"]), float(metrics["accuracy"])
                done += 1
                if not np.isfinite(loss):
                    raise NonFiniteError(f"the loss of step {done} ({method}) is {loss}: lower --learning-rate")
                payload += float(stats.payload_bits) / 8
                link += float(stats.link_bits) / 8
                line = {
                    "step": done,
                    "loss": loss,
                    "accuracy": accuracy,
                    "payload_bytes": payload,
                    "link_bytes": link,
                    "payload_ratio": float(stats.payload_ratio),
                    "link_ratio": float(stats.link_ratio),
                    "sent": float(stats.sent),
                    "capacity": int(stats.capacity),
                    "overflow": float(stats.overflow),
                    "nonfinite": int(stats.nonfinite),
                    "entropy": float(stats.entropy),
                    "forecast_error": float(stats.forecast_error),
                    "seconds": time.perf_counter() - began,
                }
                if done % settings.eval_every == 0 or done == settings.steps:
                    scores = _evaluate(evaluate, _one(state.params), dataset.test)
                    line |= {"test_loss": scores[0], "test_accuracy": scores[1]}
                    # Of the first half: a trained model has next to no gradient left to show.
                    if method == "partition" and (done <= settings.steps / 2 or not (folder / "forecast.npz").exists()):
                        _keep_forecast(folder, state.opt_state, names, settings.family, done)
                out.write(line)
                out.show(
                    done,
                    f"loss {loss:.3f} acc {accuracy:4.0%} {line['payload_ratio']:.0f}x over {line['overflow']:.0f}",
                )
                if settings.checkpoint_every and done % settings.checkpoint_every == 0:
                    saved.save(done, state)
        except KeyboardInterrupt:
            if settings.checkpoint_every:
                saved.save(done, state)
                console.print(f"interrupted after step {done}; go on with --resume")
            raise
    if settings.checkpoint_every:
        saved.save(done, state)
    saved.close()
    return _summary(settings, method, elements, path, scores)


def _summary(
    settings: config.Config, method: str, elements: int, path: Path, scores: tuple[float, float]
) -> dict[str, Any]:
    lines = log.read(path, method)
    last, devices = lines[-1], settings.devices
    dense_payload = 4.0 * elements * last["step"]
    dense_link = dense_payload * 2 * (devices - 1) / devices
    steady = lines[min(settings.warmup_steps, len(lines) - 1) :]
    errors = [abs(np.expm1(line["forecast_error"])) for line in steady]
    bits = {k: float(np.mean([1 / line[k] for line in steady])) for k in ("payload_ratio", "link_ratio")}
    return {
        "method": method,
        "data": settings.data,
        "seed": settings.seed,
        "steps": last["step"],
        "parameters": elements,
        "test_loss": scores[0],
        "test_accuracy": scores[1],
        "payload_bytes": last["payload_bytes"],
        "link_bytes": last["link_bytes"],
        "payload_ratio": dense_payload / last["payload_bytes"],
        "link_ratio": dense_link / last["link_bytes"] if last["link_bytes"] else 1.0,
        "steady_payload_ratio": 1 / bits["payload_ratio"],
        "steady_link_ratio": 1 / bits["link_ratio"],
        "forecast_error": float(np.median(errors)),
        "seconds": last["seconds"],
    }


def _one(tree: Any) -> Any:
    # A replica's own shard: indexing a pmapped array would gather it from all devices.
    return jax.tree.map(lambda x: x.addressable_shards[0].data if isinstance(x, jax.Array) else x, tree)


def _evaluate(evaluate: Any, params: Any, test: data.Split) -> tuple[float, float]:
    size = min(EVALUATION_BATCH, test.size)
    starts = range(0, test.size - size + 1, size)
    scores = [evaluate(params, test.read(np.arange(at, at + size))) for at in starts]
    rest = test.size % size
    if rest:
        scores += [evaluate(params, test.read(np.arange(test.size - rest, test.size)))]
    weights = [size] * len(starts) + [rest] * bool(rest)
    loss, accuracy = (float(np.average([float(s[k]) for s in scores], weights=weights)) for k in (0, 1))
    return loss, accuracy


def _keep_forecast(folder: Path, opt_state: Any, names: tuple[str, ...], family: str, done: int) -> None:
    state = jax.device_put(jax.tree.map(np.asarray, _one(opt_state)))
    arrays: dict[str, Any] = {key: np.asarray(value) for key, value in gp.inspect(state, family)._asdict().items()}
    asked = np.asarray(gp.stats(state).asked)
    np.savez(folder / "forecast.npz", names=np.asarray(names), asked=asked, step=done, **arrays)
