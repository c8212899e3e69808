"""Steps of each device's own, exchanges of what has changed, and the recipes made of them."""

import functools
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType

import gradpart_jax as gp
from gradpart_jax import unfolding
from gradpart_jax.segments import layout_of, ravel
from gradpart_jax.shares import scatter_share
from gradpart_jax.states import find_state
from tests.devices import AXIS, W, stack

pytestmark = pytest.mark.xdist_group("local")

STEPS = 6
PARAMS = {"bias": jnp.zeros(7), "kernel": jnp.zeros((40, 50))}
TARGET = jax.tree.map(lambda x: jax.random.normal(jax.random.key(x.size), x.shape), PARAMS)


def few(density: float = 0.05) -> optax.GradientTransformation:
    return gp.compress(gp.baselines.topk(density), AXIS)


def owners() -> optax.GradientTransformation:
    return gp.partition_compress(AXIS, ratio=20, exchange="reduce_scatter", devices=W)


def gradient(params, step, device):
    """Of a quadratic that no two devices see alike."""
    keys = jax.random.split(jax.random.fold_in(jax.random.fold_in(jax.random.key(0), step), device), 2)
    noise = jax.tree.unflatten(jax.tree.structure(params), list(keys))
    return jax.tree.map(
        lambda p, t, key: p - t.astype(p.dtype) + jax.random.normal(key, p.shape, p.dtype), params, TARGET, noise
    )


def advance(tx, params, state, step, device):
    updates, state = tx.update(gradient(params, step, device), state, params)
    return gp.apply_updates(params, updates, state), state


@functools.cache
def by_vmap(tx):
    one = functools.partial(advance, tx)
    return jax.jit(jax.vmap(one, (0, 0, None, 0), axis_name=AXIS))


def train(tx, steps: int, like=PARAMS, devices: int = W):
    """Parameters, state, and the statistics of every step, over devices by vmap."""
    params, state, seen = stack(like, devices), stack(tx.init(like), devices), []
    for step in range(steps):
        params, state = by_vmap(tx)(params, state, step, jnp.arange(devices))
        seen.append(jax.tree.map(lambda x: np.asarray(x)[0], gp.stats(state)))
    return params, state, seen


def equal_over_devices(tree) -> bool:
    return all(
        np.array_equal(np.asarray(x), np.broadcast_to(np.asarray(x)[:1], x.shape)) for x in jax.tree.leaves(tree)
    )


def test_an_uncompressed_exchange_averages_what_plain_local_steps_give() -> None:
    every = 3
    tx = gp.local_updates(optax.sgd(0.1, momentum=0.9), every=every, exchange=gp.dense_mean(AXIS), keep_own=0)
    params, _, seen = train(tx, STEPS)
    own = np.zeros((W, 2007))
    speed = np.zeros_like(own)
    shape = lambda x: {"bias": jnp.float32(x[:7]), "kernel": jnp.float32(x[7:].reshape(40, 50))}  # noqa: E731
    for step in range(STEPS):
        g = [np.concatenate([x.ravel() for x in jax.tree.leaves(gradient(shape(own[d]), step, d))]) for d in range(W)]
        speed = 0.9 * speed + np.stack(g)
        own = own - 0.1 * speed
        if step % every == every - 1:
            own[:] = own.mean(0)
    got = np.concatenate([np.asarray(x).reshape(W, -1) for x in jax.tree.leaves(params)], axis=1)
    np.testing.assert_allclose(got, own, atol=1e-5)
    # Bits are spent at each third step, and the ratio is that of a period
    assert [s.payload_bits > 0 for s in seen] == [False, False, True] * 2
    assert [float(s.payload_ratio) for s in seen] == [float(s.link_ratio) for s in seen] == [1, 1, 3, 3, 3, 3]
    dense, spent = (sum(float(getattr(s, k)) for s in seen) for k in ("dense_link_bits", "link_bits"))
    assert dense / spent == 3


def test_an_outer_optimizer_steps_on_the_mean_change() -> None:
    make = functools.partial(gp.local_updates, optax.sgd(0.1), every=2, exchange=gp.dense_mean(AXIS), keep_own=0)
    whole, part = (train(tx, 2)[0] for tx in (make(), make(outer=optax.sgd(0.5))))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, 2 * b, rtol=1e-5), whole, part)


@pytest.mark.optimised
@pytest.mark.parametrize(
    ("every", "keep_own", "way"),
    [
        pytest.param(1, None, "owners", marks=pytest.mark.deep),
        pytest.param(1, None, "few", marks=pytest.mark.deep),
        (3, 0, "few"),
    ],
)
def test_pmap_vmap_and_shard_map_give_the_same_bits_and_devices_agree(
    every: int, keep_own: float | None, way: str
) -> None:
    # The rate is a power of two: another product would be contracted with the sum in some programs only
    exchange = owners() if way == "owners" else few()
    tx = gp.local_updates(optax.sgd(0.125), every=every, exchange=exchange, keep_own=keep_own, axis_name=AXIS)
    state = tx.init(PARAMS)
    axes = gp.state_axes(state)
    mesh = jax.make_mesh((W,), (AXIS,), axis_types=(AxisType.Auto,), devices=jax.devices()[:W])
    missing = lambda a: a is None  # noqa: E731
    by_pmap = jax.pmap(functools.partial(advance, tx), AXIS, in_axes=(0, axes, None, 0), out_axes=(0, axes))
    by_shard = gp.over_devices(functools.partial(advance, tx), mesh, AXIS, (0, axes, None, 0), (0, axes))
    mixed = jax.tree.map(lambda x, a: x if a is None else stack(x), state, axes, is_leaf=missing)
    devices = jnp.arange(W)
    v, p, s = (stack(PARAMS), stack(state)), (stack(PARAMS), mixed), (stack(PARAMS), mixed)
    for step in range(STEPS):
        v, p, s = (run(*of, step, devices) for run, of in ((by_vmap(tx), v), (by_pmap, p), (by_shard, s)))
        for found in (p, s):
            jax.tree.map(np.testing.assert_array_equal, found[0], v[0])
        # What all share is the same, bit for bit; after an exchange without keep_own so are the parameters
        assert equal_over_devices(gp.agreed(*v))
        assert equal_over_devices(v[0]) == (every > 1 and step % every == every - 1)
    # Marked as replicated is what is, and nothing else: pmap would silently take one of differing values
    marks = jax.tree.leaves(axes, is_leaf=missing)
    for leaf, axis in zip(jax.tree.leaves(v[1]), marks, strict=True):
        assert axis == 0 or equal_over_devices(leaf)
    assert gp.params_axis(state) == 0


def test_a_device_goes_on_from_what_it_has_not_sent_and_nothing_is_lost() -> None:
    tx = gp.local_updates(optax.sgd(0.1), every=1, exchange=few(), keep_own=1.0)
    params, state, _ = train(tx, STEPS)
    owed = np.asarray(find_state(state).memory.residual)
    ahead = jax.tree.map(lambda a, p: np.asarray(a - p), gp.agreed(params, state), params)
    np.testing.assert_allclose(owed[:, :7], ahead["bias"], atol=1e-6)
    np.testing.assert_allclose(owed[:, 32:2032], ahead["kernel"].reshape(W, -1), atol=1e-6)
    assert np.abs(owed).max() > 0.01
    # By default, and by a rule, it goes on from a part, the smaller the fewer entries are sent (41 or 101, rounded up in
    # each leaf) and the more devices there are
    for every, density, rule, devices, share in (
        (1, 0.02, None, W, (41 / 2007) ** (1 / 3)),
        (1, 0.5, None, W, 1.4 / W),
        (1, 0.02, None, 4 * W, 1.4 / (4 * W)),
        (2, 0.02, None, W, 0.5),
        (2, 0.02, None, 2 * W, 2 / (2 * W)),
        (1, 0.05, unfolding.kept, W, (101 / 2007) ** (1 / 4)),
        (1, 0.05, unfolding.kept, 4 * W, 2 / (4 * W)),
    ):
        tx = gp.local_updates(optax.sgd(0.1), every=every, exchange=few(density), keep_own=rule, axis_name=AXIS)
        params, state, _ = train(tx, 4, devices=devices)
        ahead = gp.agreed(params, state)["bias"] - params["bias"]
        np.testing.assert_allclose(share * find_state(state).memory.residual[:, :7], ahead, atol=1e-6)
    forgetful = gp.compress(gp.baselines.topk(0.1), AXIS, error_feedback=False)
    tx = gp.local_updates(optax.sgd(0.1), every=1, exchange=forgetful, keep_own=1.0)
    with pytest.raises(ValueError, match="leave error_feedback on"):
        tx.init(PARAMS)


@pytest.mark.parametrize("every", [1, 2])
def test_a_gradient_that_is_not_finite_costs_its_device_one_step(every: int) -> None:
    tx = gp.local_updates(optax.adam(0.1), every=every, exchange=few())
    params, state = stack(PARAMS), stack(tx.init(PARAMS))
    run = jax.jit(jax.vmap(tx.update, axis_name=AXIS))
    grads = jax.vmap(lambda d: gradient(PARAMS, 0, d))(jnp.arange(W))
    grads["bias"] = grads["bias"].at[1, 3].set(jnp.nan)
    updates, after = run(grads, state, params)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((updates, after)))
    assert after.skipped.tolist() == [0, 1, 0, 0]
    assert after.inner[0].count.tolist() == [1, 0, 1, 1]


def test_an_update_that_is_not_finite_costs_its_device_one_step() -> None:
    tx = gp.local_updates(optax.scale(-1e38), every=2, exchange=few())
    params, state = stack(PARAMS), stack(tx.init(PARAMS))
    grads = jax.tree.map(lambda x: jnp.zeros_like(x).at[1].set(10.0), params)
    updates, after = jax.jit(jax.vmap(tx.update, axis_name=AXIS))(grads, state, params)
    assert not any(np.any(x) for x in jax.tree.leaves(updates))
    assert after.skipped.tolist() == [0, 1, 0, 0]


def test_a_transformation_before_the_exchange_is_marked_and_keeps_its_state_from_bad_numbers() -> None:
    tx = optax.chain(gp.local(optax.scale_by_adam()), few(), optax.scale(-0.1))
    state = tx.init(PARAMS)
    assert set(jax.tree.leaves(gp.state_axes(state)[0])) == {0}
    bad = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), stack(PARAMS))
    updates, after = jax.jit(jax.vmap(tx.update, axis_name=AXIS))(bad, stack(state))
    assert not any(np.any(x) for x in jax.tree.leaves(updates))
    jax.tree.map(np.testing.assert_array_equal, after[0], stack(state)[0])
    assert gp.stats(after).nonfinite.tolist() == [1] * W


def test_agreed_parameters_are_had_of_an_nnx_optimizer() -> None:
    model = nnx.Linear(16, 4, rngs=nnx.Rngs(0))
    tx = gp.local_updates(optax.sgd(0.1), every=1, exchange=gp.compress(gp.baselines.topk(0.5)))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    before = nnx.state(model, nnx.Param)
    for _ in range(2):
        optimizer.update(model, jax.tree.map(jnp.ones_like, before))
    params = nnx.state(model, nnx.Param)
    agreed = gp.agreed(params, optimizer.opt_state)
    assert jax.tree.structure(agreed) == jax.tree.structure(params)
    # Of all that was done half is agreed on, or less
    moved, told = (np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)]) for tree in (params, agreed))
    start = np.concatenate([np.ravel(x) for x in jax.tree.leaves(before)])
    assert np.any(told != start)
    assert np.any(told != moved)
    assert gp.params_axis(optimizer.opt_state) == 0


def test_an_exchange_of_some_leaves_is_refused() -> None:
    some = optax.masked(few(), {"bias": False, "kernel": True})
    tx = gp.local_updates(optax.sgd(0.1), every=1, exchange=some)
    with pytest.raises(ValueError, match=r"leaves some leaves out: put optax\.masked around local_updates"):
        train(tx, 1)


def test_of_several_exchanges_no_memory_is_gone_on_from() -> None:
    top = gp.baselines.topk(0.05)
    ways = {"memory": gp.compress(top), "estimate": gp.compress(top, error_feedback="ef21")}
    exchange = optax.multi_transform(ways, {"bias": "memory", "kernel": "estimate"})
    tx = gp.local_updates(optax.sgd(0.1), every=1, exchange=exchange)
    updates, state = tx.update(TARGET, tx.init(PARAMS), PARAMS)
    jax.tree.map(np.testing.assert_array_equal, updates, state.anchor)
    assert np.count_nonzero(updates["bias"]) == 1


def test_parameters_of_short_floats_are_agreed_on_too() -> None:
    short = jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS)
    tx = gp.local_updates(optax.sgd(0.1), every=2, exchange=few(), keep_own=0)
    params, state, _ = train(tx, 4, short)
    assert equal_over_devices(params)
    assert {x.dtype for x in jax.tree.leaves((params, state.anchor))} == {jnp.dtype(jnp.bfloat16)}


def test_short_floats_are_borne_where_a_program_promotes_types_strictly() -> None:
    tx = gp.recipes.sgd(0.1, ratio=10.0)
    with jax.numpy_dtype_promotion("strict"):
        params = {"kernel": jnp.zeros((8, 8), jnp.bfloat16)}
        updates, _ = jax.eval_shape(tx.update, params, tx.init(params), params)
    assert updates["kernel"].dtype == jnp.bfloat16


def loss_of(params) -> float:
    return float(sum(jnp.sum((p[0] - t) ** 2) for p, t in zip(*map(jax.tree.leaves, (params, TARGET)), strict=True)))


RATE = optax.cosine_decay_schedule(0.1, 60)
RECIPES = {
    "sgd": functools.partial(gp.recipes.sgd, RATE),
    "adamw": functools.partial(gp.recipes.adamw, RATE),
    "lion": functools.partial(gp.recipes.lion, RATE),
    "muon": functools.partial(gp.recipes.muon, optax.cosine_decay_schedule(0.5, 60)),
}


@pytest.mark.parametrize(
    ("name", "way"),
    [
        ("sgd", {"every": 1}),
        ("adamw", {"every": 1}),
        ("adamw", {"every": 4}),
        ("adamw", {"replicate": True}),
        ("lion", {"every": 4}),
        ("muon", {"every": 1}),
    ],
)
def test_recipes_learn_nearly_what_dense_training_learns(name: str, way: dict) -> None:
    dense = RECIPES[name](exchange=gp.dense_mean(AXIS), replicate=True)
    tx = RECIPES[name](exchange=few(0.05 * way.get("every", 1)), **way)
    best, nothing = loss_of(train(dense, 60)[0]), loss_of(stack(PARAMS))
    params, state, _ = train(tx, 60)
    assert loss_of(gp.agreed(params, state)) - best < 0.15 * (nothing - best)
    assert equal_over_devices(gp.agreed(params, state))
    if way == {"every": 1}:  # 101 of 2007 entries fit
        ahead = gp.agreed(params, state)["bias"] - params["bias"]
        share = (101 / 2007) ** (1 / 4 if name == "muon" else 1 / 3)
        np.testing.assert_allclose(share * find_state(state).memory.residual[:, :7], ahead, atol=1e-6)
    marks = jax.tree.leaves(gp.state_axes(state), is_leaf=lambda a: a is None)
    for leaf, axis in zip(jax.tree.leaves(state), marks, strict=True):
        assert axis == 0 or equal_over_devices(leaf)


@pytest.mark.parametrize("replicate", [False, True])
@pytest.mark.parametrize("name", ["sgd", "adamw", "lion"])
def test_an_uncompressed_recipe_of_one_device_is_optax_s_own(name: str, replicate: bool) -> None:
    decay = {"weight_decay": 0.1, "mask": {"bias": False, "kernel": True}}
    tx = getattr(gp.recipes, name)(0.1, exchange=gp.dense_mean(), replicate=replicate, **decay)
    usual = {
        "sgd": lambda: optax.chain(optax.add_decayed_weights(*decay.values()), optax.sgd(0.1, momentum=0.9)),
        "adamw": lambda: optax.adamw(0.1, nesterov=not replicate, **decay),
        "lion": lambda: optax.lion(0.1, **decay),
    }[name]()
    ends = []
    for optimizer in (tx, optax.chain(optax.clip_by_global_norm(1.0), usual)):
        params, state = TARGET, optimizer.init(TARGET)
        for step in range(3):
            updates, state = jax.jit(optimizer.update)(gradient(params, step, 0), state, params)
            params = optax.apply_updates(params, updates)
        ends.append(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), *ends)


@pytest.mark.parametrize(
    ("shape", "rows"), [((128, 4, 32), (0,)), ((4, 32, 128), (0, 1)), ((3, 3, 64, 128), (0, 1, 2)), ((5, 7), (0,))]
)
def test_tensors_unfold_into_matrices_near_to_squares(shape, rows) -> None:
    found = gp.unfolded(jnp.zeros(shape))
    assert found.reduction_axis == rows
    assert found.reduction_axis + found.output_axis == tuple(range(len(shape)))


def test_muon_leaves_to_adam_what_it_is_told_to() -> None:
    params = {"hidden": jnp.eye(4), "head": jnp.eye(4), "bias": jnp.ones(4)}
    gradient = jax.tree.map(lambda x: jnp.arange(x.size, dtype=jnp.float32).reshape(x.shape) ** 2 - 20.0, params)
    which = {"hidden": True, "head": False, "bias": False}

    def first_step(tx: optax.GradientTransformation) -> dict:
        return tx.update(gradient, tx.init(params), params)[0]

    muon = first_step(gp.recipes.muon(0.1, exchange=gp.dense_mean(None), replicate=True, which=which))
    adam = first_step(optax.chain(optax.clip_by_global_norm(1.0), optax.nadam(0.1)))
    for name, wanted in which.items():
        assert np.allclose(muon[name], adam[name], atol=1e-4) != wanted, name
    # An orthogonal factor of 4 x 4 has a root mean square of 1/2, here scaled to 0.2, times the rate
    assert float(jnp.sqrt(jnp.mean(muon["hidden"] ** 2))) == pytest.approx(0.02, rel=0.3)


def test_a_recipe_compresses_by_partition_at_the_ratio_asked_for() -> None:
    tx = gp.recipes.adamw(RATE, AXIS, ratio=40, every=2, learn_every=0)
    _, _, seen = train(tx, 40)
    assert sum(s.dense_payload_bits for s in seen) / sum(s.payload_bits for s in seen) == pytest.approx(40, rel=0.1)
    sparse = seen[-1].threshold[:, 0]
    assert sparse[0] == pytest.approx(sparse[1], rel=0.01)  # Adam brings leaves to one scale, and one threshold serves


def test_momentum_is_corrected_and_masked_where_partition_stands_behind_it() -> None:
    for options, corrected in (({}, True), ({"exchange": "leader", "devices": W}, True), ({"exchange": few()}, False)):
        tx = gp.recipes.sgd(0.1, AXIS, replicate=True, **options)
        memory = find_state(jax.eval_shape(tx.init, PARAMS)).memory
        assert (memory.velocity.size > 0) == corrected


def test_a_recipe_that_is_not_to_compress_does_not() -> None:
    tx = gp.recipes.adamw(RATE, AXIS, ratio=1)
    _, _, seen = train(tx, 2)
    assert float(seen[-1].payload_ratio) == 1.0


def test_ratios_of_a_period_count_what_was_told_in_all_of_its_steps() -> None:
    inner = gp.local_updates(optax.sgd(RATE), every=4, exchange=gp.partition_compress(AXIS, ratio=25, learn_every=0))
    _, _, seen = train(gp.agreeing(inner, AXIS, bits_per_element=0.08), 8)
    for first in (0, 4):
        period = seen[first : first + 4]
        assert all(s.payload_bits > 0 for s in period)
        used = sum(float(s.payload_bits) for s in period)
        assert float(period[-1].payload_ratio) == pytest.approx(float(period[-1].dense_payload_bits) / used, rel=1e-5)


def test_a_recipe_trains_over_the_devices_of_a_mesh_as_by_vmap() -> None:
    tx = gp.recipes.lion(2.0**-6, AXIS, exchange=few(), every=2)
    axes = 0, gp.state_axes(jax.eval_shape(tx.init, PARAMS))
    mesh = jax.make_mesh((W,), (AXIS,), axis_types=(AxisType.Auto,), devices=jax.devices()[:W])
    over = functools.partial(gp.over_devices, mesh=mesh, axis_name=AXIS)
    begin = over(lambda _: (PARAMS, tx.init(PARAMS)), in_axes=(0,), out_axes=axes)
    step = over(functools.partial(advance, tx), in_axes=(*axes, None, 0), out_axes=axes, donate_argnums=(0, 1))
    devices = jnp.arange(W)
    here, there = (stack(PARAMS), stack(tx.init(PARAMS))), begin(devices)
    for number in range(4):
        here, there = by_vmap(tx)(*here, number, devices), step(*there, number, devices)
        jax.block_until_ready(there)
    jax.tree.map(np.testing.assert_array_equal, there[0], here[0])
    assert step._cache_size() == 1
    assert gp.stats(there[1]).payload_bits == gp.stats(here[1]).payload_bits[0] > 0
    for odd in (jnp.arange(2 * W), jnp.arange(W - 1), 1.0):
        with pytest.raises(ValueError, match="on 4 devices: stack one row for each device"):
            begin(odd)
    with pytest.raises(ValueError, match="1 in_axes for 2 arguments"):
        begin(devices, devices)
    for name in (None, "nope", (AXIS, "nope")):
        with pytest.raises(ValueError, match="is no axis of the mesh: give one of"):
            over(lambda x: x, axis_name=name)
    with pytest.raises(TypeError, match=r"mesh=.* is no mesh: give jax\.make_mesh"):
        gp.over_devices(lambda x: x, jax.devices(), AXIS)
    # Every axis is the first where none is named, as pmap has it
    assert over(lambda x: x + W)(devices).tolist() == [4, 5, 6, 7]
    with pytest.raises(ValueError, match="1 in in_axes or out_axes"):
        over(lambda x: x, in_axes=1)(devices)


def test_steps_that_only_add_up_gradients_count_no_bits() -> None:
    recipe = gp.recipes.adamw(RATE, AXIS, exchange=gp.dense_mean(AXIS), replicate=True)
    tx = optax.MultiSteps(recipe, every_k_schedule=3).gradient_transformation()
    _, state, seen = train(tx, 9)
    assert set(jax.tree.leaves(gp.state_axes(state).acc_grads)) == {0}  # each device's own
    sent = [float(s.payload_bits) for s in seen]
    assert [bits > 0 for bits in sent] == [False, False, True] * 3
    assert [float(s.link_bits) > 0 for s in seen] == [False, False, True] * 3
    assert [float(s.dense_link_bits) for s in seen] == [float(s.link_bits) for s in seen]
    twice = optax.MultiSteps(tx, every_k_schedule=2).gradient_transformation()
    _, _, seen = train(twice, 12)
    assert [float(s.payload_bits) > 0 for s in seen] == [step in (5, 11) for step in range(12)]


def test_agreement_of_other_gradients_than_the_optimizer_sees_is_refused() -> None:
    accumulating = optax.MultiSteps(gp.local_updates(optax.adam(RATE), every=1, exchange=gp.dense_mean(AXIS)), 2)
    with pytest.raises(ValueError, match=r"put MultiSteps around gp\.agreeing"):
        gp.agreeing(accumulating.gradient_transformation(), AXIS).init(PARAMS)


WITHOUT_PMAP = {
    "start = jax.pmap(lambda _: (params, tx.init(params)), out": 'mesh = jax.make_mesh((workers,), ("devices",))\n'
    'start = gp.over_devices(lambda _: (params, tx.init(params)), mesh, "devices", in_axes=(0,), out',
    'jax.pmap(step, "devices", in_axes': 'gp.over_devices(step, mesh, "devices", in_axes',
}


@pytest.mark.parametrize("swaps", [{}, WITHOUT_PMAP], ids=["pmap", "over_devices"])
def test_the_loop_in_the_readme_learns_at_its_ratio(swaps: dict[str, str]) -> None:
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    (loop,) = (block for block in re.findall(r"```python\n(.*?)```", readme, re.DOTALL) if "jax.pmap(step" in block)
    for old, new in swaps.items():
        assert loop.count(old) == 1
        loop = loop.replace(old, new)
    found: dict = {}
    with jax.numpy_rank_promotion("allow"):  # as users have it
        exec(loop.replace("300", "40").replace("params = gp.agreed", "own = params\nparams = gp.agreed"), found)
    assert len(found["losses"]) == 40
    assert found["losses"][-1] < 0.8 * found["losses"][0]
    assert len(jax.tree.leaves(found["params"])) == 2
    # With reduce_scatter's (W + 1) / W on the link, and a step without a histogram
    state, layout = find_state(found["opt_state"]), layout_of(found["params"])
    assert 110 < state.stats.link_ratio < 150
    # A device goes on from a part of what it has not sent, and as an owner of sums from all that it owes in its share
    share = min((float(state.stats.capacity) / layout.elements) ** (1 / 3), 1.4 / W)
    for device in range(W):
        owed = scatter_share(state.scheme.local[device], layout, W, jnp.int32(device))
        assert np.abs(owed).max() > 1e-4
        own = jax.tree.map(lambda x, i=device: x[i], found["own"])
        ahead = ravel(jax.tree.map(jnp.subtract, found["params"], own), layout)
        np.testing.assert_allclose(share * state.memory.residual[device] + owed, ahead, atol=1e-6)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: gp.recipes.lion(0.1, AXIS, exchange="reduce_scatter"), "'reduce_scatter' needs devices"),
        (lambda: gp.recipes.sgd(0.1, AXIS, exchange="by post"), "exchange='by post' is unknown"),
        (lambda: gp.recipes.adamw(0.1, every=0), "every=0 is out of range"),
        (lambda: gp.recipes.adamw(0.1, ratio=0.5), "ratio=0.5 is out of range"),
        (lambda: gp.recipes.adamw(0.1, ratio=4, every=8), "raise the ratio"),
        (lambda: gp.recipes.adamw(0.1, bits_per_element=1), "give ratio=32 / bits_per_element"),
        (
            lambda: gp.recipes.adamw(0.1, ratio=float("inf")),
            "ratio=inf is out of range: give a finite number at least 1",
        ),
        (lambda: gp.recipes.sgd("devices", 0.1), "axis_name=0.1 is no name of an axis"),
        (lambda: gp.recipes.sgd(None, AXIS), "learning_rate=None is not a number"),
        (lambda: gp.recipes.muon("0.1", AXIS), "learning_rate='0.1' is not a number"),
        (lambda: gp.recipes.sgd(0.1, momentum=2.0), "momentum=2.0 is out of range"),
        (lambda: gp.recipes.sgd(0.1, momentum=float("nan"), exchange=gp.dense_mean()), "momentum=nan is out of range"),
        (lambda: gp.recipes.adamw(0.1, every=2, replicate=True), "exclude one another"),
        (lambda: gp.recipes.sgd(0.1, clip=0.0), "clip=0.0 is out of range"),
        (lambda: gp.recipes.sgd(0.1, exchange=gp.dense_mean(), rungs=2), "rungs: arguments of partition_compress"),
        (lambda: gp.recipes.adamw(0.1, exchange=gp.baselines.topk(0.1)), r"exchange=Scheme.* of a Scheme gp\.compress"),
        (lambda: gp.recipes.sgd(0.1, exchange=optax.sgd, replicate=True), "exchange=<function .* no optax transform"),
        (lambda: gp.local_updates(optax.sgd(0.1), every=1, exchange=3), "exchange=3 is no optax transformation"),
        (lambda: gp.local_updates(None, every=1, exchange=gp.dense_mean()), "inner=None is no optax transformation"),
        (lambda: gp.local_updates(optax.sgd(0.1), every=1, exchange=gp.dense_mean(), outer=optax.sgd), "outer=<func"),
        (lambda: gp.local("adam"), "tx='adam' is no optax transformation"),
        (lambda: gp.agreeing(None), "tx=None is no optax transformation"),
        (lambda: gp.local_updates(optax.sgd(0.1), every=0, exchange=gp.dense_mean()), "every=0"),
        (lambda: gp.recipes.sgd(0.1).init({"n": jnp.zeros(3, jnp.int32)}), "leaf 'n' is int32, and only real floating"),
        (lambda: gp.agreed(PARAMS, [gp.recipes.lion(0.1).init(PARAMS)] * 2), "holds 2 states"),
        (
            lambda: (lambda tx: tx.update(PARAMS, tx.init(PARAMS)))(gp.recipes.lion(0.1)),
            "needs the parameters",
        ),
    ],
)
def test_bad_arguments_are_named(make, words: str) -> None:
    with pytest.raises((TypeError, ValueError), match=words):
        make()


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw", "lion", "muon"])
def test_recipes_pass_on_how_much_a_device_goes_on_from(name: str) -> None:
    recipe = getattr(gp.recipes, name)
    with pytest.raises(ValueError, match=r"keep_own=0\.5 goes on from what is remembered"):
        recipe(0.1, keep_own=0.5, exchange=gp.dense_mean()).init(PARAMS)
    with pytest.raises(ValueError, match="keep_own serves what each device does by itself"):
        recipe(0.1, keep_own=0.5, replicate=True)


@pytest.mark.parametrize("every", [1, 2])
def test_state_keeps_its_types_where_gradients_are_finer(every: int) -> None:
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS)
    tx = gp.local_updates(optax.adam(1e-3), every=every, exchange=gp.dense_mean())
    state = tx.init(params)
    _, fresh = jax.eval_shape(tx.update, PARAMS, state, params)
    assert [x.dtype for x in jax.tree.leaves(fresh)] == [x.dtype for x in jax.tree.leaves(state)]


@pytest.mark.parametrize("every", [1, 2])
def test_parameters_that_are_loaded_after_init_are_gone_on_from(every: int) -> None:
    tx = gp.local_updates(optax.sgd(0.0), every=every, exchange=few())
    loaded = jax.tree.map(lambda x: x + 5.0, PARAMS)
    params, state = stack(loaded), stack(tx.init(PARAMS))
    for step in range(3):
        params, state = by_vmap(tx)(params, state, step, jnp.arange(W))
    for tree in (jax.tree.map(lambda x: x[0], params), jax.vmap(gp.agreed)(params, state)):
        jax.tree.map(lambda x: np.testing.assert_array_equal(x, np.full(x.shape, 5.0, np.float32)), tree)
