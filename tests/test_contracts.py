"""The contracts of every compressor, end to end: conservation, replicas, bytes, composition, bad numbers."""

import functools
import re
import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

import gradpart_jax as gp
from tests.devices import AXIS, W, assert_equal, flat, stack, unpadded

# On one worker, so that what several tests share is compiled once
pytestmark = pytest.mark.xdist_group("contracts")

PARAMS = {"bias": jnp.zeros(7), "kernel": jnp.zeros((40, 50)), "scale": jnp.zeros(())}
# Small trees have little room: 1.5 bits an element keeps all regions in play.
partition = functools.partial(gp.partition_compress, bits_per_element=1.5)
# Where learning has no part in the law: a third less to compile
unlearning = functools.partial(partition, learn_every=0)


def gradients(seed: int, like=PARAMS, devices: int = W):
    """Heavy-tailed gradients with a part that all devices share, stacked."""
    leaves, structure = jax.tree.flatten(like)
    keys = jax.random.split(jax.random.key(seed), 2 * len(leaves))
    made = [
        (jax.random.laplace(a, (devices, *leaf.shape)) ** 3 + jax.random.normal(b, (1, *leaf.shape))).astype(leaf.dtype)
        for leaf, a, b in zip(leaves, keys[::2], keys[1::2], strict=True)
    ]
    return jax.tree.unflatten(structure, made)


@functools.cache
def many(tx):
    """W devices by vmap over stacked gradients and states."""
    return jax.jit(jax.vmap(lambda g, s: tx.update(g, s), axis_name=AXIS))


DEFAULT = partition(AXIS)
WARM = partition(AXIS, warmup_steps=2, momentum=0.9, learn_every=3)
DENSE = gp.dense_mean(AXIS)


@pytest.mark.optimised
@pytest.mark.parametrize("rungs", [1, pytest.param(2, marks=pytest.mark.deep)])  # each is one more branch to compile
def test_replicas_are_bit_equal_for_80_steps_under_pmap_and_equal_vmap_and_shard_map(rungs) -> None:
    """The same updates, bit for bit, three ways; the pmapped step is traced once."""
    tx = partition(AXIS, learn_every=20, momentum=0.5, memory_allowance=0.3, rungs=rungs)
    state = tx.init(PARAMS)
    axes = gp.state_axes(state)
    traces = 0

    def step(g, s):
        nonlocal traces
        traces += 1
        return tx.update(g, s)

    mesh = jax.make_mesh((W,), (AXIS,), axis_types=(jax.sharding.AxisType.Auto,))
    specs = jax.tree.map(
        lambda a: PartitionSpec() if a is None else PartitionSpec(AXIS), axes, is_leaf=lambda a: a is None
    )
    by_pmap = jax.pmap(step, AXIS, in_axes=(0, axes), out_axes=(0, axes))

    def on_shard(g, s):
        local = jax.tree.map(lambda x, a: x if a is None else x[0], s, axes, is_leaf=lambda a: a is None)
        out, new = tx.update(jax.tree.map(lambda x: x[0], g), local)
        new = jax.tree.map(lambda x, a: x if a is None else x[None], new, axes, is_leaf=lambda a: a is None)
        return jax.tree.map(lambda x: x[None], out), new

    both = (PartitionSpec(AXIS), specs)
    placements = jax.tree.map(lambda spec: NamedSharding(mesh, spec), both)
    by_shard = jax.jit(
        jax.shard_map(on_shard, mesh=mesh, in_specs=both, out_specs=both, check_vma=False),
        in_shardings=placements,
        out_shardings=placements,  # else the second call is compiled anew
    )
    place = lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec))  # noqa: E731
    mixed = jax.tree.map(
        lambda x, a: x if a is None else jnp.broadcast_to(x, (W, *x.shape)),
        state,
        axes,
        is_leaf=lambda a: a is None,
    )
    p_state = s_state = jax.tree.map(place, mixed, specs)
    v_state = stack(state)
    for i in range(80):
        g = gradients(i)
        placed = jax.tree.map(lambda x: place(x, PartitionSpec(AXIS)), g)
        p_out, p_state = by_pmap(placed, p_state)
        if i < 15:
            v_out, v_state = many(tx)(g, v_state)
            s_out, s_state = by_shard(placed, s_state)
            assert_equal(p_out, v_out)
            assert_equal(p_out, s_out)
        for leaf in jax.tree.leaves(p_out):
            assert (np.asarray(leaf) == np.asarray(leaf)[0]).all()
    for leaf, axis in zip(jax.tree.leaves(p_state), jax.tree.leaves(axes, is_leaf=lambda a: a is None), strict=True):
        if axis is None:
            copies = [np.asarray(shard.data) for shard in leaf.addressable_shards]
            assert all((c == copies[0]).all() for c in copies)
    assert traces == 1


MIXED = {"bias": jnp.zeros(7, jnp.bfloat16), "kernel": jnp.zeros((40, 50), jnp.float16), "scale": jnp.zeros(())}


@pytest.mark.parametrize("tx", [DEFAULT, DENSE], ids=["partition", "dense"])
@pytest.mark.parametrize("like", [PARAMS, MIXED], ids=["float32", "mixed"])
def test_dtypes_and_state_stay(tx, like) -> None:
    state = stack(tx.init(like))
    out, new = many(tx)(gradients(0, like), state)
    kinds = jax.tree.map(lambda x: (x.shape[1:], x.dtype), out)
    assert kinds == jax.tree.map(lambda x: (x.shape, x.dtype), like)
    same = jax.tree.map(lambda a, b: a.shape == b.shape and a.dtype == b.dtype, state, new)
    assert all(jax.tree.leaves(same))
    assert jax.tree.structure(state) == jax.tree.structure(new)
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(new[0] if like is PARAMS else new.memory))


@pytest.mark.parametrize("exchange", ["all_gather", "reduce_scatter", "leader"])
def test_with_64_bits_enabled_the_state_keeps_its_32_and_updates_their_own(exchange: str) -> None:
    like = {"coarse": jnp.zeros((40, 50)), "fine": np.zeros(7)}
    tx = gp.recipes.adamw(1e-3, AXIS, ratio=20, exchange=exchange, devices=W, warmup_steps=2)
    narrow = jax.eval_shape(tx.init, like)
    with jax.enable_x64(True):
        wide = jax.eval_shape(tx.init, like)
        stacked = [jax.tree.map(lambda x: jax.ShapeDtypeStruct((W, *x.shape), x.dtype), t) for t in (like, wide)]
        out, new = jax.eval_shape(jax.vmap(tx.update, axis_name=AXIS), *stacked, stacked[0])
    assert out["fine"].dtype == np.float64
    assert out["coarse"].dtype == np.float32
    assert [x.dtype for x in jax.tree.leaves(new)] == [x.dtype for x in jax.tree.leaves(wide)]
    kinds = [jax.tree.map(lambda x: x.dtype, state.inner.exchange) for state in (narrow, wide)]
    assert kinds[0] == kinds[1]


def test_what_waits_does_not_become_infinite_in_half_precision() -> None:
    tx = gp.compress(gp.baselines.topk(0.01))
    gradient = jnp.full(2000, 3e4, jnp.float16)
    state = tx.init(gradient)
    for _ in range(5):
        out, state = tx.update(gradient, state)
    assert float(jnp.max(out)) == float(jnp.finfo(jnp.float16).max)


@settings(max_examples=8)
@given(seed=st.integers(0, 2**31 - 1), scale=st.sampled_from([1e-20, 1e-3, 1.0, 1e12]))
def test_conservation(seed: int, scale: float) -> None:
    """What went in equals what was sent and what is remembered, for three steps, summed over devices."""
    state = stack(DEFAULT.init(PARAMS))
    for i in range(3):
        g = jax.tree.map(lambda x: x * scale, gradients(seed % 1000 + i))
        before = unpadded(state.memory.residual, PARAMS) + flat(g)
        out, state = many(DEFAULT)(g, state)
        sent = before - unpadded(state.memory.residual, PARAMS)
        np.testing.assert_allclose(flat(out)[0], sent.mean(0), rtol=3e-6, atol=1e-6 * np.abs(before).max())


def test_what_is_not_sent_is_kept_exactly_and_what_is_sent_leaves_an_exact_rest() -> None:
    """One device: a - decoded is exact where decoded is within a factor two of a, and a where nothing was sent."""
    tx = unlearning()
    state = tx.init(PARAMS)
    update = jax.jit(tx.update)
    exact = total = 0
    for i in range(20):
        g = jax.tree.map(lambda x: x[0], gradients(i))
        kept = unpadded(state.memory.residual[None], PARAMS)[0].astype(np.float32)
        a = kept + flat(jax.tree.map(lambda x: x[None], g), 1)[0].astype(np.float32)
        out, state = update(g, state)
        decoded = flat(jax.tree.map(lambda x: x[None], out), 1)[0]
        rest = unpadded(state.memory.residual[None], PARAMS)[0]
        quiet = decoded == 0
        np.testing.assert_array_equal(rest[quiet], a[quiet])
        within = ~quiet & (np.abs(decoded) <= 2 * np.abs(a)) & (2 * np.abs(decoded) >= np.abs(a))
        np.testing.assert_array_equal((a.astype(np.float64) - decoded)[within], rest[within])
        exact, total = exact + within.sum(), total + (~quiet).sum()
        # The sparse region's one level is the mean of what is sent by it
        levels, counts = np.unique(np.abs(decoded[~quiet]), return_counts=True)
        level = levels[counts.argmax()]
        assert np.mean(np.abs(a[np.abs(decoded) == level])) == pytest.approx(level, rel=1e-3)
    assert exact > 0.9 * total > 0


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -jnp.inf])
@pytest.mark.parametrize("tx", [DEFAULT, WARM, DENSE], ids=["partition", "warm", "dense"])
def test_a_nonfinite_gradient_on_one_device_changes_nothing_anywhere(tx, bad: float) -> None:
    state = stack(tx.init(PARAMS))
    for i in range(3):
        _, state = many(tx)(gradients(i), state)
    g = gradients(9)
    g["kernel"] = g["kernel"].at[2, 5, 5].set(bad)
    out, new = many(tx)(g, state)
    assert_equal(out, jax.tree.map(jnp.zeros_like, out))
    assert_equal(new.memory, state.memory)
    assert_equal(new.scheme, state.scheme)
    assert (new.stats.nonfinite == 1).all()
    _, again = many(tx)(gradients(10), new)
    assert (again.stats.nonfinite == 1).all()


def test_zero_gradients_are_zero_and_do_no_harm() -> None:
    state = stack(DEFAULT.init(PARAMS))
    zeros = jax.tree.map(jnp.zeros_like, gradients(0))
    for _ in range(3):
        out, state = many(DEFAULT)(zeros, state)
        assert_equal(out, zeros)
    for i in range(5):
        out, state = many(DEFAULT)(gradients(i), state)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(state))
    assert gp.stats(state).sent[0] > 0.9 * gp.stats(state).capacity[0]


LAYERS = {name: jnp.zeros((24, 50)) for name in "abcdef"}
BUDGETED = partition(AXIS, ratio=50, bits_per_element=None)


@pytest.mark.parametrize("before", [0.0, 1e-6])
def test_a_layer_that_wakes_late_stalls_no_other(before: float) -> None:
    """An expert, an embedding, an unfrozen layer: what it suddenly has to send is no more than what others have."""
    like, tx, late = LAYERS, BUDGETED, 37
    state, sent, bits = stack(tx.init(like)), [], []
    for i in range(late + 3):
        g = jax.tree.map(jnp.sign, gradients(i, like))
        g = jax.tree.map(lambda x: x * (1 + 0.1 * jax.random.normal(jax.random.key(x.size), x.shape)), g)
        out, state = many(tx)(g | {"c": g["c"] * (before if i < late else 1.0)}, state)
        sent.append([np.linalg.norm(out[name][0]) for name in like])
        bits.append(float(state.stats.payload_bits[0]))
    usual = np.mean(sent[late - 10 : late], axis=0)
    others = [at for at, name in enumerate(like) if name != "c"]
    # One step shows it, the next one is right
    assert (np.array(sent[late + 1 :])[:, others] > 0.5 * usual[others]).all()
    assert np.sum(sent[late + 1 :], axis=0)[2] > 0.5 * np.mean(usual[others])
    assert bits[late + 1] > bits[late]  # a histogram, which is counted


def test_layers_that_are_active_in_turn_keep_the_budget() -> None:
    """Experts, of which each step takes one: histograms out of turn are no more than those in turn, in the long run."""
    state, bits = stack(BUDGETED.init(LAYERS)), []
    for i in range(120):
        active = "abcdef"[i * 5 % 6]
        g = {name: x * (name == active) for name, x in gradients(i, LAYERS).items()}
        _, state = many(BUDGETED)(g, state)
        bits.append(float(state.stats.payload_bits[0]))
    assert np.mean(bits[40:]) < 1.1 * float(state.stats.dense_payload_bits[0]) / 50


@pytest.mark.parametrize("name", ["partition", "topk", "randomk", "signsgd", "sidco", "oktopk", "lgc", "dgc"])
def test_strict_promotion_and_warnings_as_errors_in_the_program_are_borne(name: str) -> None:
    tx = partition(AXIS) if name == "partition" else gp.compress(getattr(gp.baselines, name)(), AXIS)
    with jax.numpy_dtype_promotion("strict"), warnings.catch_warnings():
        warnings.simplefilter("error")  # deprecations too
        state = jax.eval_shape(jax.vmap(lambda _: tx.init(PARAMS)), jnp.zeros(W))
        out, again = jax.eval_shape(jax.vmap(tx.update, axis_name=AXIS), gradients(0), state)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), again) == jax.tree.map(lambda x: (x.shape, x.dtype), state)
    assert jax.tree.map(jnp.shape, out) == jax.tree.map(jnp.shape, gradients(0))


def test_numpy_numbers_are_numbers() -> None:
    given = gp.partition_compress(
        AXIS, ratio=np.float32(100), exchange="reduce_scatter", devices=np.int64(4), error_feedback=np.True_
    )
    usual = gp.partition_compress(AXIS, ratio=100.0, exchange="reduce_scatter", devices=4)
    assert jax.eval_shape(given.init, PARAMS) == jax.eval_shape(usual.init, PARAMS)


@pytest.mark.parametrize(
    "like",
    [
        jnp.zeros(()),
        {"a": jnp.zeros(0), "b": jnp.zeros(3)},
        [jnp.zeros(0)],
        {},
        [jnp.zeros((3, 0, 2)), jnp.zeros(3000)],
    ],
    ids=["scalar", "empty and three", "empty", "none", "empty and many"],
)
def test_odd_trees(like) -> None:
    tx = unlearning(AXIS, bits_per_element=1.0)
    g = gradients(0, like)
    state = stack(tx.init(like))
    out, state = many(tx)(g, state)
    assert jax.tree.structure(out) == jax.tree.structure(g)
    if sum(x.size for x in jax.tree.leaves(like)) <= 3:
        jax.tree.map(lambda o, x: np.testing.assert_allclose(o[0], x.mean(0), rtol=1e-6), out, g)


@pytest.mark.parametrize("exchange", ["all_gather", "reduce_scatter", "leader"])
def test_capacity_for_all_is_the_dense_mean(exchange: str) -> None:
    tx = gp.partition_compress(AXIS, ratio=1, exchange=exchange, devices=W)
    g = gradients(3)
    out, _ = many(tx)(g, stack(tx.init(PARAMS)))
    dense, _ = many(DENSE)(g, stack(DENSE.init(PARAMS)))
    assert_equal(out, dense)


def test_dense_warm_up_is_the_dense_mean_and_counts_as_such() -> None:
    tx = unlearning(AXIS, warmup_steps=2)
    state = stack(tx.init(PARAMS))
    for i in range(3):
        g = gradients(i)
        out, state = many(tx)(g, state)
        stats = gp.stats(state)
        if i < 2:
            assert_equal(out, many(DENSE)(g, stack(DENSE.init(PARAMS)))[0])
            assert stats.payload_ratio[0] <= 1.0
            assert not np.asarray(state.memory.residual).any()
        else:
            assert stats.payload_ratio[0] > 15.0
    # A layer of zeros calls for no histogram out of turn
    _, begun = many(tx)(gradients(0) | {"kernel": jnp.zeros_like(g["kernel"])}, stack(tx.init(PARAMS)))
    assert not begun.scheme.shared.stirred.any()
    # As after 2^31 steps
    shared = state.scheme.shared._replace(step=jnp.full(W, -(2**31), jnp.int32))
    _, state = many(tx)(gradients(3), state._replace(scheme=state.scheme._replace(shared=shared)))
    assert gp.stats(state).payload_ratio[0] > 15.0


def test_a_forecast_that_is_far_off_still_fills_the_payload() -> None:
    """Gradients a hundred times larger or smaller than any step before, or dying away as at the end of training."""
    state = stack(DEFAULT.init(PARAMS))
    for i, scale in enumerate([1.0, 1.0, 1.0, 100.0, 1.0, 1e4, 1e4, 1e-2, *(0.7**i for i in range(60))]):
        _, state = many(DEFAULT)(jax.tree.map(lambda g, s=scale: s * g, gradients(i)), state)
        stats = gp.stats(state)
        np.testing.assert_array_equal(stats.sent, stats.capacity)


def test_the_budget_holds_on_average_everything_counted() -> None:
    like = {"w": jnp.zeros((200, 200)), "b": jnp.zeros(200)}
    tx = gp.partition_compress(AXIS, ratio=50)
    state, bits = stack(tx.init(like)), []
    every = 64
    for i in range(every):
        _, state = many(tx)(gradients(i % 4, like), state)
        bits.append(float(gp.stats(state).payload_bits[0]))
    elements = 40_200
    assert np.mean(bits) <= 32 / 50 * elements
    before, after = tx.init(like).scheme.shared.weights, state.scheme.shared.weights
    assert not any(jax.tree.leaves(jax.tree.map(np.allclose, before, after)))  # what histograms cost is learnt from


def test_the_accounting_is_what_the_compiled_collectives_carry() -> None:
    """Operand sizes read from the compiled text of a step without, and of one with, its histogram."""
    tx = partition(AXIS, learn_every=5, rungs=2)
    state = tx.init(PARAMS)
    axes = gp.state_axes(state)
    mixed = jax.tree.map(lambda x, a: x if a is None else stack(x), state, axes, is_leaf=lambda a: a is None)
    step = jax.pmap(tx.update, AXIS, in_axes=(0, axes), out_axes=(0, axes))
    text = step.lower(gradients(0), mixed).compile().as_text()
    gathers = [np.prod([int(n) for n in m.split(",")]) for m in re.findall(r"= u32\[([\d,]+)\]\S* all-gather\(", text)]
    reduces = re.findall(r"= (?:s32|f32)\[([\d,]*)\]\S* all-reduce\(", text)
    together = re.findall(r"= \(([^)]*)\) all-reduce\(", text)
    sizes = list(reduces) + [m for t in together for m in re.findall(r"(?:s32|f32)\[([\d,]*)\]", t)]
    reduced = sum(int(np.prod([int(n) for n in m.split(",") if n])) for m in sizes)
    others = re.findall(r"(?:all-to-all|collective-permute|reduce-scatter|collective-broadcast)\(", text)
    assert not others
    assert len(gathers) == 2  # a rung each
    _, mixed = step(gradients(0), mixed)
    first = gp.stats(mixed)
    _, mixed = step(gradients(1), mixed)
    second = gp.stats(mixed)
    payload, agreement = 32 * max(gathers) / W, 32
    assert float(second.payload_bits) == payload + agreement
    assert float(second.link_bits) == payload * (W - 1) + agreement * 2 * (W - 1) / W
    assert float(first.payload_bits) == payload + 32 * reduced
    assert float(first.link_bits) == payload * (W - 1) + 32 * reduced * 2 * (W - 1) / W
    elements = sum(x.size for x in jax.tree.leaves(PARAMS))
    assert float(first.dense_payload_bits) == 32 * elements
    assert float(first.dense_link_bits) == 32 * elements * 2 * (W - 1) / W


def test_a_step_takes_the_smallest_rung_that_holds_every_device() -> None:
    """A gradient with few entries goes in the small payload; one device with many takes all to the large one."""
    tx = unlearning(AXIS, bits_per_element=3.2, rungs=2)
    state, sizes = stack(tx.init(PARAMS)), []
    few = gradients(0)
    few = jax.tree.map(lambda g: jnp.where(jnp.arange(g[0].size).reshape(g[0].shape) % 50 == 7, g, 0.0), few)
    one = jax.tree.map(lambda a, b: a.at[1].set(b[1]), few, gradients(1))
    step = many(tx)
    # In steps that are powers of two a histogram is sent besides, while there are leaves that have shown only zeros.
    for gradient in (*[few] * 5, one):
        out, state = step(gradient, state)
        sizes.append(float(gp.stats(state).payload_bits[0]))
        if gradient is few:  # all of it fits: nothing is owed but quantisation error
            residual = state.memory.residual
            assert int(jnp.sum(residual != 0)) <= sum(int(jnp.sum(g != 0)) for g in jax.tree.leaves(few))
            assert all(
                bool(jnp.all((o[0] != 0) == jnp.any(g != 0, axis=0)))
                for o, g in zip(*map(jax.tree.leaves, (out, few)), strict=True)
            )
    assert sizes[3] < 0.5 * sizes[5]


def test_a_state_stacked_whole_works_under_pmap() -> None:
    tx = gp.compress(gp.baselines.topk(0.1), AXIS)
    state = stack(tx.init(PARAMS))
    out, new = jax.pmap(tx.update, AXIS)(gradients(0), state)
    expected, _ = many(tx)(gradients(0), state)
    assert_equal(out, expected)
    assert gp.stats(new).sent.shape == (W,)


def test_an_axis_that_is_forgotten_is_warned_of() -> None:
    alone = gp.compress(gp.baselines.dense())
    with pytest.warns(UserWarning, match=f"axis_name=None, where '{AXIS}' is mapped: .* give axis_name='{AXIS}'"):
        jax.eval_shape(jax.pmap(alone.update, AXIS), gradients(0), stack(alone.init(PARAMS)))
    jax.eval_shape(jax.pmap(alone.update, AXIS), gradients(0, devices=1), stack(alone.init(PARAMS), 1))


def test_already_summed_gradients_of_shard_map_and_their_cure() -> None:
    """Under check_vma=True gradients of unvarying parameters arrive summed; pcast makes them local again."""
    mesh = jax.make_mesh((W,), (AXIS,), axis_types=(jax.sharding.AxisType.Auto,))

    def gradient(cured: bool):
        def local(w, x):
            if cured:
                w = jax.lax.pcast(w, AXIS, to="varying")
            return jax.grad(lambda w: jnp.sum(w * x))(w)[None]

        run = jax.shard_map(
            local,
            mesh=mesh,
            in_specs=(PartitionSpec(), PartitionSpec(AXIS)),
            out_specs=PartitionSpec(AXIS) if cured else PartitionSpec(None),
        )
        return np.asarray(run(jnp.float32(1.0), jnp.arange(4.0)))

    assert gradient(cured=True).tolist() == [0.0, 1.0, 2.0, 3.0]
    assert gradient(cured=False).tolist() == [6.0]


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(1)(nn.relu(nn.Dense(64)(x)))


X = jax.random.normal(jax.random.key(0), (64, 16))
Y = jnp.sum(X[:, :3], axis=1, keepdims=True)


def squared(params) -> jax.Array:
    return jnp.mean((Net().apply(params, X) - Y) ** 2)


def run(tx, steps: int = 60) -> float:
    state = TrainState.create(apply_fn=Net().apply, params=Net().init(jax.random.key(1), X), tx=tx)

    @jax.jit
    def step(state):
        return state.apply_gradients(grads=jax.grad(squared)(state.params))

    for _ in range(steps):
        state = step(state)
    return float(squared(state.params))


# What wraps a transformation sees none of its inside: a compressor that compiles fast serves.
cheap = functools.partial(gp.compress, gp.baselines.topk(0.1))

COMPOSED = {
    "chain": lambda: optax.chain(optax.clip_by_global_norm(1.0), unlearning(), optax.sgd(0.1)),
    "masked": lambda: optax.chain(
        optax.masked(cheap(), lambda p: jax.tree.map(lambda x: x.ndim > 1, p)), optax.adam(1e-2)
    ),
    "multi_transform": lambda: optax.chain(
        optax.multi_transform(
            {"big": cheap(), "small": gp.dense_mean()},
            lambda p: jax.tree.map(lambda x: "big" if x.ndim > 1 else "small", p),
        ),
        optax.adam(1e-2),
    ),
    "inject_hyperparams": lambda: optax.chain(
        optax.inject_hyperparams(gp.partition_compress, static_args=gp.STATIC_ARGS)(
            bits_per_element=1.5, memory_decay=optax.linear_schedule(0.9, 1.0, 10)
        ),
        optax.adam(1e-2),
    ),
    "MultiSteps": lambda: optax.MultiSteps(
        optax.chain(unlearning(), optax.adam(2e-2)), every_k_schedule=2
    ).gradient_transformation(),
    "apply_if_finite": lambda: optax.apply_if_finite(optax.chain(cheap(), optax.adam(1e-2)), 3),
}


@pytest.mark.parametrize("name", COMPOSED)
def test_it_composes_and_learns(name: str) -> None:
    assert run(COMPOSED[name]()) < 0.5 * float(squared(Net().init(jax.random.key(1), X)))


def test_it_composes_with_nnx_optimizer() -> None:
    model = nnx.Linear(16, 1, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.chain(unlearning(bits_per_element=8.0), optax.sgd(0.01)), wrt=nnx.Param)
    loss = lambda m: jnp.mean((m(X) - Y) ** 2)  # noqa: E731
    before = float(loss(model))

    @nnx.jit
    def step(model, optimizer):
        optimizer.update(model, nnx.grad(loss)(model))

    # One entry of 17 fits a payload: each waits long, so that the learning rate must be small.
    for _ in range(300):
        step(model, optimizer)
    assert float(loss(model)) < 0.5 * before
    assert float(f"{gp.stats(optimizer.opt_state).payload_ratio:.2f}") >= 1
    with pytest.raises(ValueError, match=r"pass opt_state"):
        gp.stats(nnx.state(optimizer))


def test_the_state_is_a_scan_carry() -> None:
    def body(state, g):
        out, state = DEFAULT_ALONE.update(g, state, value=1.0)
        return state, optax.tree.norm(out)

    stacked = jax.tree.map(lambda *x: jnp.stack(x), *[jax.tree.map(lambda x: x[0], gradients(i)) for i in range(3)])
    _, norms = jax.lax.scan(body, DEFAULT_ALONE.init(PARAMS), stacked)
    assert norms.shape == (3,)
    assert (norms > 0).all()


DEFAULT_ALONE = partition()


@pytest.mark.parametrize(
    ("broken", "named"),
    [
        (lambda made, state: (made._replace(mean=made.mean[:3]), state), "'mean': shapes"),
        (lambda made, state: (made._replace(finite=jnp.float32(1.0)), state), "'finite': types: float32 != bool"),
        (lambda made, state: (made, state._replace(shared=jnp.zeros(2))), "the state first"),
    ],
)
def test_a_scheme_that_breaks_its_contract_is_told_how(broken, named) -> None:
    dense = gp.baselines.dense()
    scheme = dense._replace(name="mine", reduce=lambda *given: broken(*dense.reduce(*given)))
    tx = gp.compress(scheme)
    with pytest.raises(TypeError, match=rf"(?s){named}.*'mine'|'mine'.*{named}"):
        tx.update(PARAMS, tx.init(PARAMS))


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"ratio": 100, "bits_per_element": 0.3}, ValueError, "give one of them"),
        ({"ratio": 0.5}, ValueError, "ratio=0.5"),
        ({"ratio": "high"}, TypeError, "ratio='high'"),
        ({"ratio": float("inf")}, ValueError, "ratio=inf is out of range: give a finite number at least 1"),
        ({"bits_per_element": 0.0}, ValueError, "bits_per_element=0.0"),
        ({"bits_per_element": 33}, ValueError, "bits_per_element=33"),
        ({"bits_per_element": float("nan")}, ValueError, "bits_per_element=nan"),
        ({"bits_per_element": jnp.float32(0.3)}, TypeError, "STATIC_ARGS"),
        ({"momentum": 1.0}, ValueError, "momentum=1.0"),
        ({"momentum": 0.9, "error_feedback": False}, ValueError, "error_feedback"),
        ({"memory_decay": 0.0}, ValueError, "memory_decay=0.0"),
        ({"memory_allowance": -0.1}, ValueError, "memory_allowance=-0.1"),
        ({"warmup_steps": -1}, ValueError, "warmup_steps=-1"),
        ({"warmup_steps": 1.5}, TypeError, "warmup_steps=1.5"),
        ({"learn_every": -2}, ValueError, "learn_every=-2"),
        ({"key_bits": 1}, ValueError, "key_bits=1"),
        ({"family": "cauchy"}, ValueError, "laplace"),
        ({"family": ["laplace"]}, ValueError, "family=['laplace'] is unknown"),
        ({"entropy_rule": "none"}, ValueError, "perplexity"),
        ({"entropy_rule": {}}, ValueError, "entropy_rule={} is unknown"),
        ({"seed": "a"}, TypeError, "seed='a'"),
    ],
)
def test_bad_arguments_are_named(arguments, error, words: str) -> None:
    with pytest.raises(error, match=re.escape(words)):
        gp.partition_compress(**arguments)


def test_bad_trees_and_states_are_named() -> None:
    with pytest.raises(TypeError, match="'a' is int32"):
        DEFAULT.init({"a": jnp.zeros(3, jnp.int32)})
    for tx in (DEFAULT, gp.recipes.adamw(0.1)):
        with pytest.raises(TypeError, match="leaf 'a' is 'x', which is no array"):
            tx.init({"a": "x"})
        with pytest.raises(TypeError, match=r"leaf 'a' is Dense(?s:.*) which is no array.* a pytree"):
            tx.init({"a": nn.Dense(1)})
    with pytest.raises(TypeError, match="not a Scheme"):
        gp.compress("topk")
    with pytest.raises(ValueError, match="call init with the same tree"):
        DEFAULT_ALONE.update({"other": jnp.zeros(5)}, DEFAULT_ALONE.init(PARAMS))
    for other in ({"error_feedback": False}, {"momentum": 0.9}, {"error_feedback": "ef21"}, {"family": "gamma"}):
        with pytest.raises(ValueError, match=r"state's \S+ has the shape .* the same arguments as update"):
            DEFAULT_ALONE.update(PARAMS, partition(**other).init(PARAMS))
    for other in (None, optax.adam(0.1).init(PARAMS)[0]):
        with pytest.raises(TypeError, match=f"update got {type(other).__name__}, which is no state of gp.compress"):
            DEFAULT_ALONE.update(PARAMS, other)
    for tx, maker in (
        (gp.recipes.adamw(0.1), "gp.agreeing"),
        (gp.recipes.sgd(0.1), "gp.local_updates"),
        (gp.local(optax.adam(0.1)), "gp.local"),
    ):
        with pytest.raises(TypeError, match=f"update got dict, which is no state of {maker}: give what init"):
            tx.update(PARAMS, PARAMS, tx.init(PARAMS))
    for axes in ({"axis_name": "nope"}, {"inner_axis": "nope"}, {"model_axis": "nope"}):
        tx = gp.compress(gp.baselines.topk(0.1), **axes)
        with pytest.raises(NameError, match="no axis 'nope' is mapped here: call update inside of"):
            tx.update(PARAMS, tx.init(PARAMS))
    with pytest.raises(NameError, match="no axis 'nope' is mapped here: call update inside of"):
        (lambda tx: tx.update(PARAMS, tx.init(PARAMS), PARAMS))(gp.recipes.adamw(1e-3, "nope"))
    with pytest.raises(ValueError, match="0 states"):
        gp.stats(optax.sgd(0.1).init(PARAMS))
    with pytest.raises(ValueError, match="2 states"):
        gp.stats((DEFAULT.init(PARAMS), DEFAULT.init(PARAMS)))
    with pytest.raises(ValueError, match="no forecast"):
        gp.inspect(DENSE.init(PARAMS))
    with pytest.raises(ValueError, match="family='cauchy' is unknown"):
        gp.inspect(DEFAULT.init(PARAMS), family="cauchy")
    with pytest.raises(ValueError, match=r"family='laplace' is not that of opt_state's predictor"):
        gp.inspect(DEFAULT.init(PARAMS), family="laplace")
