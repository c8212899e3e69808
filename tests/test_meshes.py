"""Meshes of two axes, by nested vmap and by shard_map over four virtual devices: the same bits."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import gradpart_jax as gp
from tests.devices import assert_equal, stack

pytestmark = pytest.mark.xdist_group("meshes")

PARAMS = {"bias": jnp.zeros(7, jnp.bfloat16), "kernel": jnp.zeros((40, 50))}
ELEMENTS = 2007


def gradients(seed: int, *axes: int, like=PARAMS):
    leaves, structure = jax.tree.flatten(like)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    made = [
        (jax.random.laplace(k, (*axes, *leaf.shape)) ** 3).astype(leaf.dtype)
        for k, leaf in zip(keys, leaves, strict=True)
    ]
    return jax.tree.unflatten(structure, made)


# What meshes ask of a compressor is the transformation's, whichever the scheme: this one compiles fast, and has a
# threshold of its own for each shard.
compress = functools.partial(gp.compress, gp.baselines.oktopk(0.1), momentum=0.5)


def nested(tx):
    return jax.jit(jax.vmap(jax.vmap(tx.update, axis_name="inner"), axis_name="outer"))


def on_mesh(tx):
    """The same by shard_map, with a leading axis of each mesh axis on everything."""
    mesh = jax.make_mesh((2, 2), ("outer", "inner"), axis_types=(AxisType.Auto, AxisType.Auto))

    def local(g, s):
        out = tx.update(*jax.tree.map(lambda x: x[0, 0], (g, s)))
        return jax.tree.map(lambda x: x[None, None], out)

    spec = P("outer", "inner")
    return jax.jit(jax.shard_map(local, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False))


@pytest.fixture(scope="module")
def flat():
    """Any steps on two devices."""
    tx = compress("outer")
    step = jax.jit(jax.vmap(lambda g, s: tx.update(g, s), axis_name="outer"))

    def run(gradients):
        state, outs = stack(tx.init(PARAMS), 2), []
        for g in gradients:
            out, state = step(g, state)
            outs.append(out)
        return outs, state

    return run


SCHEMES = {"bfloat16": gp.baselines.dense("bfloat16"), "signsgd": gp.baselines.signsgd()}


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_a_tuple_of_axes_is_one_axis(scheme) -> None:
    """Both deal parts to owners, and gather: what has an order of devices has that of the tuple."""
    tx, alone = (gp.compress(scheme, axes) for axes in (("outer", "inner"), "all"))
    flat = jax.jit(jax.vmap(alone.update, axis_name="all"))
    ends = []
    for step, axes in ((flat, (4,)), (nested(tx), (2, 2)), (on_mesh(tx), (2, 2))):
        state, outs = stack(alone.init(PARAMS), *axes), []
        for seed in range(2):
            out, state = jax.block_until_ready(step(gradients(seed, *axes), state))
            outs.append(out)
        ends.append(jax.tree.map(lambda x: x.reshape(-1), (outs, state)))
    assert_equal(ends[0], ends[1])
    assert_equal(ends[0], ends[2])


def louder(seed: int):
    """Gradients of two devices by two shards, the second shard's eight times as large."""
    return jax.tree.map(lambda x: x.at[:, 1].multiply(8), gradients(seed, 2, 2))


def both_ways(tx, gradient):
    """Three steps on a mesh of two by two, with the gradients of each step."""
    ways = {}
    for name, step in (("vmap", nested(tx)), ("shard_map", on_mesh(tx))):
        state, outs = stack(tx.init(PARAMS), 2, 2), []
        for i in range(3):
            out, state = step(gradient(i), state)
            outs.append(out)
        ways[name] = (outs, state)
    return ways


@pytest.fixture(scope="module")
def hierarchical():
    """Two hosts of two chips, both ways."""
    return both_ways(compress("outer", inner_axis="inner"), lambda step: gradients(step, 2, 2))


def test_hierarchical_steps_are_the_same_bits_by_vmap_and_shard_map(hierarchical) -> None:
    assert_equal(hierarchical["vmap"], hierarchical["shard_map"])


def test_chips_of_a_host_hold_the_same_memory_and_hosts_do_not(hierarchical) -> None:
    outs, state = hierarchical["vmap"]
    for leaf in jax.tree.leaves(state):
        np.testing.assert_array_equal(leaf[:, 0], leaf[:, 1])
    assert (state.memory.residual[0] != state.memory.residual[1]).any()
    for leaf in jax.tree.leaves((outs, state.scheme.shared, state.stats)):
        assert (leaf == leaf[:1, :1]).all()


def test_what_is_averaged_inside_and_exchanged_outside_is_counted(hierarchical) -> None:
    stats = jax.tree.map(lambda x: np.asarray(x)[0, 0], gp.stats(hierarchical["vmap"][1]))
    assert stats.inner_bits == 32 * ELEMENTS  # of a ring over two chips, in float32
    assert stats.dense_link_bits == 32 * ELEMENTS  # of a ring over two hosts
    assert 0 < stats.link_bits < 16 * ELEMENTS


def test_a_hierarchical_step_is_the_flat_step_of_averaged_gradients(hierarchical, flat) -> None:
    def averaged(seed):
        return jax.tree.map(lambda x: jnp.sum(x.astype(jnp.float32), axis=1) / 2, gradients(seed, 2, 2))

    outs, state = hierarchical["vmap"]
    expected, last = flat([averaged(i) for i in range(3)])
    for out, wide in zip(outs, expected, strict=True):
        assert_equal(jax.tree.map(lambda x: x[:, 0], out), jax.tree.map(lambda x, y: x.astype(y.dtype), wide, out))
    assert_equal(jax.tree.map(lambda x: x[:, 0], state.memory), last.memory)


@pytest.mark.parametrize("feedback", [True, "ef21"])
def test_one_shard_s_bad_number_makes_every_shard_skip(feedback) -> None:
    tx = gp.compress(gp.baselines.topk(0.1), "outer", model_axis="inner", error_feedback=feedback)
    step = nested(tx)
    state = stack(tx.init(PARAMS), 2, 2)
    _, state = step(gradients(0, 2, 2), state)
    bad = gradients(1, 2, 2)
    bad["kernel"] = bad["kernel"].at[1, 0, 3, 3].set(jnp.nan)
    out, new = step(bad, state)
    assert_equal(out, jax.tree.map(jnp.zeros_like, out))
    assert_equal(new._replace(stats=None), state._replace(stats=None))
    assert (new.stats.nonfinite == 1).all()


def test_shards_in_any_number_agree_that_all_is_finite() -> None:
    """The mean of as many ones is not 1."""
    tx = gp.compress(gp.baselines.randomk(0.1), "outer", model_axis="inner")
    g = jnp.ones((1, 41, 64))
    _, state = nested(tx)(g, stack(tx.init(g[0, 0]), 1, 41))
    assert (state.stats.nonfinite == 0).all()
    assert (state.scheme.shared == 1).all()


@pytest.fixture(scope="module")
def sharded():
    """Two devices of data by two of shards, both ways."""
    tx = compress("outer", model_axis="inner")
    return tx, both_ways(tx, louder)


def test_sharded_steps_are_the_same_bits_by_vmap_and_shard_map(sharded) -> None:
    assert_equal(sharded[1]["vmap"], sharded[1]["shard_map"])


def test_a_shard_is_compressed_as_if_it_were_alone(sharded, flat) -> None:
    outs, state = sharded[1]["vmap"]
    expected, last = flat([jax.tree.map(lambda x: x[:, 1].astype(jnp.float32), louder(i)) for i in range(3)])
    for out, alone in zip(outs, expected, strict=True):
        assert_equal(jax.tree.map(lambda x: x[:, 1], out), jax.tree.map(lambda x, y: x.astype(y.dtype), alone, out))
    assert_equal(jax.tree.map(lambda x: x[:, 1], state.memory), last.memory)
    np.testing.assert_array_equal(last.scheme.shared.threshold[:, None], state.scheme.shared.threshold[:, 1])
    assert (state.scheme.shared.threshold[:, 0] < state.scheme.shared.threshold[:, 1]).all()


def test_shards_share_statistics_that_are_one_number_and_nothing_else(sharded) -> None:
    tx, ways = sharded
    state = ways["vmap"][1]
    assert all(leaf.ndim > 0 for leaf in jax.tree.leaves(tx.init(PARAMS).scheme))
    stats = gp.stats(state)
    for leaf in stats:
        assert leaf.ndim > 2 or (leaf == leaf[0, 0]).all()
    assert (stats.inner_bits == 32 * (1 + 7)).all()  # a flag, and seven numbers averaged, on a ring of two


@pytest.mark.parametrize(
    ("axes", "words"),
    [
        ({"axis_name": "a", "inner_axis": "a"}, "give each axis of the mesh to one of them"),
        ({"axis_name": ("a", "b"), "model_axis": "b"}, "give each axis of the mesh to one of them"),
        ({"axis_name": ["a"]}, "axis_name=['a'] is no name of an axis"),
        ({"axis_name": ()}, "axis_name=() names no axis: give None"),
        ({"axis_name": 100}, "axis_name=100 is no name of an axis"),
        ({"inner_axis": {"a"}}, "inner_axis={'a'} is no name of an axis"),
        ({"model_axis": ("a", ["b"])}, "model_axis=('a', ['b']) is no name of an axis"),
    ],
    ids=str,
)
def test_an_axis_is_a_name_and_serves_once(axes, words: str) -> None:
    with pytest.raises((TypeError, ValueError), match=re.escape(words)):
        gp.partition_compress(**axes)
    if axes.keys() == {"axis_name"}:
        for wrap in (gp.agreeing, functools.partial(gp.local_updates, every=1, exchange=gp.dense_mean())):
            with pytest.raises((TypeError, ValueError), match=re.escape(words)):
                wrap(optax.sgd(0.1), **axes)


# Recipes: a whole training step under shard_map, its state where gp.state_specs says

X = jax.random.normal(jax.random.key(0), (8, 32))
Y = jnp.sin(X[:, :4])
WEIGHTS = {"w": jax.random.normal(jax.random.key(1), (32, 4)) / 6}
cheap = functools.partial(gp.compress, gp.baselines.topk(0.2))


def squared(params, x, y):
    return jnp.mean((x @ params["w"] - y) ** 2)


def mesh_of(*names: str):
    sizes = (4,) if len(names) == 1 else (2, 2)
    return jax.make_mesh(sizes, names, axis_types=(AxisType.Auto,) * len(names))


def by_data(tx, *, check_vma: bool, cured: bool = True):
    """One mesh axis, parameters replicated."""
    mesh = mesh_of("data")
    specs = gp.state_specs(jax.eval_shape(tx.init, WEIGHTS), "data")
    mapped = functools.partial(jax.shard_map, mesh=mesh, check_vma=check_vma)

    def step(params, state, x, y):
        local = jax.lax.pcast(params, "data", to="varying") if check_vma and cured else params
        updates, state = tx.update(jax.grad(squared)(local, x, y), state)
        return jax.tree.map(lambda p, u: p - 0.1 * u, params, updates), state

    init = jax.jit(jax.shard_map(tx.init, mesh=mesh, in_specs=P(), out_specs=specs, check_vma=False))
    return init, jax.jit(mapped(step, in_specs=(P(), specs, P("data"), P("data")), out_specs=(P(), specs)))


def run(tx, steps: int = 3, **options):
    init, step = by_data(tx, **options)
    params, state = WEIGHTS, init(WEIGHTS)
    for _ in range(steps):
        # One step at a time: virtual devices wait for one another, and few threads run them all.
        params, state = jax.block_until_ready(step(params, state, X, Y))
    return params, state


@pytest.mark.parametrize("exchange", ["all_gather", "reduce_scatter"])
def test_a_checked_step_is_traced_and_its_outputs_are_known_to_be_replicas(exchange: str) -> None:
    """Under check_vma=True the types prove what `state_axes` says, for every kind of collective."""
    tx = gp.partition_compress("data", bits_per_element=8.0, exchange=exchange, devices=4)
    _, step = by_data(tx, check_vma=True)
    specs = gp.state_specs(jax.eval_shape(tx.init, WEIGHTS), "data")
    state = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct((4 * x.shape[0], *x.shape[1:]) if s == P("data") else x.shape, x.dtype),
        jax.eval_shape(tx.init, WEIGHTS),
        specs,
        is_leaf=lambda x: isinstance(x, P),
    )
    params, _ = jax.eval_shape(step, WEIGHTS, state, X, Y)
    assert params["w"].shape == (32, 4)


def test_checked_and_unchecked_steps_are_the_same_bits() -> None:
    checked, unchecked = (run(cheap("data"), check_vma=check) for check in (True, False))
    assert_equal(checked, unchecked)
    for leaf in jax.tree.leaves(checked[0]):
        copies = [np.asarray(shard.data) for shard in leaf.addressable_shards]
        assert all((copy == copies[0]).all() for copy in copies)


def test_gradients_that_arrive_summed_are_wrong_and_pcast_cures_them() -> None:
    """Without pcast each device compresses the sum over devices: the mean is four times the gradient."""
    mean = jax.grad(squared)(WEIGHTS, X, Y)["w"]
    everything = functools.partial(gp.compress, gp.baselines.dense(), "data")
    for cured, factor in ((True, 1.0), (False, 4.0)):
        params, _ = run(everything(), steps=1, check_vma=True, cured=cured)
        np.testing.assert_allclose((WEIGHTS["w"] - params["w"]) / 0.1, factor * mean, rtol=2e-3, atol=1e-5)


@pytest.mark.parametrize("check_vma", [True, False])
def test_a_model_axis_exchanges_over_the_data_axis_alone(check_vma: bool) -> None:
    """Columns of the weights lie along `model`; the compressor sees one shard, moments are sharded like parameters."""
    mesh = mesh_of("data", "model")
    tx = optax.chain(cheap("data", model_axis="model"), optax.adam(0.01))
    sharded = {"w": P(None, "model")}
    local = jax.eval_shape(lambda w: {"w": w["w"][:, :2]}, WEIGHTS)
    specs = gp.state_specs(jax.eval_shape(tx.init, local), "data", model_axis="model", param_specs=sharded)
    assert specs[1][0].mu == sharded
    mapped = functools.partial(jax.shard_map, mesh=mesh, check_vma=check_vma)

    def step(params, state, x, y):
        varying = jax.lax.pcast(params, "data", to="varying") if check_vma else params
        updates, state = tx.update(jax.grad(squared)(varying, x, y), state, params)
        return optax.apply_updates(params, updates), state

    init = jax.jit(jax.shard_map(tx.init, mesh=mesh, in_specs=(sharded,), out_specs=specs, check_vma=False))
    train = jax.jit(mapped(step, in_specs=(sharded, specs, P("data"), P("data", "model")), out_specs=(sharded, specs)))
    params, state = WEIGHTS, init(WEIGHTS)
    assert gp.stats(state).threshold.shape == (2, 2)  # a row a segment, the two shards' side by side
    before = squared(params, X, Y)
    for _ in range(8):
        params, state = jax.block_until_ready(train(params, state, X, Y))
    assert squared(params, X, Y) < before
    assert gp.stats(state).dense_link_bits == 32 * 64  # of a shard's 64 weights, over two devices of data


def test_sharded_parameters_are_gathered_and_gradients_scattered_inside() -> None:
    """FSDP: `chips` hold a half of the weights each; hosts exchange each half's gradient, compressed."""
    mesh = mesh_of("hosts", "chips")
    tx = optax.chain(cheap("hosts", model_axis="chips"), optax.sgd(0.1))
    sharded = {"w": P("chips")}
    local = jax.eval_shape(lambda w: {"w": w["w"][:16]}, WEIGHTS)
    specs = gp.state_specs(jax.eval_shape(tx.init, local), "hosts", model_axis="chips", param_specs=sharded)

    def step(params, state, x, y):
        whole = jax.tree.map(lambda w: jax.lax.all_gather(w, "chips", tiled=True), params)
        gradient = jax.grad(squared)(whole, x, y)
        mine = jax.tree.map(lambda g: jax.lax.psum_scatter(g, "chips", tiled=True) / 2, gradient)
        updates, state = tx.update(mine, state, params)
        return optax.apply_updates(params, updates), state

    mapped = functools.partial(jax.shard_map, mesh=mesh, check_vma=False)
    rows = P(("hosts", "chips"))
    train = jax.jit(mapped(step, in_specs=(sharded, specs, rows, rows), out_specs=(sharded, specs)))
    state = jax.jit(mapped(tx.init, in_specs=(sharded,), out_specs=specs))(WEIGHTS)
    params, losses = WEIGHTS, []
    for _ in range(12):
        losses.append(float(squared(params, X, Y)))
        params, state = jax.block_until_ready(train(params, state, X, Y))
    assert losses[-1] < losses[0]
    assert gp.stats(state).dense_link_bits == 32 * 64


def test_a_number_of_one_device_cannot_be_laid_along_an_axis() -> None:
    state = optax.MultiSteps(optax.chain(cheap("data"), optax.sgd(0.1)), 2).init(jnp.float32(1.0))
    with pytest.raises(ValueError, match=r"map by gp\.over_devices"):
        gp.state_specs(state, "data")


def test_places_left_empty_among_parameters_stay_so() -> None:
    params = {"kernel": jnp.zeros((8, 2)), "static": None}
    state = optax.chain(cheap("data"), optax.adam(0.1)).init(params)
    shards = {"kernel": P("model"), "static": None}
    assert gp.state_specs(state, "data")[1][0].mu == {"kernel": P(), "static": None}
    assert gp.state_specs(state, "data", param_specs=shards)[1][0].mu == shards
