"""Compressors ready to chain: one call from arguments to an optax transformation."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from gradpart_jax import predictor, summaries
from gradpart_jax.baselines.dense import dense
from gradpart_jax.checks import check_integer, check_number
from gradpart_jax.codecs import WIDEST_VALUE
from gradpart_jax.exchange import AxisName
from gradpart_jax.families import family as find_family
from gradpart_jax.gradpart import gradpart
from gradpart_jax.outlook import GradpartState
from gradpart_jax.sizes import EXCHANGES
from gradpart_jax.states import find_state
from gradpart_jax.transform import compress

# The arguments that size buffers or choose code, for `optax.inject_hyperparams(..., static_args=gp.STATIC_ARGS)`
STATIC_ARGS = (
    "axis_name",
    "inner_axis",
    "model_axis",
    "bits_per_element",
    "ratio",
    "warmup_steps",
    "learn_every",
    "seed",
    "family",
    "entropy_rule",
    "key_bits",
    "rungs",
    "error_feedback",
    "exchange",
    "devices",
)
DEFAULT_BITS = 0.32


def partition_compress(
    axis_name: AxisName = None,
    *,
    inner_axis: AxisName = None,
    model_axis: AxisName = None,
    bits_per_element: float | None = None,
    ratio: float | None = None,
    momentum: float | jax.Array | None = None,
    memory_decay: float | jax.Array = 1.0,
    memory_allowance: float | jax.Array = 0.0,
    warmup_steps: int = 0,
    learn_every: int | None = None,
    seed: int | None = None,
    family: str = predictor.DEFAULT_FAMILY,
    entropy_rule: str = "entropy",
    key_bits: int | None = None,
    rungs: int = 1,
    error_feedback: bool | str = True,
    exchange: str = "all_gather",
    devices: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Exchange gradients as forecast, partitioned, entropy-thresholded sparse payloads: 100 times fewer bytes.

    A small network forecasts, from earlier steps, how |gradient + memory| is distributed in each leaf. The forecast's
    entropy shares the budget among the leaves; its quantiles set a threshold for each; what lies above is parted into
    a key region (coded by sign and logarithmic level) and a sparse region (by sign and one level), and exchanged as
    fixed-capacity payloads of static size. What is not sent is remembered (see `compress`).

    It follows the abstract of Guo, Liu and Zhang, Sensors 2021, 21(6), 1943; what goes beyond it is this package's own.

    Order: local gradient, clip, this, optimizer. Under `jax.shard_map(check_vma=True)` see the warning in `compress`.

    Args:
      axis_name: the mapped axis (or tuple of axes) of pmap, vmap or shard_map; None is one device alone, with a
        warning where pmap or shard_map have several.
      inner_axis: a fast axis that gradients are averaged over first, uncompressed, such as the chips of a host.
      model_axis: the axis over which parameters are sharded; for both see `compress`.
      bits_per_element: budget of payload bits an element, everything counted: indices, values, header, padding and
        statistics (averaged over steps; dense warm-up not included). In (0, 32]; 0.32 if neither this nor ratio is
        given. A tree so small that no payload is smaller than itself is exchanged dense.
      ratio: the same said otherwise, 32 / bits_per_element, at least 1. Payloads hold half of the entries at most, so
        that above 1 it is never less than about 6.
      momentum: of momentum correction, in [0, 1); None for none.
      memory_decay: what the memory is multiplied by each step, in (0, 1].
      memory_allowance: how many times more than once what opposes the memory counts, at least 0 (see `compress`).
      warmup_steps: first steps that are exchanged dense.
      learn_every: steps between two histograms, each of which trains the predictor by one step and costs
        65 words a leaf; None chooses so that they take at most 3 % of the budget, 0 does not train.
      seed: None starts from the shipped weights; a number from a fresh network.
      family: of magnitude distributions, one of `gp.FAMILIES`.
      entropy_rule: how entropy shares the budget among leaves, one of `gp.ENTROPY_RULES`.
      key_bits: of a value in the key region, sign included, 2 to 8; None takes 4, and more where the ratio is low.
      rungs: sizes of payload, 1 to 8, each of four times fewer entries than the next: a step takes the smallest that
        holds what every device has to send. Of use where most of a gradient may be zero, as of embeddings; a second
        rung makes the devices agree first, by an all-reduce of one word, and takes longer to compile.
      error_feedback: whether what is not sent is remembered; "ef21" as in `compress`.
      exchange: how payloads travel. "all_gather": to all, best for two or three devices, for what leaves a device
        grows with their number. "reduce_scatter": to owners of shares, which add them up with their own values,
        select once more (with a memory of their own) and send that to all: bits on the link do not grow. "leader":
        one device's positions, in turn, serve all, and values are added up on the way. "auto": "all_gather" for two
        devices or several rungs, else "reduce_scatter".
      devices: that the axis has; needed by all but "all_gather", because sizes depend on it.

    Returns:
      An `optax.GradientTransformationExtraArgs`; read it with `gp.stats`, place it with `gp.state_axes`.

    Raises:
      TypeError: an argument that sizes buffers is an array (see `gp.STATIC_ARGS`), or of a wrong type.
      ValueError: an argument is out of range, an axis is given twice, or both bits_per_element
        and ratio are.

    >>> import jax, jax.numpy as jnp, optax, gradpart_jax as gp
    >>> tx = optax.chain(gp.partition_compress(ratio=100), optax.sgd(0.1))
    >>> params = jnp.zeros(100_000)
    >>> state = tx.init(params)
    >>> gradient = jax.random.normal(jax.random.key(0), (100_000,))
    >>> _, state = jax.jit(tx.update)(gradient, state, params)
    >>> 90 < gp.stats(state).payload_ratio < 110
    Array(True, dtype=bool)
    """
    if bits_per_element is not None and ratio is not None:
        raise ValueError(
            f"bits_per_element={bits_per_element} and ratio={ratio} say the same thing twice: give one of them"
        )
    check_number("ratio", ratio, at_least=1.0, below=float("inf"), optional=True, static=True)
    check_number("bits_per_element", bits_per_element, above=0.0, at_most=32.0, optional=True, static=True)
    if bits_per_element is None:
        bits_per_element = DEFAULT_BITS if ratio is None else 32.0 / ratio
    for name, value, least, most in (
        ("warmup_steps", warmup_steps, 0, 2**31 - 1),
        ("learn_every", learn_every, 0, 2**31 - 1),
        ("seed", seed, 0, 2**32 - 1),
        ("key_bits", key_bits, 2, WIDEST_VALUE),
        ("rungs", rungs, 1, 8),
        ("devices", devices, 1, 2**20),
    ):
        check_integer(name, value, least, most, optional=name in ("learn_every", "seed", "key_bits", "devices"))
    if exchange not in EXCHANGES:
        raise ValueError(f"exchange={exchange!r} is unknown: choose among {', '.join(EXCHANGES)}")
    if exchange == "auto" and rungs > 1:
        exchange = "all_gather"
    if exchange != "all_gather" and devices is None:
        raise ValueError(f"exchange={exchange!r} needs devices, the number of devices on the axis: sizes depend on it")
    if exchange != "all_gather" and rungs > 1:
        raise ValueError(f"rungs={rungs} go with exchange='all_gather' only: leave rungs=1")
    scheme = gradpart(
        bits_per_element,
        warmup_steps=warmup_steps,
        learn_every=learn_every,
        seed=seed,
        family=family,
        entropy_rule=entropy_rule,
        key_bits=key_bits,
        rungs=rungs,
        exchange=exchange,
        devices=devices,
        remember=bool(error_feedback),
    )
    return compress(
        scheme,
        axis_name,
        inner_axis=inner_axis,
        model_axis=model_axis,
        error_feedback=error_feedback,
        momentum=momentum,
        memory_decay=memory_decay,
        memory_allowance=memory_allowance,
    )


def dense_mean(axis_name: AxisName = None) -> optax.GradientTransformationExtraArgs:
    """Exchange gradients uncompressed: the plain mean, with the same statistics as every compressor.

    Args:
      axis_name: the mapped axis; None is one device alone.

    Returns:
      An `optax.GradientTransformationExtraArgs`.

    >>> import jax.numpy as jnp, gradpart_jax as gp
    >>> tx = gp.dense_mean()
    >>> _, state = tx.update(jnp.ones(4), tx.init(jnp.zeros(4)))
    >>> float(gp.stats(state).payload_bits)
    128.0
    """
    return compress(dense(), axis_name, error_feedback=False)


class Inspection(NamedTuple):
    """Forecast beside observation, for pictures. S segments, B bins of magnitude."""

    edges: jax.Array  # float32[S, B + 1]
    forecast: jax.Array  # float32[S, B]: masses forecast for the next step
    observed: jax.Array  # float32[S, B]: masses of the last histogram taken
    threshold: jax.Array  # float32[S, 2]: at which the sparse and the key region began in the last step


def inspect(opt_state: Any, family: str = predictor.DEFAULT_FAMILY) -> Inspection:
    """Show what the predictor forecasts, bin by bin, beside what was last observed.

    Args:
      opt_state: any pytree that holds the state of one `partition_compress`.
      family: the one the compressor was made with.

    Returns:
      An Inspection.

    Raises:
      ValueError: there is no such state, no such family, or it is not the state's.
    """
    found = find_state(opt_state)
    state = found.scheme.shared
    find_family(family)
    if not isinstance(state, GradpartState):
        raise ValueError("opt_state holds no state of gp.partition_compress: there is no forecast to show")
    if jax.tree.map(jnp.shape, predictor.load(family)) != jax.tree.map(jnp.shape, state.weights):
        raise ValueError(
            f"family={family!r} is not that of opt_state's predictor: give the one that the compressor was made with, "
            "and the state of one device"
        )
    forecast = predictor.forecast(state.weights, state.summary, family)
    return Inspection(
        edges=summaries.edges(state.summary.top),
        forecast=forecast.masses(state.summary.top),
        observed=state.summary.mass / jnp.maximum(jnp.sum(state.summary.mass, axis=1, keepdims=True), 1e-30),
        threshold=found.stats.threshold,
    )
