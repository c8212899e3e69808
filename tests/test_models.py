"""Models: published sizes, float32 parameters, gradients that flow, statistics of the local batch."""

import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from train import models
from train.errors import UsageError

IMAGE = [name for name in models.MODELS if models.suits(name, "image")]


def shapes(name: str, classes: int, shape: tuple[int, ...], **options: Any) -> tuple[Any, Any]:
    """Variables and logits of a model, as shapes alone."""
    model = models.build(name, classes, **options)
    kind = jnp.float32 if models.suits(name, "image") else jnp.int32
    inputs = jax.ShapeDtypeStruct((2, *shape), kind)
    variables = jax.eval_shape(lambda x: model.init(jax.random.key(0), x, train=False), inputs)
    return variables, jax.eval_shape(lambda v, x: model.apply(v, x, train=False), variables, inputs)


def count(tree: Any) -> int:
    return sum(math.prod(x.shape) for x in jax.tree.leaves(tree))


@pytest.mark.parametrize(
    ("name", "classes", "shape", "published"),
    [
        ("lenet5", 10, (28, 28, 1), 61_706),
        ("lenet5", 10, (32, 32, 1), 61_706),
        ("resnet20", 10, (32, 32, 3), 269_722),  # the paper rounds to 0.27 million
        ("resnet56", 10, (32, 32, 3), 853_018),  # 0.85 million
        ("resnet18", 1000, (224, 224, 3), 11_689_512),
        ("resnet50", 1000, (224, 224, 3), 25_557_032),
        ("resnet18", 10, (32, 32, 3), 11_173_962),  # the usual form for CIFAR
        ("vgg16", 1000, (224, 224, 3), 138_365_992),
        ("vgg16", 10, (32, 32, 3), 14_728_266),
    ],
)
def test_parameter_counts_are_the_published_ones(name, classes, shape, published) -> None:
    variables, logits = shapes(name, classes, shape)
    assert count(variables["params"]) == published
    assert logits.shape == (2, classes)


def test_a_transformer_of_gpt_2s_size_has_its_parameters() -> None:
    variables, _ = shapes("transformer", 50257, (8,), width=768, layers=12, heads=12, context=1024)
    untied = 768 * 50257 + 50257  # GPT-2 reads and writes tokens with the same matrix
    assert count(variables["params"]) - untied == 124_439_808
    assert variables["params"]["positions"].shape == (1024, 768)


@pytest.mark.parametrize("name", models.MODELS)
def test_the_last_layer_makes_the_logits(name: str) -> None:
    variables, _ = shapes(name, 11, (32, 32, 3) if models.suits(name, "image") else (8,))
    params = variables["params"]
    assert params[models.last_layer(name, params)]["kernel"].shape[-1] == 11


@pytest.mark.parametrize("name", models.MODELS)
def test_gradients_flow_in_bfloat16_and_parameters_stay_float32(name: str) -> None:
    model = models.build(name, 5, jnp.bfloat16)
    inputs = jnp.zeros((2, 16), jnp.int32) if models.suits(name, "text") else jnp.zeros((2, 16, 16, 3))

    def loss(params: Any, rest: Any) -> tuple[jax.Array, Any]:
        logits, changed = model.apply({"params": params} | rest, inputs, train=True, mutable=["batch_stats"])
        return jnp.sum(logits), (logits, changed)

    variables = jax.eval_shape(lambda: model.init(jax.random.key(0), inputs, train=False))
    params = variables.pop("params")
    gradient, (logits, changed) = jax.eval_shape(jax.grad(loss, has_aux=True), params, variables)
    assert logits.dtype == jnp.float32
    assert {x.dtype for x in jax.tree.leaves((params, variables, gradient, changed))} == {jnp.dtype("float32")}
    assert jax.tree.structure(changed) == jax.tree.structure(variables)


def images(key: int) -> jax.Array:
    return jax.random.normal(jax.random.key(key), (8, 8, 8, 3))


@pytest.mark.parametrize(
    "model", [models.ThinResNet(3, 1), models.ResNet(3, (1, 1), True)], ids=["option-a", "option-b"]
)
def test_every_parameter_has_a_gradient_once_the_blocks_are_open(model: nn.Module) -> None:
    x, labels = images(0), jnp.arange(8) % 3

    @jax.jit
    def start() -> tuple[Any, Any]:
        variables = model.init(jax.random.key(1), x, train=False)
        # Blocks start as their shortcuts: what lies inside learns from the second step on.
        return jax.tree.map(lambda p: jnp.where(p == 0, 0.1, p), variables["params"]), variables["batch_stats"]

    @jax.jit
    @jax.value_and_grad
    def score(params: Any) -> jax.Array:
        logits, _ = model.apply({"params": params, "batch_stats": rest}, x, train=True, mutable=["batch_stats"])
        return -jnp.mean(jnp.sum(jax.nn.log_softmax(logits) * jax.nn.one_hot(labels, 3), -1))

    params, rest = start()
    loss, gradient = score(params)
    for path, leaf in jax.tree.leaves_with_path(gradient):
        assert np.isfinite(leaf).all(), path
        assert np.any(np.asarray(leaf) != 0), path
    assert score(jax.tree.map(lambda p, g: np.asarray(p) - 0.01 * np.asarray(g), params, gradient))[0] < loss


def test_batch_statistics_are_the_local_batchs_and_evaluation_uses_the_running_ones() -> None:
    model = models.ThinResNet(3, 1)
    first, second = images(0), 3 + images(1)
    variables = jax.jit(functools.partial(model.init, train=False))(jax.random.key(1), first)
    apply = jax.jit(lambda v, x: model.apply(v, x, train=True, mutable=["batch_stats"]))

    # Under an axis, each device's result is what it would be alone.
    together = jax.vmap(apply, in_axes=(None, 0), axis_name="devices")(variables, jnp.stack([first, second]))
    alone = apply(variables, second)
    for a, b in zip(jax.tree.leaves(together), jax.tree.leaves(alone), strict=True):
        np.testing.assert_allclose(a[1], b, atol=1e-4)

    changed = {"params": variables["params"], **alone[1]}
    evaluate = jax.jit(functools.partial(model.apply, train=False))
    before, after = (evaluate(v, second) for v in (variables, changed))
    assert not np.allclose(before, after)
    one = evaluate(changed, second[:1])
    np.testing.assert_allclose(one, after[:1], atol=1e-4)


def test_a_transformer_sees_only_what_came_before() -> None:
    model = models.build("transformer", 11, width=16, layers=2, heads=2, context=12)
    tokens = jnp.arange(8)[None] % 11
    variables = jax.jit(model.init)(jax.random.key(0), tokens)
    changed = tokens.at[0, 5].set(9)
    before, after = map(jax.jit(functools.partial(model.apply, variables)), (tokens, changed))
    np.testing.assert_allclose(before[:, :5], after[:, :5], atol=1e-5)
    assert not np.allclose(before[:, 5:], after[:, 5:])


@pytest.mark.parametrize("side", [8, 28, 65])
@pytest.mark.parametrize("name", IMAGE)
def test_image_models_take_any_sensible_side(name: str, side: int) -> None:
    assert shapes(name, 7, (side, side, 1))[1].shape == (2, 7)


def test_mistakes_name_option_and_remedy() -> None:
    with pytest.raises(UsageError, match="--model resnet is unknown: choose one of conv, mlp, lenet5"):
        models.build("resnet", 10)
    with pytest.raises(UsageError, match="--width 64 is no size of --model conv: leave it out"):
        models.build("conv", 10, width=64)
    with pytest.raises(UsageError, match="--width 100 does not divide among --heads 3: use a multiple of 3"):
        models.build("transformer", 10, width=100, heads=3)
    with pytest.raises(UsageError, match="context 4 is less than the 8 tokens of an input: use at least 8"):
        shapes("transformer", 10, (8,), context=4)
