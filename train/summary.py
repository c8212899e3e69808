"""What came of a run."""

from __future__ import annotations

from typing import Any

import numpy as np


def summarise(
    header: dict[str, Any], lines: list[dict[str, Any]], scores: tuple[float, float], warmup_steps: int
) -> dict[str, Any]:
    """Sum a finished run up.

    Args:
      header: of run.json.
      lines: of metrics.jsonl.
      scores: test loss and accuracy at the end.
      warmup_steps: first steps exchanged uncompressed.

    Returns:
      The summary, as in summary.json.
    """
    last = lines[-1]
    steady = lines[min(warmup_steps, len(lines) - 1) :]
    before = lines[min(warmup_steps, len(lines) - 1) - 1] if warmup_steps and len(lines) > 1 else {}
    ratios = {}
    for kind in ("payload", "link"):
        spent = last[f"{kind}_bytes"] - before.get(f"{kind}_bytes", 0.0)
        dense = header[f"dense_{kind}_bytes"] * (last["step"] - before.get("step", 0))
        ratios[kind] = _times(dense, spent)
    forecast = header["kind"] == "partition"
    errors = [abs(np.expm1(line["forecast_error"])) for line in steady if line["forecast_error"] is not None]
    return {
        "method": header["method"],
        "data": header["data"],
        "model": header["model"],
        "seed": header["seed"],
        "steps": last["step"],
        "parameters": header["parameters"],
        "test_loss": scores[0],
        "test_accuracy": scores[1],
        "payload_bytes": last["payload_bytes"],
        "link_bytes": last["link_bytes"],
        "payload_ratio": _times(header["dense_payload_bytes"] * last["step"], last["payload_bytes"]),
        "link_ratio": _times(header["dense_link_bytes"] * last["step"], last["link_bytes"]),
        "steady_payload_ratio": ratios["payload"],
        "steady_link_ratio": ratios["link"],
        "forecast_error": float(np.median(errors)) if forecast and errors else None,
        "seconds": last["seconds"],
        "status": "finished",
    }


def _times(dense: float, spent: float) -> float:
    """Say how many times fewer bytes were spent; 1 where none were."""
    return dense / spent if spent else 1.0
