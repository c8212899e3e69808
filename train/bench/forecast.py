"""How well thresholds hit the counts that were asked for, under error feedback, on a model never trained on."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.table import Table

from gradpart_jax import summaries
from gradpart_jax.segments import layout_of, ravel, sample_positions, unravel
from train import figures, traces
from train.bench.thresholds import RIVALS, Rival, cross_entropy
from train.limits import MANY, within
from train.log import write_text
from train.screen import paper, say

SETTLED = 50  # steps after which no step should be far off


@dataclasses.dataclass(frozen=True)
class Args:
    """Judge forecasts: realised over asked-for counts, each method under its own error feedback."""

    densities: tuple[float, ...] = (0.05, 0.01, 0.001)
    """Shares of the entries asked for."""
    steps: int = 300
    """Training steps of each run."""
    model: str = traces.HELD_OUT
    """recurrent, which the shipped predictor was never trained on; or conv, mlp or transformer, which it was."""
    seed: int = 1
    """Of the model and the data order."""
    json: Path | None = None
    """File to write all ratios to."""
    figure: Path = Path("forecast.png")
    """Picture to draw."""


@dataclasses.dataclass(frozen=True)
class Result:
    """One method's run."""

    method: str
    density: float
    ratios: list[float]  # of each step, realised over asked for
    bits: float | None  # mean cross-entropy

    def summary(self) -> dict[str, Any]:
        """Sum the run up."""
        ratio = np.asarray(self.ratios)
        error, late = np.abs(ratio - 1), np.abs(ratio[SETTLED:] - 1)
        low, high = np.quantile(ratio, [0.05, 0.95])
        return {
            "method": self.method,
            "density": self.density,
            "median_error": float(np.median(error)),
            "low": float(low),
            "high": float(high),
            "worst_settled": float(late.max()),
            "share_far_off": float(np.mean(error > 0.2)),
            "share_far_off_settled": float(np.mean(late > 0.2)),
            "bits": self.bits,
        }


def ours(args: Args, density: float) -> list[Result]:
    """Run `partition_compress`: the forecast alone, and what the payload then held.

    Args:
      args: of the command line.
      density: share asked for.

    Returns:
      Two results of the same run.
    """
    trace = traces.record(args.model, density, args.steps, args.seed, learn_every=None)
    raw, sent = (np.asarray(x / trace.asked, float).tolist() for x in (trace.raw, trace.sent))
    bits = float(jnp.mean(trace.bits[SETTLED:]))
    return [
        Result("gradpart, as sent", density, sent, bits),
        Result("gradpart, forecast alone", density, raw, bits),
    ]


def run(args: Args, method: str, make: Callable[[], Rival], kind: str | None, density: float) -> Result:
    """Train with everything above a rival's threshold sent.

    Args:
      args: of the command line.
      method: its name.
      make: of the rival.
      kind: of the distribution that it fits, if it does.
      density: share asked for.

    Returns:
      Result.
    """
    task, rival = traces.task(args.model, args.seed), make()
    layout = layout_of(task.params)
    places, owner = sample_positions(layout, layout.total)
    params, inner, memory = task.params, task.optimizer.init(task.params), np.zeros(layout.total, np.float32)

    @jax.jit
    def gradient(params: Any, batch: Any) -> jax.Array:
        return ravel(task.gradient(params, batch), layout)

    @jax.jit
    def advance(params: Any, inner: Any, sent: jax.Array) -> tuple[Any, Any]:
        updates, inner = task.optimizer.update(unravel(sent, params, layout), inner, params)
        return optax.apply_updates(params, updates), inner

    ratios, bits = [], []
    for number, batch in zip(range(args.steps), task.batches, strict=False):
        vector = np.asarray(gradient(params, batch)) + memory
        values = vector[places]
        magnitude = np.abs(values).astype(np.float64)
        threshold = rival.threshold(values, density)
        ratio = float(np.sum(magnitude > threshold) / max(1, round(density * layout.elements)))
        rival.realised(ratio)
        ratios.append(ratio)
        if kind and number >= SETTLED and number % 10 == 0:
            bits.append(_bits(kind, magnitude, owner, layout.sizes))
        sent = np.where(np.abs(vector) > threshold, vector, 0).astype(np.float32)
        memory = vector - sent
        params, inner = advance(params, inner, jnp.asarray(sent))
    return Result(method, density, ratios, float(np.mean(bits)) if bits else None)


def _bits(kind: str, magnitude: np.ndarray, owner: np.ndarray, sizes: tuple[int, ...]) -> float:
    values, segment = jnp.asarray(magnitude, jnp.float32), jnp.asarray(owner)
    valid = jnp.ones(segment.shape, bool)
    top = summaries.top_bin(values, segment, valid, len(sizes))
    mass = np.asarray(summaries.histogram(values, segment, valid, top, len(sizes)), float)
    edges = np.asarray(summaries.edges(top), float)
    each = [cross_entropy(kind, magnitude[owner == s], mass[s], edges[s]) for s in range(len(sizes))]
    return float(np.average(each, weights=sizes))


def main(args: Args) -> None:
    """Run all methods at all densities, print the table and draw the picture.

    Args:
      args: of the command line.

    Raises:
      UsageError: an option is out of range.
    """
    traces.check(args.model, args.densities)
    within(("--steps", args.steps, SETTLED + 10, 10**6), ("--seed", args.seed, 0, MANY))
    figures.check(args.figure, args.json)
    console = paper()
    results: list[Result] = []
    jobs = len(args.densities) * (1 + len(RIVALS))
    with console.status("compiling ...") as status:
        for density in args.densities:
            status.update(f"{len(results)} of {jobs + len(args.densities)}: gradpart at {density:.1%}")
            results += ours(args, density)
            for method, (make, kind) in RIVALS.items():
                status.update(f"{len(results)} of {jobs + len(args.densities)}: {method} at {density:.1%}")
                results.append(run(args, method, make, kind, density))
    summaries = [result.summary() for result in results]
    table = Table(title=f"realised over asked-for count, {args.model}, {args.steps} steps under error feedback")
    for column in ("method", "asked", "median error", "5-95 %", f"worst after {SETTLED}", "over 20 % off", "bits"):
        table.add_column(column, justify="left" if column == "method" else "right")
    for density in args.densities:
        for row in (s for s in summaries if s["density"] == density):
            table.add_row(
                row["method"],
                f"{density:.1%}",
                f"{row['median_error']:.1%}",
                f"{row['low']:.2f}-{row['high']:.2f}",
                f"{row['worst_settled']:.0%}",
                f"{row['share_far_off_settled']:.0%}",
                "-" if row["bits"] is None else f"{row['bits']:.2f}",
            )
        table.add_section()
    console.print(table)
    if args.json:
        kept = [s | {"ratios": r.ratios} for s, r in zip(summaries, results, strict=True)]
        write_text(json.dumps(kept), args.json)
    _draw(args, results)
    say(console, f"picture: {args.figure}")


def _draw(args: Args, results: list[Result]) -> None:
    with figures.canvas(len(args.densities), args.figure, height=4.6) as axes:
        for axis, density in zip(axes, args.densities, strict=True):
            for i, result in enumerate(r for r in results if r.density == density):
                first = result.method.startswith("gradpart")
                shown = np.clip(result.ratios, 0.01, 100)
                axis.plot(
                    shown, lw=1.8 if first else 0.8, color=f"C{i}", label=result.method, zorder=5 - i if first else 2
                )
            axis.axhspan(0.8, 1.2, color="#000000", alpha=0.06, lw=0)
            axis.set(yscale="log", ylim=(0.01, 100), xlabel="step", title=f"{density:.1%} asked for")
        axes[0].set_ylabel("realised over asked-for count")
        axes[-1].legend(frameon=False, fontsize=7, ncols=2, loc="upper right")
