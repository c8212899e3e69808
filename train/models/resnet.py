"""Residual networks (He et al., 2016): the thin ones for small images, and ResNet-18 and -50."""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

SMALL = 64  # images up to this side count as small
MOMENTUM = 0.9  # of batch normalisation's running statistics

# Of the rectified fan-out, as in the paper's own initialisation
INITIALIZER = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


class Normalised(nn.Module):
    """A convolution without bias, then batch normalisation by the local batch's statistics."""

    width: int
    kernel: int
    stride: int
    dtype: DTypeLike
    scale: float = 1.0  # that the normalisation starts with

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Map [B, H, W, C] to [B, H / stride, W / stride, width]."""
        # Padded alike on all sides at any stride, as the published networks are; "SAME" is not.
        x = nn.Conv(
            self.width,
            (self.kernel, self.kernel),
            (self.stride, self.stride),
            padding=self.kernel // 2,
            use_bias=False,
            kernel_init=INITIALIZER,
            dtype=self.dtype,
        )(x)
        return nn.BatchNorm(
            use_running_average=not train,
            momentum=MOMENTUM,
            dtype=self.dtype,
            scale_init=nn.initializers.constant(self.scale),
        )(x)


class Block(nn.Module):
    """Two convolutions of size 3, or the bottleneck of 1, 3 and 1, around a shortcut."""

    width: int
    stride: int
    dtype: DTypeLike
    bottleneck: bool = False
    projected: bool = True  # option B: a changed shape is projected; else, option A, thinned out and filled with zeros

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Map [B, H, W, C] to [B, H / stride, W / stride, width, or four times that in a bottleneck]."""
        layer = functools.partial(Normalised, dtype=self.dtype)
        out = 4 * self.width if self.bottleneck else self.width
        # The last scale starts at zero, so that a block starts as its shortcut (Goyal et al., 2017).
        if self.bottleneck:
            y = nn.relu(layer(self.width, 1, 1)(x, train))
            y = nn.relu(layer(self.width, 3, self.stride)(y, train))
            y = layer(out, 1, 1, scale=0.0)(y, train)
        else:
            y = nn.relu(layer(self.width, 3, self.stride)(x, train))
            y = layer(out, 3, 1, scale=0.0)(y, train)
        if self.stride > 1 or x.shape[-1] != out:
            if self.projected:
                x = layer(out, 1, self.stride)(x, train)
            else:
                more = out - x.shape[-1]
                x = x[:, :: self.stride, :: self.stride]
                x = jnp.pad(x, ((0, 0), (0, 0), (0, 0), (more // 2, more - more // 2)))
        return nn.relu(x + y)


class ThinResNet(nn.Module):
    """The networks of 6 n + 2 layers for CIFAR, with parameter-free shortcuts (option A) as in the paper."""

    classes: int
    blocks: int  # n
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Map float32[B, H, W, C] to logits float32[B, classes]."""
        x = nn.relu(Normalised(16, 3, 1, self.dtype)(x.astype(self.dtype), train))
        for stage, width in enumerate((16, 32, 64)):
            for block in range(self.blocks):
                stride = 2 if stage and not block else 1
                x = Block(width, stride, self.dtype, projected=False)(x, train)
        x = jnp.mean(x, axis=(1, 2))
        return nn.Dense(self.classes, dtype=self.dtype)(x).astype(jnp.float32)


class ResNet(nn.Module):
    """The networks for ImageNet, strided in the convolution of size 3, with projected shortcuts (option B).

    `small_stem` begins with one convolution of size 3 where the published stem (size 7, stride 2, then a max pooling of
    stride 2) would leave little of a small image; None does so up to 64 pixels.
    """

    classes: int
    stages: tuple[int, ...]
    bottleneck: bool
    small_stem: bool | None = None
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Map float32[B, H, W, C] to logits float32[B, classes]."""
        small = x.shape[1] <= SMALL if self.small_stem is None else self.small_stem
        x = x.astype(self.dtype)
        if small:
            x = nn.relu(Normalised(64, 3, 1, self.dtype)(x, train))
        else:
            x = nn.relu(Normalised(64, 7, 2, self.dtype)(x, train))
            x = nn.max_pool(x, (3, 3), (2, 2), padding=((1, 1), (1, 1)))
        for stage, blocks in enumerate(self.stages):
            for block in range(blocks):
                stride = 2 if stage and not block else 1
                x = Block(64 * 2**stage, stride, self.dtype, self.bottleneck)(x, train)
        x = jnp.mean(x, axis=(1, 2))
        return nn.Dense(self.classes, dtype=self.dtype)(x).astype(jnp.float32)


def resnet20(classes: int, **fields: Any) -> ThinResNet:
    """Make ResNet-20 for small images: 0.27 million parameters."""
    return ThinResNet(classes, 3, **fields)


def resnet56(classes: int, **fields: Any) -> ThinResNet:
    """Make ResNet-56 for small images: 0.85 million parameters."""
    return ThinResNet(classes, 9, **fields)


def resnet18(classes: int, **fields: Any) -> ResNet:
    """Make ResNet-18: 11.7 million parameters at 1000 classes."""
    return ResNet(classes, (2, 2, 2, 2), False, **fields)


def resnet50(classes: int, **fields: Any) -> ResNet:
    """Make ResNet-50: 25.6 million parameters at 1000 classes."""
    return ResNet(classes, (3, 4, 6, 3), True, **fields)
