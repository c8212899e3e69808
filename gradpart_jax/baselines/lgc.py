"""Learned gradient compression: an autoencoder of the values at one device's positions, trained on the way.

Source: Abrahamyan, Chen, Bekoulis and Deligiannis, "Learned gradient compression for distributed deep learning" (IEEE
TNNLS 2021), the ring all-reduce form: a leader's positions, codes averaged over devices, one decoding. The network is
this package's own: small, on blocks of values, its decoder linear so that the mean of codes decodes to the mean.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from gradpart_jax import accounting
from gradpart_jax.accounting import WORD_BITS
from gradpart_jax.buffers import Buffer, gather, overwritten, scatter_add
from gradpart_jax.checks import check_integer, check_number
from gradpart_jax.codecs import index_codec
from gradpart_jax.exchange import AxisName, axis_size, from_leader, mean
from gradpart_jax.feedback import Sent
from gradpart_jax.magnitudes import entries, quotas, top
from gradpart_jax.replicated import replicated, seeded
from gradpart_jax.scheme import Reduced, Scheme, SchemeState, Settle, early
from gradpart_jax.segments import Layout
from gradpart_jax.sparse import report_at, share_at

BLOCK = 32  # values that are coded together
WIDTH = 64
RATE = 3e-3


class Learned(NamedTuple):
    """The autoencoder, the same on every device."""

    step: jax.Array  # int32[]
    weights: Any
    optimizer: Any


class Encoder(nn.Module):
    """From blocks of values to codes."""

    code: int

    @nn.compact
    def __call__(self, blocks: jax.Array) -> jax.Array:
        """Encode float32[..., BLOCK] as float32[..., code]."""
        curved, straight = nn.Dense(WIDTH, name="curved")(blocks), nn.Dense(WIDTH, name="straight")(blocks)
        return nn.Dense(self.code, name="out")(nn.tanh(curved) + straight)


def lgc(ratio: float = 0.01, *, code: int = 8, train_steps: int = 200, seed: int = 0) -> Scheme:
    """Send codes of the values at the leader's largest magnitudes, the leader being another device each step.

    In step t, device t mod W chooses of each leaf with d elements its k = max(1, round(ratio d)) largest |a|, and
    sends their positions to all. For the first `train_steps` steps all devices' values there are averaged as they are,
    and a network is trained to reproduce the means, 32 by 32, from fewer numbers. From then on each device sends the
    codes of its values, c E(x) with E the encoder, D the linear decoder, r = D E(x) and c = <x, r> / <r, r>: the
    nearest to x in the direction of r, so that the memory takes no more in than x whatever the network has learnt.

    Args:
      ratio: of entries to send, in (0, 1].
      code: numbers that stand for 32 values, 1 to 32.
      train_steps: steps of training, at least 1.
      seed: of the network's first weights.

    Returns:
      A Scheme.

    Raises:
      TypeError: an argument is of a wrong type.
      ValueError: an argument is out of range.

    >>> import jax, jax.numpy as jnp, gradpart_jax as gp
    >>> tx = gp.compress(gp.baselines.lgc(0.1, train_steps=1))
    >>> gradient, state, bits = jax.random.normal(jax.random.key(0), (10_000,)), tx.init(jnp.zeros(10_000)), []
    >>> update = jax.jit(tx.update)
    >>> for _ in range(2):
    ...     _, state = update(gradient, state)
    ...     bits.append(float(gp.stats(state).payload_bits))
    >>> bits[0] - bits[1] == 1000 * 32 - 256 * 32
    True
    """
    check_number("ratio", ratio, above=0.0, at_most=1.0, static=True)
    check_integer("code", code, 1, BLOCK)
    check_integer("train_steps", train_steps, 1, 2**31 - 1)
    check_integer("seed", seed, 0, 2**32 - 1)
    encoder, optimizer = Encoder(code), optax.adam(RATE)

    def capacity(layout: Layout) -> int:
        return sum(quotas(ratio, layout))

    def init(layout: Layout) -> SchemeState:
        one, two = jax.random.split(seeded(seed))
        weights = {
            "encoder": encoder.init(one, jnp.zeros((1, BLOCK))),
            "decoder": jax.random.normal(two, (code, BLOCK)) / math.sqrt(BLOCK),
        }
        return SchemeState(Learned(jnp.int32(0), weights, optimizer.init(weights)), ())

    def learn(weights: Any, state: Any, values: jax.Array, scale: jax.Array) -> tuple[Any, Any]:
        blocks = _blocks(values) / scale

        def loss(weights: Any) -> jax.Array:
            decoded = encoder.apply(weights["encoder"], blocks) @ weights["decoder"]
            return jnp.mean((decoded - blocks) ** 2)

        updates, state = optimizer.update(jax.grad(loss)(weights), state)
        return optax.apply_updates(weights, updates), state

    def encode(weights: Any, values: jax.Array, scale: jax.Array) -> tuple[jax.Array, jax.Array]:
        blocks = _blocks(values) / scale
        codes = jnp.asarray(encoder.apply(weights["encoder"], blocks))
        decoded = codes @ weights["decoder"]
        power = jnp.sum(decoded * decoded, axis=1, keepdims=True)
        factor = jnp.sum(decoded * blocks, axis=1, keepdims=True) / jnp.maximum(power, 1e-30)
        codes = codes * factor
        return codes, decode(weights, codes, scale)

    def decode(weights: Any, codes: jax.Array, scale: jax.Array) -> jax.Array:
        return scale * (codes @ weights["decoder"]).reshape(-1)

    def reduce(
        vector: jax.Array, state: SchemeState, layout: Layout, axis_name: AxisName, settle: Settle
    ) -> tuple[Reduced, SchemeState]:
        learned: Learned = state.shared
        devices, count = axis_size(axis_name), capacity(layout)
        index = index_codec(layout.total, count)
        own = entries(vector, top(vector, jnp.asarray(quotas(ratio, layout), jnp.int32), layout), count, jnp.int32(0))
        scale = jax.lax.bitcast_convert_type(replicated(_root_mean_square)(own.values), jnp.uint32)
        words = jnp.concatenate([index.encode(own.indices, own.used), own.used.astype(jnp.uint32)[None], scale[None]])
        words = from_leader(words, learned.step % devices, axis_name)
        used = words[-2].astype(jnp.int32)
        indices = index.decode(words[:-2], used)
        scale = jax.lax.bitcast_convert_type(words[-1], jnp.float32)

        def training(vector: jax.Array) -> tuple[Reduced, Any, Any]:
            reduced = share_at(vector, indices, layout, axis_name, settle)
            values = gather(reduced.mean, indices)
            return reduced, *replicated(learn)(learned.weights, learned.optimizer, values, scale)

        def coded(vector: jax.Array) -> tuple[Reduced, Any, Any]:
            codes, values = replicated(encode)(learned.weights, gather(vector, indices), scale)
            codes = mean(jnp.where(jnp.all(jnp.isfinite(vector)), codes, jnp.nan), axis_name)
            finite = jnp.all(jnp.isfinite(codes))
            values = jnp.where(indices < layout.total, values[:count], 0.0)
            memory = settle(Sent(jnp.bool_(False), (Buffer(indices, values, used),)), finite)
            average = replicated(decode)(learned.weights, jnp.where(finite, codes, 0.0), scale)[:count]
            total = scatter_add(overwritten(vector, memory.residual), indices, jnp.where(finite, average, 0.0))
            wire = accounting.reduced(WORD_BITS * codes.size, devices)
            reduced = Reduced(total, memory, finite, wire, report_at(indices, layout))
            return reduced, learned.weights, learned.optimizer

        reduced, weights, moments = jax.lax.cond(early(learned.step, train_steps), training, coded, vector)
        broadcast = accounting.reduced(WORD_BITS * words.shape[0], devices)
        reduced = reduced._replace(wire=accounting.add(broadcast, reduced.wire))
        return reduced, SchemeState(Learned(learned.step + 1, weights, moments), ())

    return Scheme("lgc", init, reduce, capacity)


def _blocks(values: jax.Array) -> jax.Array:
    return jnp.pad(values, (0, -values.shape[0] % BLOCK)).reshape(-1, BLOCK)


def _root_mean_square(values: jax.Array) -> jax.Array:
    most = jnp.max(jnp.abs(values))
    unit = jnp.where((most > 1e-37) & (most < jnp.inf), most, 1.0)
    share = values / unit
    root = unit * jnp.sqrt(jnp.sum(share * share) / values.shape[0])
    return jnp.where(root > 0, root, 1.0)
