"""A decoder transformer."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from train.errors import UsageError


class Transformer(nn.Module):
    """A decoder: pre-normalised blocks, learned positions, logits from weights of their own."""

    classes: int
    width: int = 128
    layers: int = 2
    heads: int = 4
    context: int | None = None  # positions there are; None takes as many as the first input has
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, tokens: jax.Array, train: bool = False) -> jax.Array:
        """Map int32[B, T] to logits float32[B, T, classes]."""
        length = tokens.shape[1]
        context = self.context or length
        if length > context:
            raise UsageError(f"context {context} is less than the {length} tokens of an input: use at least {length}")
        x = nn.Embed(self.classes, self.width, dtype=self.dtype)(tokens)
        positions = self.param("positions", nn.initializers.normal(0.02), (context, self.width))
        x = x + positions[None, :length].astype(self.dtype)
        mask = nn.make_causal_mask(tokens)
        for _ in range(self.layers):
            normal = nn.LayerNorm(dtype=self.dtype)(x)
            x = x + nn.MultiHeadDotProductAttention(self.heads, dtype=self.dtype)(normal, mask=mask)
            hidden = nn.gelu(nn.Dense(4 * self.width, dtype=self.dtype)(nn.LayerNorm(dtype=self.dtype)(x)))
            x = x + nn.Dense(self.width, dtype=self.dtype)(hidden)
        logits = nn.Dense(self.classes, dtype=self.dtype)(nn.LayerNorm(dtype=self.dtype)(x))
        return logits.astype(jnp.float32)
