"""Models of the field, by name: modules from inputs to logits, with float32 parameters in any compute dtype."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike

from train.data.sets import Kind
from train.errors import UsageError
from train.models.lenet import LeNet5 as LeNet5
from train.models.resnet import MOMENTUM as MOMENTUM
from train.models.resnet import ResNet as ResNet
from train.models.resnet import ThinResNet as ThinResNet
from train.models.resnet import resnet18, resnet20, resnet50, resnet56
from train.models.small import Conv as Conv
from train.models.small import Perceptron as Perceptron
from train.models.transformer import Transformer as Transformer
from train.models.vgg import VGG16 as VGG16


class Entry(NamedTuple):
    """How a model is made, and of what data it learns."""

    make: Callable[..., nn.Module]  # of classes, dtype and sizes
    kind: Kind
    last: str | None = None  # name of the layer that makes the logits; None: the dense one that is made last


MODELS: Mapping[str, Entry] = MappingProxyType(
    {
        "conv": Entry(Conv, "image", "Dense_0"),
        "mlp": Entry(Perceptron, "image"),
        "lenet5": Entry(LeNet5, "image"),
        "resnet20": Entry(resnet20, "image"),
        "resnet56": Entry(resnet56, "image"),
        "resnet18": Entry(resnet18, "image"),
        "resnet50": Entry(resnet50, "image"),
        "vgg16": Entry(VGG16, "image"),
        "transformer": Entry(Transformer, "text"),
    }
)


def build(name: str, classes: int, dtype: DTypeLike = jnp.float32, **sizes: Any) -> nn.Module:
    """Build a model by name.

    Its variables are `params`, float32 whatever the dtype, and, with batch normalisation, `batch_stats`, which are
    those of the local batch in training: no collective runs in the forward pass. Logits are float32.

    Args:
      name: of MODELS.
      classes: of the labels.
      dtype: to compute in.
      **sizes: width, layers, heads and context of a transformer; small_stem of resnet18, resnet50 and vgg16.

    Returns:
      A linen module, called as `module.apply(variables, inputs, train=bool)`.

    Raises:
      UsageError: the name is unknown, the model has no such size, or the sizes do not go together.
    """
    if name not in MODELS:
        raise UsageError(f"--model {name} is unknown: choose one of {', '.join(MODELS)}")
    module = MODELS[name].make(classes, dtype=dtype)
    own = {field.name for field in dataclasses.fields(module)} & {"width", "layers", "heads", "context", "small_stem"}
    for size, value in sizes.items():
        if size not in own:
            raise UsageError(f"--{size} {value} is no size of --model {name}: leave it out")
    module = module.clone(**sizes)
    if isinstance(module, Transformer) and module.width % module.heads:
        raise UsageError(
            f"--width {module.width} does not divide among --heads {module.heads}: use a multiple of {module.heads}"
        )
    return module


def last_layer(name: str, params: Any) -> str:
    """Name the layer that makes the logits.

    Args:
      name: of MODELS.
      params: of the model.

    Returns:
      The name of its parameters.
    """
    dense = [layer for layer in params if layer.startswith("Dense_")]
    return MODELS[name].last or max(dense, key=lambda layer: int(layer.removeprefix("Dense_")))


def suits(name: str, kind: str) -> bool:
    """Say whether a model learns of such data.

    Args:
      name: of MODELS.
      kind: image or text.

    Returns:
      Whether it does.
    """
    return MODELS[name].kind == kind
