"""Parameter shapes of well-known models, for trees of many leaves."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from types import MappingProxyType

import jax
import jax.numpy as jnp

Shapes = list[tuple[int, ...]]


def resnet50() -> Shapes:
    """List the 161 shapes of ResNet-50 (He et al., 2016): 25.6 million parameters.

    >>> len(resnet50()), elements(resnet50())
    (161, 25557032)
    """

    def convolution(size: int, inputs: int, outputs: int) -> Shapes:
        return [(size, size, inputs, outputs), (outputs,), (outputs,)]

    shapes, inputs = convolution(7, 3, 64), 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            shapes += convolution(1, inputs, width) + convolution(3, width, width) + convolution(1, width, 4 * width)
            if block == 0:
                shapes += convolution(1, inputs, 4 * width)
            inputs = 4 * width
    return [*shapes, (inputs, 1000), (1000,)]


def transformer() -> Shapes:
    """List the shapes of a decoder of 12 layers, width 512, and 8192 tokens.

    >>> len(transformer())
    148
    """
    width, tokens = 512, 8192
    return [(tokens, width), (1024, width), *layer(width) * 12, (width,), (width,)]


def layer(width: int) -> Shapes:
    """List the shapes of one layer of a transformer.

    Args:
      width: w.

    Returns:
      12 shapes, of 12 w^2 + 13 w parameters.

    >>> elements(layer(512)) - 12 * 512**2 == 13 * 512
    True
    """
    before: Shapes = [(width,), (width,), (width, 3 * width), (3 * width,), (width, width), (width,)]
    after: Shapes = [(width,), (width,), (width, 4 * width), (4 * width,), (4 * width, width), (width,)]
    return before + after


def elements(shapes: Shapes) -> int:
    """Count the elements of all.

    >>> elements([(2, 3), (4,)])
    10
    """
    return sum(map(math.prod, shapes))


def cut(flat: jax.Array, shapes: Shapes) -> list[jax.Array]:
    """Cut a vector into arrays of some shapes.

    >>> [leaf.shape for leaf in cut(jnp.zeros(10), [(2, 3), (4,)])]
    [(2, 3), (4,)]
    """
    ends = itertools.accumulate(map(math.prod, shapes[:-1]))
    return [leaf.reshape(shape) for leaf, shape in zip(jnp.split(flat, list(ends)), shapes, strict=True)]


TREES: Mapping[str, Callable[[], Shapes]] = MappingProxyType({"ResNet-50": resnet50, "transformer": transformer})
