"""How much devices' gradients agree: what is measured, what it costs, and what is made of it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, PartitionSpec

import gradpart_jax as gp
from gradpart_jax import agreement

pytestmark = pytest.mark.xdist_group("local")

W, AXIS = 4, "w"
LIKE = {"agreed": jnp.zeros((8, 128)), "half": jnp.zeros(1024), "noise": jnp.zeros((16, 65)), "number": jnp.zeros(())}
SIGNAL = {"agreed": 1.0, "half": 0.5, "noise": 0.0, "number": 1.0}


def gradients(key: jax.Array, signal: jax.Array | None = None):
    """Of all devices: a signal that they share, drawn by a key of its own where it is to stay, and each one's noise."""

    def draw(name: str):
        keys = (key if signal is None else signal, key)
        shared, own = (jax.random.fold_in(jax.random.fold_in(k, hash_of(name)), i) for i, k in enumerate(keys))
        shape, part = LIKE[name].shape, SIGNAL[name]
        noise = jax.random.normal(own, (W, *shape)) * np.sqrt(1 - part)
        return (jax.random.normal(shared, shape) * np.sqrt(part))[None] + noise

    return {name: draw(name) for name in LIKE}


def hash_of(name: str) -> int:
    return sum(map(ord, name))


def one(bits: float):
    return functools.partial(agreement.measure, axis_name=AXIS, bits_per_element=bits)


def everywhere(tree):
    return jax.tree.map(lambda x: jnp.broadcast_to(x, (W, *x.shape)), tree)


# One that stays, so that it lies in no direction by chance: what is asked of it must be another one in each step
steady = functools.partial(gradients, signal=jax.random.key(5))


@functools.cache
def known(steps: int = 300) -> agreement.Agreement:
    """After so many steps, on each device."""
    run = jax.vmap(one(32.0), axis_name=AXIS)
    keys = jax.random.split(jax.random.key(1), steps)
    advance = lambda state, key: (run(steady(key), state)[0], None)  # noqa: E731
    return jax.jit(lambda state: jax.lax.scan(advance, state, keys)[0])(everywhere(agreement.start(LIKE)))


def test_the_ratio_is_that_of_mean_to_own_second_moments() -> None:
    state = known()
    ratio = np.asarray(jax.vmap(lambda s: agreement.agreement_ratio(s, AXIS), axis_name=AXIS)(state))
    assert np.array_equal(ratio, np.broadcast_to(ratio[:1], ratio.shape))
    # By brute force, over many draws
    draws = jax.vmap(steady)(jax.random.split(jax.random.key(7), 100))
    first = 0
    for name, g in sorted(draws.items()):
        count = -(-LIKE[name].size // agreement.BLOCK)
        expected = float(jnp.mean(jnp.mean(g, axis=1) ** 2) / jnp.mean(g**2))
        assert np.mean(ratio[0, first : first + count]) == pytest.approx(expected, abs=0.05), name
        first += count
    assert first == ratio.shape[1]


@pytest.mark.parametrize("generator", ["threefry2x32", "rbg"])
def test_devices_draw_the_same_signs_whatever_generator_the_program_prefers(generator: str) -> None:
    shared = everywhere(jax.tree.map(lambda x: x[0], gradients(jax.random.key(3))))
    with jax.default_prng_impl(generator):
        run, state = jax.jit(jax.vmap(one(32.0), axis_name=AXIS)), everywhere(agreement.start(LIKE))
        for _ in range(3):
            state, _ = run(shared, state)
    ratio = jax.vmap(lambda s: agreement.agreement_ratio(s, AXIS), axis_name=AXIS)(state)
    assert np.allclose(ratio, 1.0, atol=1e-3)


def test_bytes_are_counted_and_stay_within_the_budget() -> None:
    budget, elements = 0.03, sum(x.size for x in LIKE.values())
    run, g = jax.jit(jax.vmap(one(budget), axis_name=AXIS)), gradients(jax.random.key(0))
    state, seen = everywhere(agreement.start(LIKE)), []
    for _ in range(60):
        state, wire = run(g, state)
        seen.append([float(x[0]) for x in wire])
    bits, link = np.array(seen).T
    words = -(-(8 + 8 + 9 + 1) // 10)  # counts of up to 4 devices take 3 bits, and 10 of them a word
    assert set(bits) == {0.0, 32.0 * (words + 1)}
    assert bits.mean() <= budget * elements * 1.05
    np.testing.assert_array_equal(link, 1.5 * bits)
    # An optimizer's statistics have them
    exchange = gp.dense_mean(AXIS)
    tx = gp.agreeing(optax.chain(exchange, optax.sgd(0.1)), AXIS, bits_per_element=32.0)
    state = everywhere(tx.init(LIKE))
    _, state = jax.vmap(tx.update, axis_name=AXIS)(gradients(jax.random.key(0)), state)
    found = gp.stats(state)
    assert float(found.payload_bits[0]) == 32.0 * elements + bits.max()
    assert float(found.payload_ratio[0]) == pytest.approx(32.0 * elements / (32.0 * elements + bits.max()))


def test_nothing_is_learnt_from_numbers_that_are_not_finite() -> None:
    before = known()
    bad = gradients(jax.random.key(3))
    bad["half"] = bad["half"].at[2, 300].set(jnp.inf)
    after, wire = jax.jit(jax.vmap(one(32.0), axis_name=AXIS))(bad, before)
    np.testing.assert_array_equal(after.products, before.products)
    np.testing.assert_array_equal(after.measured, before.measured)
    assert float(wire.payload_bits[0]) > 0


@pytest.mark.parametrize("check", [False, True])
def test_pmap_vmap_and_shard_map_give_the_same_bits(check: bool) -> None:
    own = PartitionSpec(AXIS)
    mesh = jax.make_mesh((W,), (AXIS,), axis_types=(AxisType.Auto,), devices=jax.devices()[:W])
    by_vmap = jax.jit(jax.vmap(one(32.0), axis_name=AXIS))
    by_pmap = jax.pmap(one(32.0), AXIS, in_axes=(0, None), out_axes=None)
    by_shard = jax.jit(
        jax.shard_map(one(32.0), mesh=mesh, in_specs=(own, PartitionSpec()), out_specs=PartitionSpec(), check_vma=check)
    )
    v, p, s = everywhere(agreement.start(LIKE)), agreement.start(LIKE), agreement.start(LIKE)
    for step in range(5):
        g = gradients(jax.random.key(step))
        (v, wire), *others = by_vmap(g, v), by_pmap(g, p), by_shard(g, s)
        for found in others:
            jax.tree.map(lambda x, y: np.testing.assert_array_equal(everywhere(x), y), found, (v, wire))
        (p, _), (s, _) = others
    assert len(np.unique(v.products)) > 3


def test_one_device_alone_measures_nothing() -> None:
    state, wire = agreement.measure(LIKE, agreement.start(LIKE), None, 1.0)
    assert float(wire.payload_bits) == 0
    np.testing.assert_array_equal(agreement.agreement_ratio(state, None), 1.0)


def test_blocks_of_shards_lie_with_their_shards() -> None:
    state = gp.agreeing(gp.dense_mean("hosts"), "hosts").init(LIKE)
    specs = gp.state_specs(state, "hosts", model_axis="shards")
    assert specs.agreement.products == PartitionSpec(("shards",))
    assert specs.agreement.step == specs.agreement.measured == PartitionSpec()


@given(st.lists(st.lists(st.integers(0, 13), max_size=3), min_size=1, max_size=4))
@settings(max_examples=20)
def test_each_block_is_scaled_by_its_own_factor(shapes: list[list[int]]) -> None:
    tree = [jnp.ones(shape) for shape in shapes]
    counts = [-(-x.size // agreement.BLOCK) for x in tree]
    factors = np.arange(1.0, sum(counts) + 1, dtype=np.float32)
    scaled = agreement.scale_blocks(tree, jnp.asarray(factors))
    for leaf, own, like in zip(scaled, np.split(factors, np.cumsum(counts)[:-1]), tree, strict=True):
        np.testing.assert_array_equal(leaf, np.repeat(own, agreement.BLOCK)[: like.size].reshape(like.shape))


def test_adam_on_a_device_steps_as_behind_the_mean() -> None:
    inner = optax.chain(optax.scale_by_adam(b1=0.0, b2=0.99), gp.scale_by_agreement())
    tx = gp.agreeing(optax.chain(gp.local(inner), gp.dense_mean(AXIS)), AXIS, bits_per_element=32.0)
    behind = optax.scale_by_adam(b1=0.0, b2=0.99)

    def advance(states, key):
        g = gradients(key)
        updates, own = jax.vmap(tx.update, axis_name=AXIS)(g, states[0])
        expected, reference = behind.update(jax.tree.map(lambda x: jnp.mean(x, axis=0), g), states[1])
        return (own, reference), (updates, expected)

    start, keys = (everywhere(tx.init(LIKE)), behind.init(LIKE)), jax.random.split(jax.random.key(2), 200)
    _, (updates, expected) = jax.jit(lambda states: jax.lax.scan(advance, states, keys))(start)
    for name in ("agreed", "half", "noise"):
        mean = jnp.mean(updates[name][-1], axis=0)
        assert float(jnp.mean(mean**2)) == pytest.approx(float(jnp.mean(expected[name][-1] ** 2)), rel=0.2), name


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: optax.chain(gp.scale_by_agreement()).update(LIKE, (optax.EmptyState(),)), "wrap the whole optimizer"),
        (lambda: agreement.scale_blocks(LIKE, jnp.ones(3)), "3 blocks were measured, and updates have 26"),
        (lambda: gp.agreeing(optax.sgd(0.1), bits_per_element=0.0), "bits_per_element=0.0 is out of range"),
        (lambda: gp.agreeing(gp.local(optax.sgd(0.1)), AXIS).init(LIKE), "around the whole optimizer"),
        (lambda: gp.recipes.adam(0.1, agreement=1.0), "agreement=1.0 is out of range"),
        (lambda: gp.recipes.adam(0.1, agreement=0.1, replicate=True), "leave replicate=False"),
    ],
)
def test_bad_arguments_are_named(make, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()
