"""Small training runs whose gradients, under error feedback, the predictor is trained and judged on."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import gradpart_jax as gp
from gradpart_jax import predictor, summaries
from gradpart_jax.gradpart import gradpart
from gradpart_jax.segments import Layout, layout_of, ravel, sample_positions
from gradpart_jax.states import CompressState
from train import data, models
from train.errors import UsageError
from train.limits import within
from train.network import score

# Three models to train the predictor on, and one of another kind, on other terms, that it never sees.
TRAINED_ON = ("conv", "mlp", "transformer")
HELD_OUT = "recurrent"


def check(model: str, densities: tuple[float, ...]) -> None:
    """Refuse a model that is unknown, and shares of entries that no payload holds.

    Args:
      model: by name.
      densities: shares of entries sent.

    Raises:
      UsageError: names the option and the remedy.
    """
    known = (*TRAINED_ON, HELD_OUT)
    if model not in known:
        raise UsageError(f"--model {model} is unknown: choose one of {', '.join(known)}")
    if not densities:
        raise UsageError("--densities is empty: give shares such as 0.05 0.01")
    within(*[("--densities", density, 1e-5, 0.4) for density in densities])


class Recurrent(nn.Module):
    """A gated recurrent network that predicts bytes."""

    classes: int

    @nn.compact
    def __call__(self, tokens: jax.Array, train: bool = False) -> jax.Array:
        """Map int32[B, T] to logits float32[B, T, classes]."""
        x = nn.Embed(self.classes, 64)(tokens)
        x = nn.RNN(nn.GRUCell(features=160))(x)
        return nn.Dense(self.classes)(x)


class Task(NamedTuple):
    """A model, its data, and how it is trained."""

    params: Any
    gradient: Callable[[Any, dict[str, np.ndarray]], Any]
    batches: Iterator[dict[str, np.ndarray]]
    optimizer: optax.GradientTransformation


class Trace(NamedTuple):
    """T steps of one run; S segments."""

    summary: summaries.Summary  # [T, ...]: what was known before each step
    mass: jax.Array  # float32[T, S, BINS]: then observed, of |gradient + memory|
    top: jax.Array  # int32[T, S]
    asked: jax.Array  # float32[T]: entries
    raw: jax.Array  # float32[T]: entries over the forecast's thresholds
    sent: jax.Array  # float32[T]: entries in the payload
    bits: jax.Array  # float32[T]: cross-entropy of the observed from the forecast histogram


def task(name: str, seed: int) -> Task:
    """Make one of the runs by name.

    Args:
      name: conv, mlp, transformer or recurrent.
      seed: of parameters and data order.

    Returns:
      Task.
    """
    modules: dict[str, tuple[Callable[[int], nn.Module], str, int, optax.GradientTransformation]] = {
        "conv": (models.Conv, "digits", 32, optax.sgd(0.05, momentum=0.9)),
        "mlp": (models.Perceptron, "digits", 64, optax.adam(1e-3)),
        "transformer": (lambda n: models.Transformer(n, width=64, layers=2), "stdlib", 8, optax.adam(3e-3)),
        "recurrent": (Recurrent, "stdlib", 16, optax.sgd(0.5, momentum=0.9)),
    }
    make, source, size, optimizer = modules[name]
    dataset = data.load(source, None)
    module = make(dataset.classes)
    params = module.init(jax.random.key(seed), dataset.train.read(np.arange(1))["input"])["params"]

    def loss(params: Any, batch: dict[str, jax.Array]) -> jax.Array:
        each, _ = score(module.apply({"params": params}, batch["input"]), batch["label"])
        return jnp.mean(each)

    def gradient(params: Any, batch: dict[str, np.ndarray]) -> Any:
        return jax.grad(loss)(params, jax.tree.map(jnp.asarray, batch))

    clipped = optax.chain(optax.clip_by_global_norm(1.0), optimizer)
    return Task(params, gradient, data.batches(dataset.train, size, seed, 0), clipped)


def bits_for(density: float, layout: Layout) -> float:
    """Find the budget whose payload holds a share of all entries.

    Args:
      density: the share.
      layout: of the gradient.

    Returns:
      Bits per element.
    """
    low, high = 1e-4, 31.0
    for _ in range(40):
        middle = math.sqrt(low * high)
        enough = gradpart(middle).capacity(layout) >= density * layout.elements
        low, high = (low, middle) if enough else (middle, high)
    return high


def record(name: str, density: float, steps: int, seed: int, *, learn_every: int | None = 0) -> Trace:
    """Train under `partition_compress` and keep what the predictor saw and should have said.

    Args:
      name: of the task.
      density: share of the entries sent.
      steps: T.
      seed: of the task.
      learn_every: as in `partition_compress`.

    Returns:
      Trace.
    """
    made = task(name, seed)
    layout = layout_of(made.params)
    exchange = gp.partition_compress(bits_per_element=bits_for(density, layout), learn_every=learn_every)
    positions, owner = (jnp.asarray(x) for x in sample_positions(layout, layout.total))
    everywhere = jnp.ones(owner.shape, bool)

    @jax.jit
    def advance(params: Any, state: CompressState, inner: Any, batch: Any) -> tuple[Any, CompressState, Any, Trace]:
        gradient = made.gradient(params, batch)
        before = state.scheme.shared
        magnitude = jnp.abs(ravel(gradient, layout) + state.memory.residual)[positions]
        top = summaries.top_bin(magnitude, owner, everywhere, layout.segments)
        mass = summaries.histogram(magnitude, owner, everywhere, top, layout.segments)
        mean, state = exchange.update(gradient, state, params)
        updates, inner = made.optimizer.update(mean, inner, params)
        known = summaries.introduce(before.summary, mass, top)  # what the compressor knew
        masses = predictor.forecast(before.weights, known, predictor.DEFAULT_FAMILY).masses(top)
        each = predictor.cross_entropy(mass, masses) / jnp.log(2.0)
        size = jnp.asarray(layout.sizes, jnp.float32)
        forecast = state.stats.threshold[:, 0] * jnp.exp(-state.stats.forecast_error)
        trace = Trace(
            summary=known,
            mass=mass,
            top=top,
            asked=jnp.sum(state.stats.asked),
            raw=jnp.sum((magnitude > forecast[owner]).astype(jnp.float32)),
            sent=state.stats.sent,
            bits=jnp.sum(each * size) / jnp.sum(size),
        )
        return optax.apply_updates(params, updates), state, inner, trace

    params, state, inner = made.params, exchange.init(made.params), made.optimizer.init(made.params)
    kept = []
    for _, batch in zip(range(steps), made.batches, strict=False):
        params, state, inner, trace = advance(params, state, inner, batch)
        kept.append(jax.tree.map(np.asarray, trace))
    return jax.tree.map(lambda *rows: jnp.asarray(np.stack(rows)), *kept)
