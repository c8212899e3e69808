"""Small models: enough to learn the embedded sets within a minute or few on two cores."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp


class Conv(nn.Module):
    """A convolutional network with group normalisation, for small images."""

    classes: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map float32[B, H, W, C] to logits float32[B, classes]."""
        for width in (32, 64):
            x = nn.Conv(width, (3, 3))(x)
            x = nn.relu(nn.GroupNorm(num_groups=8)(x))
            x = nn.max_pool(x, (2, 2), (2, 2))
        x = jnp.mean(x, axis=(1, 2)) if x.shape[1] > 4 else x.reshape(x.shape[0], -1)
        return nn.Dense(self.classes)(nn.relu(nn.Dense(64)(x)))


class Perceptron(nn.Module):
    """Two hidden layers of 256."""

    classes: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map float32[B, ...] to logits float32[B, classes]."""
        x = x.reshape(x.shape[0], -1)
        for _ in range(2):
            x = nn.relu(nn.Dense(256)(x))
        return nn.Dense(self.classes)(x)


class Transformer(nn.Module):
    """A decoder of bytes: pre-normalised blocks, learned positions, tied to no tokenizer."""

    classes: int
    width: int = 128
    layers: int = 2
    heads: int = 4

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Map int32[B, T] to logits float32[B, T, classes]."""
        length = tokens.shape[1]
        x = nn.Embed(self.classes, self.width)(tokens)
        x = x + self.param("positions", nn.initializers.normal(0.02), (length, self.width))[None]
        mask = nn.make_causal_mask(tokens)
        for _ in range(self.layers):
            x = x + nn.MultiHeadDotProductAttention(self.heads)(nn.LayerNorm()(x), mask=mask)
            hidden = nn.gelu(nn.Dense(4 * self.width)(nn.LayerNorm()(x)))
            x = x + nn.Dense(self.width)(hidden)
        return nn.Dense(self.classes)(nn.LayerNorm()(x))


def build(name: str, classes: int) -> nn.Module:
    """Build a model by name.

    Args:
      name: conv, mlp or transformer.
      classes: of the labels.

    Returns:
      A linen module from inputs to logits.
    """
    return {"conv": Conv, "mlp": Perceptron, "transformer": Transformer}[name](classes)
