"""What came of a run."""

from __future__ import annotations

from typing import Any

import numpy as np

FINISHED, DIVERGED = "finished", "diverged"  # status of a summary


def summarise(
    header: dict[str, Any],
    lines: list[dict[str, Any]],
    scores: tuple[float, float] | None,
    warmup: int,
    why: str | None = None,
) -> dict[str, Any]:
    """Sum a run up that has come to an end.

    Args:
      header: of run.json.
      lines: of metrics.jsonl.
      scores: test loss and accuracy at the end; None where training diverged.
      warmup: first steps, up to and with the last that was exchanged uncompressed.
      why: training ended before its last step, where it did.

    Returns:
      The summary, as in summary.json.
    """
    last: dict[str, Any] = lines[-1] if lines else {"step": 0, "payload_bytes": 0.0, "link_bytes": 0.0, "seconds": 0.0}
    loss, accuracy = (None, None) if scores is None else scores
    begun = min(warmup, max(len(lines) - 1, 0))  # steps before the first that counts as steady
    before = lines[begun - 1] if begun else {}

    def ratio(kind: str, before: dict[str, Any]) -> float | None:
        """Say how many times fewer bytes were spent than by dense exchanges; 1 where no bytes are, on one device."""
        spent = last[f"{kind}_bytes"] - before.get(f"{kind}_bytes", 0.0)
        if last["step"] == before.get("step", 0):
            return None
        dense = _dense(header, kind, last["step"]) - _dense(header, kind, before.get("step", 0))
        return dense / spent if spent else 1.0

    forecast = header["kind"] == "partition"
    errors = [abs(np.expm1(line["forecast_error"])) for line in lines[begun:] if line["forecast_error"] is not None]
    return {
        "method": header["method"],
        "data": header["data"],
        "model": header["model"],
        "seed": header["seed"],
        "steps": last["step"],
        "parameters": header["parameters"],
        "test_loss": loss,
        "test_accuracy": accuracy,
        "payload_bytes": last["payload_bytes"],
        "link_bytes": last["link_bytes"],
        "payload_ratio": ratio("payload", {}),
        "link_ratio": ratio("link", {}),
        "steady_payload_ratio": ratio("payload", before),
        "steady_link_ratio": ratio("link", before),
        "forecast_error": float(np.median(errors)) if forecast and errors else None,
        "seconds": last["seconds"],
        "status": FINISHED if why is None else DIVERGED,
    } | ({} if why is None else {"why": why})


def _dense(header: dict[str, Any], kind: str, steps: int) -> float:
    """Count the bytes of so many steps, uncompressed, each over as many devices as it was made by."""
    if kind == "payload":
        return steps * float(header["dense_payload_bytes"])
    resumed = [(start["step"], start["devices"]) for start in header.get("resumed", [])]
    total = 0.0
    # Backwards, for a start may go on from before the last one's beginning, and makes those steps again
    for step, devices in reversed([(0, header.get("began_with", header["devices"])), *resumed]):
        if step < steps:
            total += (steps - step) * header["dense_payload_bytes"] * 2 * (devices - 1) / devices
            steps = step
    return total
