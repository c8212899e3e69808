"""VGG-16 with batch normalisation (Simonyan and Zisserman, 2015; configuration D)."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from train.models.resnet import INITIALIZER, MOMENTUM, SMALL

STAGES = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))


class VGG16(nn.Module):
    """Thirteen normalised convolutions, then three linear layers, or one for small images.

    `small_stem` takes the form usual for CIFAR, whose features of 512 go straight to the classes: 14.7 million
    parameters where the published form has 138 million; None does so up to 64 pixels. Without dropout: the batch
    normalisation stands in for it.
    """

    classes: int
    small_stem: bool | None = None
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Map float32[B, H, W, C] to logits float32[B, classes]."""
        small = x.shape[1] <= SMALL if self.small_stem is None else self.small_stem
        x = x.astype(self.dtype)
        for width, layers in STAGES:
            for _ in range(layers):
                x = nn.Conv(width, (3, 3), kernel_init=INITIALIZER, dtype=self.dtype)(x)
                x = nn.BatchNorm(use_running_average=not train, momentum=MOMENTUM, dtype=self.dtype)(x)
                x = nn.relu(x)
            # Padded, so that an image of fewer than 32 pixels leaves one, not none.
            x = nn.max_pool(x, (2, 2), (2, 2), padding="SAME")
        if small:
            x = jnp.mean(x, axis=(1, 2))
        else:
            x = x.reshape(x.shape[0], -1)
            for _ in range(2):
                x = nn.relu(nn.Dense(4096, dtype=self.dtype)(x))
        return nn.Dense(self.classes, dtype=self.dtype)(x).astype(jnp.float32)
