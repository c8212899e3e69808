"""`python -m train.pretrain`: record gradient traces, train the predictor on them, and write the shipped weights."""

from __future__ import annotations

import dataclasses
import functools
import json
import shlex
import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from rich.console import Console
from rich.progress import track
from rich.table import Table

from gradpart_jax import predictor, summaries
from gradpart_jax.families import FAMILIES
from train import traces
from train.errors import UsageError, status_of
from train.limits import MANY, within
from train.screen import paper, say


@dataclasses.dataclass(frozen=True)
class Args:
    """Train the forecasting network on gradients of small models under error feedback."""

    densities: tuple[float, ...] = (0.05, 0.01, 0.001)
    """Shares of entries sent, one recorded run of every model for each."""
    record_steps: int = 300
    """Steps of a recorded run."""
    steps: int = 2000
    """Training steps of the network, for each family."""
    batch: int = 512
    """Segments and steps in a training batch."""
    learning_rate: float = 3e-3
    """Peak of a cosine schedule."""
    tail: float = 0.3
    """Weight of the tail's log survival error beside the cross-entropy."""
    seed: int = 0
    """Of the models, the data order and the network."""
    out: Path = Path("weights")
    """Folder that the weights are written to; the package's own are in gradpart_jax/weights."""
    overwrite: bool = False
    """Replace weights that are there."""


class Rows(NamedTuple):
    """What was known, and what was then observed, of N segments and steps."""

    summary: summaries.Summary
    mass: jax.Array  # float32[N, BINS]
    top: jax.Array  # int32[N]


def rows(trace: traces.Trace) -> Rows:
    """Take a trace apart: one row for each segment and step.

    Args:
      trace: [T, S, ...].

    Returns:
      Rows, N = T S.
    """
    count = trace.mass.shape[:2]

    def flat(x: jax.Array, tail: int) -> jax.Array:
        if x.ndim - tail == 1:  # the same for all segments
            x = jnp.broadcast_to(x[:, None], (*count, *x.shape[1:]))
        return x.reshape(-1, *x.shape[2:])

    tails = {"mass": 1, "regression": 1}
    summary = {name: flat(x, tails.get(name, 0)) for name, x in trace.summary._asdict().items()}
    return Rows(summaries.Summary(**summary), flat(trace.mass, 1), flat(trace.top, 0))


def tail_error(weights: Any, data: Rows, name: str) -> jax.Array:
    """Measure log survival's mean squared error around the share that is sent.

    Args:
      weights: of the network.
      data: N rows.
      name: of the family.

    Returns:
      float32[].
    """
    summary, mass, top = data
    total = jnp.sum(mass, axis=1, keepdims=True)
    above = jnp.cumsum(mass[:, ::-1], axis=1)[:, ::-1][:, 1:]
    observed = above / jnp.maximum(total, 1.0)
    expected = predictor.forecast(weights, summary, name).survival(summaries.edges(top)[:, 1:-1])
    share = summary.share[:, None]
    near = (observed > share / 8) & (observed < share * 8)
    weight = jnp.where(near, above / (above + 20.0), 0.0)
    error = jnp.log(jnp.maximum(expected, 1e-9)) - jnp.log(jnp.maximum(observed, 1e-9))
    # Huber's: a row that is far off must not rule
    return jnp.sum(weight * optax.losses.huber_loss(error)) / jnp.maximum(jnp.sum(weight), 1.0)


def fit(args: Args, name: str, data: Rows, console: Console) -> Any:
    """Train one family's network.

    Args:
      args: of the command line.
      name: of the family.
      data: N rows.
      console: to draw on.

    Returns:
      Its parameters.
    """
    weights = predictor.initialise(args.seed, name)
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adam(optax.cosine_decay_schedule(args.learning_rate, args.steps))
    )

    def loss(weights: Any, batch: Rows) -> jax.Array:
        return predictor.loss(weights, *batch, name) + args.tail * tail_error(weights, batch, name)

    @jax.jit
    def advance(carry: tuple[Any, Any], key: jax.Array) -> tuple[Any, Any]:
        weights, state = carry
        chosen = jax.random.randint(key, (args.batch,), 0, data.mass.shape[0])
        batch = jax.tree.map(lambda x: x[chosen], data)
        gradient = jax.tree.map(jnp.nan_to_num, jax.grad(loss)(weights, batch))
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(weights, updates), state

    carry = (weights, optimizer.init(weights))
    keys = jax.random.split(jax.random.key(args.seed + 1), args.steps)
    for key in track(keys, f"{name:<20}", console=console, transient=True):
        carry = advance(carry, key)
    return carry[0]


def measure(weights: Any, data: Rows, name: str) -> tuple[float, float]:
    """Judge weights.

    Args:
      weights: of the network.
      data: N rows.
      name: of the family.

    Returns:
      Cross-entropy in bits, and the tail's error.
    """
    bits = jax.jit(functools.partial(predictor.loss, name=name))(weights, *data) / np.log(2)
    return float(bits), float(jax.jit(functools.partial(tail_error, name=name))(weights, data))


def main(args: Args) -> None:
    """Record, train, judge on the model that was held out, and write.

    Args:
      args: of the command line.

    Raises:
      UsageError: an option is out of range, or the folder holds files.
    """
    traces.check(traces.HELD_OUT, args.densities)
    within(
        ("--record-steps", args.record_steps, 2, 10**6),
        ("--steps", args.steps, 1, 10**7),
        ("--batch", args.batch, 1, 10**6),
        ("--learning-rate", args.learning_rate, 1e-12, 10),
        ("--tail", args.tail, 0, 1e6),
        ("--seed", args.seed, 0, MANY),
    )
    if args.out.exists() and not args.out.is_dir():
        raise UsageError(f"--out {args.out} is a file: give a folder")
    if args.out.exists() and any(args.out.iterdir()) and not args.overwrite:
        raise UsageError(f"--out {args.out} holds files: replace them with --overwrite, or choose another folder")
    console = paper()
    runs = [(name, density) for name in (*traces.TRAINED_ON, traces.HELD_OUT) for density in args.densities]
    recorded: dict[tuple[str, float], Rows] = {}
    for name, density in track(runs, "recording", console=console):
        recorded[name, density] = rows(traces.record(name, density, args.record_steps, args.seed))
    seen, held = (
        jax.tree.map(
            lambda *x: jnp.concatenate(x), *(recorded[run] for run in runs if (run[0] == traces.HELD_OUT) == out)
        )
        for out in (False, True)
    )
    table = Table(title=f"on the held-out model ({traces.HELD_OUT}): cross-entropy, bits, and tail error")
    for column in ("family", "closed form", "network", "tail, closed form", "tail, network"):
        table.add_column(column, justify="left" if column == "family" else "right")
    note: dict[str, Any] = {
        "command": shlex.join(["python", "-m", "train.pretrain", *sys.argv[1:]]),
        "settings": {k: v for k, v in dataclasses.asdict(args).items() if k != "out"},
        "trained_on": traces.TRAINED_ON,
        "held_out": traces.HELD_OUT,
        "held_out_bits_and_tail_error": {},
    }
    args.out.mkdir(parents=True, exist_ok=True)
    for name in FAMILIES:
        weights = fit(args, name, seen, console)
        before = measure(predictor.initialise(args.seed, name), held, name)
        after = measure(weights, held, name)
        table.add_row(name, f"{before[0]:.3f}", f"{after[0]:.3f}", f"{before[1]:.3f}", f"{after[1]:.3f}")
        note["held_out_bits_and_tail_error"][name] = [round(x, 4) for x in after]
        predictor.save(weights, str(args.out / f"{name}.npz"))
    console.print(table)
    (args.out / "training.json").write_text(json.dumps(note, indent=2) + "\n")
    say(console, f"weights and training.json: {args.out}")


if __name__ == "__main__":
    sys.exit(status_of(lambda: main(tyro.cli(Args, prog="python -m train.pretrain"))))
