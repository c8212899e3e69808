"""Pictures of a run, drawn from its files alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np

from train.log import read

COLOURS = {"partition": "#0b6e99", "dense": "#9a9a9a"}
KEY, SPARSE, UNSENT = "#c8553d", "#f0b67f", "#e9eef2"


def draw(folder: Path) -> Path:
    """Draw accuracy against bytes, the ratio over time, and one layer's forecast.

    Args:
      folder: of a run.

    Returns:
      The PNG's path.
    """
    mpl.use("Agg")
    import matplotlib.pyplot as plt

    lines = read(folder / "metrics.jsonl")
    runs = {method: [line for line in lines if line["method"] == method] for method in ("partition", "dense")}
    config = json.loads((folder / "config.json").read_text())
    style: dict[Any, Any] = {
        "axes.spines.top": False,
        "axes.spines.right": False,
        "font.size": 10,
        "axes.titleweight": "bold",
    }
    with plt.rc_context(style):
        figure, axes = plt.subplots(1, 3, figsize=(15, 4.4), layout="constrained")
        _quality(axes[0], runs, text=config["data"] == "stdlib")
        _ratio(axes[1], runs.get("partition", []))
        if (folder / "forecast.npz").exists():
            with np.load(folder / "forecast.npz") as arrays:
                _forecast(axes[2], {key: arrays[key] for key in arrays.files})
        figure.suptitle(f"{config['model']} on {config['data']}, {config['devices']} devices, {config['ratio']:g}x")
        path = folder / "report.png"
        figure.savefig(path, dpi=130)
        plt.close(figure)
    return path


def _quality(axes: Any, runs: dict[str, list[dict[str, Any]]], text: bool) -> None:
    key, factor, name = ("test_loss", 1, "test loss, nats") if text else ("test_accuracy", 100, "test accuracy, %")
    for method, lines in runs.items():
        points = [(line["payload_bytes"] / 1e6, factor * line[key]) for line in lines if key in line]
        if points:
            x, y = zip(*points, strict=True)
            axes.plot(x, y, "o-", ms=4, color=COLOURS.get(method), label=method)
            axes.annotate(f"{y[-1]:.2f}", (x[-1], y[-1]), textcoords="offset points", xytext=(0, 7), ha="center")
    axes.set(xscale="log", xlabel="payload sent by one device, MB", ylabel=name, title="Quality against bytes")
    axes.margins(y=0.15)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, loc="lower right" if not text else "upper right")


def _ratio(axes: Any, lines: list[dict[str, Any]]) -> None:
    steps = [line["step"] for line in lines]
    for key, colour, name in (
        ("payload_ratio", COLOURS["partition"], "payload"),
        ("link_ratio", KEY, "link"),
    ):
        axes.plot(steps, [line[key] for line in lines], color=colour, lw=1.3, label=name)
    axes.set(xlabel="step", ylabel="times fewer bits than dense", title="Compression of each step")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, loc="center right")


def _forecast(axes: Any, shown: dict[str, np.ndarray]) -> None:
    # The layer with most of the budget stands for all
    layer = int(np.argmax(shown["asked"]))
    edges = shown["edges"][layer]
    center = np.sqrt(edges[:-1] * edges[1:])
    begin = np.maximum(edges[np.argmax(shown["observed"][layer] > 1e-4)], edges[0])
    sparse, key = shown["threshold"][layer]
    end = max(edges[-1], key * 2)
    for low, high, colour, name in (
        (begin, sparse, UNSENT, "remembered"),
        (sparse, key, SPARSE, "sparse region"),
        (key, end, KEY, "key region"),
    ):
        if high > low:
            axes.axvspan(low, high, color=colour, alpha=0.45, lw=0, label=name)
    # Bins are not of one width: four of equal length an octave
    octaves = np.log2(edges[1:] / edges[:-1])
    observed, forecast = (np.maximum(shown[key][layer] / octaves, 1e-6) for key in ("observed", "forecast"))
    axes.step(center, observed, where="mid", color="#333333", label="observed")
    axes.plot(center, forecast, color=COLOURS["partition"], lw=2, label="forecast")
    for threshold in (sparse, key):
        axes.axvline(threshold, color="#333333", lw=0.8, ls="--")
    axes.set(xscale="log", yscale="log", xlim=(begin, end), ylim=(1e-5, 1))
    axes.set(
        xlabel="|gradient + memory|",
        ylabel="share of entries an octave",
        title=f"{shown['names'][layer]}, step {shown['step']}",
    )
    axes.legend(frameon=True, framealpha=0.85, fontsize=8, loc="lower left")
