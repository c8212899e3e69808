"""Memory and momentum: what is kept, what decays, and what an allowance lets go."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

import gradpart_jax as gp
from gradpart_jax.feedback import accumulate

NUMBERS = st.floats(-1e6, 1e6, width=32, allow_subnormal=False)
add = jax.jit(accumulate)


@pytest.mark.parametrize("scheme", [gp.baselines.topk(0.1), gp.baselines.ef_signsgd()], ids=["some", "all"])
def test_memory_decays_and_momentum_goes_on_where_nothing_was_sent(scheme: gp.Scheme) -> None:
    momentum, decay = 0.75, 0.5
    tx = gp.compress(scheme, momentum=momentum, memory_decay=decay)
    update, state = jax.jit(tx.update), tx.init(jnp.zeros(64))
    residual = velocity = np.zeros(64)
    for gradient in np.asarray(jax.random.normal(jax.random.key(0), (4, 64))):
        sent, state = update(gradient, state)  # of one device alone the mean is what it sent
        moving = gradient + velocity
        residual = decay * (moving + residual - sent)
        velocity = np.where(np.asarray(sent) != 0, 0.0, momentum * moving)
        np.testing.assert_allclose(state.memory.residual, residual, atol=1e-5)
        np.testing.assert_allclose(state.memory.velocity, velocity, atol=1e-5)


@given(NUMBERS, NUMBERS, st.sampled_from([0.0, 0.1, 0.2, 1.0, 3.0]))
def test_what_opposes_counts_more_until_the_sum_is_used_up(fresh: float, held: float, allowance: float) -> None:
    if fresh * held >= 0:
        expected = held + fresh
    elif abs(fresh) * (1 + allowance) <= abs(held):
        expected = held + (1 + allowance) * fresh
    else:
        expected = fresh + held / (1 + allowance)
    found = float(add(jnp.float32(fresh), jnp.float32(held), jnp.float32(allowance)))
    assert abs(found - expected) <= 1e-6 * (abs(fresh) * (1 + allowance) + abs(held))


def test_noise_comes_to_nothing_and_a_drift_is_summed_up() -> None:
    noise = jax.random.normal(jax.random.key(0), (2000, 1000))

    def end(drift: float, allowance: float) -> np.ndarray:
        step = lambda held, fresh: (add(fresh + drift, held, allowance), None)  # noqa: E731
        return np.asarray(jax.lax.scan(step, jnp.zeros(1000), noise)[0])

    assert np.std(end(0.0, 0.0)) > 40
    assert np.std(end(0.0, 0.3)) < 10
    # Of a drift of half of the noise, three quarters and more remain.
    assert np.mean(end(0.5, 0.3)) > 0.9 * 0.5 * 2000 * 0.85


def test_an_allowance_of_zero_changes_nothing_and_more_forgets_noise() -> None:
    noise = jax.random.normal(jax.random.key(0), (30, 2000))
    plain, none, some = (
        gp.compress(gp.baselines.topk(0.01), **options)
        for options in ({"memory_allowance": 0}, {"memory_allowance": jnp.float32(0.0)}, {"memory_allowance": 0.5})
    )

    def kept(tx: optax.GradientTransformation) -> np.ndarray:
        step = lambda state, gradient: (tx.update(gradient, state)[1], None)  # noqa: E731
        return np.asarray(jax.lax.scan(step, tx.init(noise[0]), noise)[0].memory.residual)

    np.testing.assert_array_equal(kept(plain), kept(none))
    assert np.linalg.norm(kept(some)) < 0.8 * np.linalg.norm(kept(plain))
