"""LeNet-5 (LeCun et al., 1998), for digits of 28 or 32 pixels."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

SIDE = 32  # what the network was made for


class LeNet5(nn.Module):
    """Two convolutions and three linear layers: 61,706 parameters on MNIST.

    Two departures from the first one, usual today: rectifiers with max pooling for scaled tanh with trained averages,
    and all of the second convolution's connections (the table of 1998 left some out, for about 60,000 parameters).
    Smaller images are padded to 32 pixels, as MNIST's 28 were.
    """

    classes: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Map float32[B, H, W, C] to logits float32[B, classes]."""
        short = [max(0, SIDE - side) for side in x.shape[1:3]]
        x = jnp.pad(x, ((0, 0), *((n // 2, n - n // 2) for n in short), (0, 0)))
        for width in (6, 16):
            x = nn.relu(nn.Conv(width, (5, 5), padding="VALID", dtype=self.dtype)(x))
            x = nn.max_pool(x, (2, 2), (2, 2))
        x = x.reshape(x.shape[0], -1)
        for width in (120, 84):
            x = nn.relu(nn.Dense(width, dtype=self.dtype)(x))
        return nn.Dense(self.classes, dtype=self.dtype)(x).astype(jnp.float32)
