"""Reports, from run folders made here by the run folder's own rules, down to what a browser makes of the page."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

LAYERS = ("Conv_0/kernel", "Conv_0/bias", "Dense_0/kernel", "Dense_0/bias")
SIZES = (288, 32, 59_000, 10)
BINS = 64


def make_run(
    folder: Path,
    method: str = "partition",
    *,
    steps: int = 40,
    every: int = 10,
    planned: int | None = None,
    seed: int = 0,
    ratio: float = 50.0,
    budget: float | None = None,
    layers: tuple[str, ...] = LAYERS,
    data: str = "digits",
    model: str = "conv",
    devices: int = 4,
    quality: float = 0.99,
) -> Path:
    """Write a run folder: smooth curves with noise, whole where as many steps were done as planned."""
    draw = np.random.default_rng(seed + 17 * len(method))
    dense = method == "dense"
    ratio = 1.0 if dense else ratio
    sizes = (SIZES * (len(layers) // len(SIZES) + 1))[: len(layers)]
    parameters = sum(sizes)
    planned = planned or steps
    payload, link = 4.0 * parameters, 4.0 * parameters * 2 * (devices - 1) / devices
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"data": data, "model": model, "steps": planned, "batch": 128}))
    header = {
        "method": method,
        "kind": method.split(":")[0],
        "command": f"python -m train.main --data {data} --seed {seed}",
        "started": "2026-01-02T03:04:05",
        "versions": {"gradpart_jax": "0.1.0", "jax": "0.10.2"},
        "device_kind": "cpu",
        "devices": devices,
        "processes": 1,
        "data": data,
        "model": model,
        "parameters": parameters,
        "segments": list(layers),
        "sizes": list(sizes),
        "seed": seed,
        "budget": budget,
        "dense_payload_bytes": payload,
        "dense_link_bytes": link,
        "expected_payload_bytes": payload / ratio,
    }
    (folder / "run.json").write_text(json.dumps(header))
    metrics, maps, forecasts = [], [], []
    for step in range(1, steps + 1):
        gone = step / planned
        loss = 2.3 * math.exp(-5 * gone) + 0.03 + 0.02 * abs(draw.normal())
        evaluated = step % every == 0 or step == planned
        line = {
            "step": step,
            "loss": loss,
            "accuracy": min(quality * (1 - math.exp(-6 * gone)) + 0.02 * draw.normal(), 1.0),
            "learning_rate": 0.1 * (1 - gone),
            "payload_bytes": step * payload / ratio,
            "link_bytes": step * link / ratio,
            "payload_ratio": 2 * ratio if not dense else 1.0,
            "link_ratio": ratio,
            "sent": parameters / ratio,
            "capacity": parameters // 50,
            "overflow": 0.0 if dense else float(max(0, draw.normal(0, 20))),
            "nonfinite": 0,
            "entropy": 0.0 if dense else 5 - 2 * gone,
            "forecast_error": 0.0 if dense else float(draw.normal(0, 0.05)),
            "memory_norm": 0.0 if dense else 3 * (1 - math.exp(-9 * gone)),
            "seconds": 0.05 * step,
        }
        if evaluated:
            line |= {"test_loss": loss + 0.02, "test_accuracy": quality * (1 - math.exp(-6 * gone))}
        metrics.append(line)
        if dense or not (evaluated or math.log2(step).is_integer()):
            continue
        low = np.asarray([2.0 ** -(5 + at % 7) for at in range(len(layers))]) * math.exp(-gone)
        threshold = np.stack([low, 4 * low], axis=1)
        asked = np.asarray(sizes) / ratio
        maps.append(
            {
                "step": step,
                "threshold": threshold.tolist(),
                "asked": asked.tolist(),
                "realised": (asked * np.exp(draw.normal(0, 0.1, len(layers)))).tolist(),
                "entropy": (5 - 2 * gone + 0.1 * np.arange(len(layers)) % 1.5).tolist(),
            }
        )
        if evaluated and method.startswith("partition"):
            shown = [at for at in np.argsort(sizes)[::-1][:6]]
            edges = np.stack([low[at] * 2.0 ** (np.arange(BINS + 1) / 4 - 12) for at in shown])
            middle = np.arange(BINS)
            bell = np.exp(-0.5 * ((middle - 32) / np.where(middle < 32, 12, 6)) ** 2)
            observed = bell * np.exp(draw.normal(0, 0.1, (len(shown), BINS)))
            forecasts.append(
                {
                    "step": step,
                    "segments": [layers[at] for at in shown],
                    "edges": edges.tolist(),
                    "forecast": np.tile(bell / bell.sum(), (len(shown), 1)).tolist(),
                    "observed": (observed / observed.sum(1, keepdims=True)).tolist(),
                    "threshold": threshold[shown].tolist(),
                }
            )
    for name, lines in (("metrics", metrics), ("layers", maps), ("forecast", forecasts)):
        if lines:
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    times = {"forward_backward": 0.04, "encode": 0.004, "wire": 0.002, "decode": 0.003, "optimizer": 0.001}
    if dense:
        times |= {"encode": 0.0, "wire": 0.02, "decode": 0.0}
    (folder / "phases.json").write_text(json.dumps(times | {"note": "Medians of 20 steps, each phase compiled alone."}))
    if steps == planned:
        summary: dict[str, Any] = {
            **{key: header[key] for key in ("method", "data", "model", "seed", "parameters")},
            **{
                key: metrics[-1][key]
                for key in ("test_loss", "test_accuracy", "payload_bytes", "link_bytes", "seconds")
            },
            "steps": steps,
            "payload_ratio": ratio if dense else 2 * ratio,
            "link_ratio": ratio,
            "status": "finished",
        }
        (folder / "summary.json").write_text(json.dumps(summary))
    return folder
