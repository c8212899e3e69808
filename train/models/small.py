"""Small models: enough to learn the embedded images within a minute or few on two cores."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike


class Conv(nn.Module):
    """A convolutional network with group normalisation, for small images."""

    classes: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Map float32[B, H, W, C] to logits float32[B, classes]."""
        for width in (32, 64):
            x = nn.Conv(width, (3, 3), dtype=self.dtype)(x)
            x = nn.relu(nn.GroupNorm(num_groups=8, dtype=self.dtype)(x))
            x = nn.max_pool(x, (2, 2), (2, 2))
        x = jnp.mean(x, axis=(1, 2)) if x.shape[1] > 4 else x.reshape(x.shape[0], -1)
        # Made in this order, the layers keep the names and starting values that the traces were recorded with.
        last = nn.Dense(self.classes, dtype=self.dtype)
        return last(nn.relu(nn.Dense(64, dtype=self.dtype)(x))).astype(jnp.float32)


class Perceptron(nn.Module):
    """Two hidden layers of 256."""

    classes: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Map float32[B, ...] to logits float32[B, classes]."""
        x = x.reshape(x.shape[0], -1)
        for _ in range(2):
            x = nn.relu(nn.Dense(256, dtype=self.dtype)(x))
        return nn.Dense(self.classes, dtype=self.dtype)(x).astype(jnp.float32)
