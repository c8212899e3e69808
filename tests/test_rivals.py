"""Rivals by name: a budget of bytes becomes each one's own parameter, and what is asked for wrongly is named."""

import jax
import jax.numpy as jnp
import pytest

import gradpart_jax as gp
from train import methods, registry
from train.config import Exchange
from train.errors import UsageError
from train.labels import parse_label

TREE = {"a": jnp.zeros((256, 128)), "b": jnp.zeros(128), "c": jnp.zeros((128, 10))}


def built(text: str, ratio: float):
    return methods.build(parse_label(text), Exchange(), None, ratio, 1)


@pytest.mark.parametrize(
    ("text", "ratio"),
    [("topk", 100), ("randomk", 100), ("dgc", 100), ("redsync", 50), ("demo", 50), ("powersgd", 20), ("qsgd", 10)],
)
def test_a_budget_is_kept_and_used(text: str, ratio: float) -> None:
    tx = built(text, ratio)
    state = tx.init(TREE)
    gradient = jax.tree.map(lambda x: jax.random.normal(jax.random.key(x.size), x.shape), TREE)
    out, state = jax.jit(tx.update)(gradient, state, TREE)
    assert 0.99 * ratio < float(gp.stats(state).payload_ratio) < 1.2 * ratio
    assert jax.tree.map(jnp.shape, out) == jax.tree.map(jnp.shape, TREE)


def test_every_method_can_be_built_by_its_name() -> None:
    for name in registry.METHODS:
        tx = built(name + ":value=0.1" * (name == "threshold"), 50.0)
        state = jax.eval_shape(tx.init, TREE)
        updates, _ = jax.eval_shape(tx.update, TREE, state, TREE)
        assert jax.tree.map(jnp.shape, updates) == jax.tree.map(jnp.shape, TREE), name


def test_an_own_parameter_comes_before_the_budget() -> None:
    shapes = jax.eval_shape(built("powersgd:rank=3", 1000.0).init, TREE)
    assert {x.shape[-1] for x in shapes.scheme.shared.right} == {3}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("powersgd:rank=0", "rank=0 is out of range"),
        ("topk:density=2", "--method topk:density=2: density=2 is out of range"),
        ("sidco:fit=cubic", "fit='cubic'"),
        ("threshold", "threshold lacks its value: give one, as in threshold:value=0.01"),
        ("topk:k=5", "'k=5' is no option of topk: it has density=..."),
        ("best", "best is unknown: choose among partition, dense"),
    ],
)
def test_mistakes_are_named(text: str, words: str) -> None:
    with pytest.raises(UsageError) as raised:
        built(text, 100.0)
    assert words in str(raised.value)


def test_momentum_correction_is_dgcs_own_and_leaves_sgd_none() -> None:
    assert methods.settings_of(parse_label("dgc"), Exchange())["momentum"] == 0.9
    assert methods.settings_of(parse_label("dgc:momentum=0.5"), Exchange())["momentum"] == 0.5
    assert methods.settings_of(parse_label("topk"), Exchange())["momentum"] is None
