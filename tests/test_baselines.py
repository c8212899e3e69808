"""One battery that every baseline passes: whatever a user swaps in keeps the same contracts.

A method joins by one line in CASES. Its update is compiled three times, by vmap, pmap and shard_map, and the checks
share the three.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import gradpart_jax as gp
from gradpart_jax import baselines
from tests.devices import AXIS, W, assert_equal, flat, stack, unpadded

SHAPES = {"bias": (7,), "empty": (0, 3), "kernel": (40, 50), "scale": (), "thin": (3, 1, 2)}
PARAMS = {name: jnp.zeros(shape) for name, shape in SHAPES.items()}


@dataclasses.dataclass(frozen=True)
class Case:
    """A method and what it claims."""

    make: Callable[[], gp.Scheme]
    feedback: Any = True  # what `compress` is given as error_feedback
    conserves: bool = True  # what it averages is what it sends: what went in comes out or is remembered
    unbiased: bool = False
    contracts: bool = False  # |a - C(a)| < |a| for a method alone or with devices that agree


CASES = {
    "dense": Case(baselines.dense, unbiased=True),
    "bfloat16": Case(lambda: baselines.dense("bfloat16"), contracts=True),
    "ef_signsgd": Case(baselines.ef_signsgd, contracts=True),
    "signsgd": Case(baselines.signsgd, feedback=False, conserves=False),
    "qsgd": Case(lambda: baselines.qsgd(bits=8, bucket=100), unbiased=True, contracts=True),
    "terngrad": Case(lambda: baselines.terngrad(clip=None), feedback=False, unbiased=True),
    "terngrad, clipped": Case(baselines.terngrad, feedback=False),
    "natural": Case(baselines.natural, unbiased=True, contracts=True),
    "int8": Case(baselines.int8, contracts=True),
    "onebit_sgd": Case(baselines.onebit_sgd, contracts=True),
    "powersgd": Case(baselines.powersgd, contracts=True),
    "powersgd, later": Case(lambda: baselines.powersgd(rank=3, start_step=2, warm_start=False)),
    "demo": Case(lambda: baselines.demo(keep=8, chunk=16), conserves=False),
    "demo, unsigned": Case(lambda: baselines.demo(keep=8, chunk=16, sign=False), conserves=False, contracts=True),
    "topk by ef21": Case(lambda: baselines.topk(0.05), feedback="ef21"),
    "int8 by ef21": Case(baselines.int8, feedback="ef21"),
    "topk": Case(lambda: baselines.topk(0.05), contracts=True),
    "randomk": Case(lambda: baselines.randomk(0.05), contracts=True),
    "randomk, unbiased": Case(lambda: baselines.randomk(0.05, unbiased=True), feedback=False, unbiased=True),
    "threshold": Case(lambda: baselines.threshold(5.0, ratio=0.2), contracts=True),
    "dgc": Case(lambda: baselines.dgc(0.05), contracts=True),
    "gaussiank": Case(lambda: baselines.gaussiank(0.05), contracts=True),
    "redsync": Case(lambda: baselines.redsync(0.05), contracts=True),
    "sidco": Case(lambda: baselines.sidco(0.05), contracts=True),
    "sidco, gamma": Case(lambda: baselines.sidco(0.05, fit="gamma"), contracts=True),
    "scalecom": Case(lambda: baselines.scalecom(0.05), contracts=True),
    "oktopk": Case(lambda: baselines.oktopk(0.05)),
    "egc": Case(lambda: baselines.egc(0.05), contracts=True),
    "lgc": Case(lambda: baselines.lgc(0.05, train_steps=2)),
}


def each(claim: Callable[[Case], Any] = lambda case: True, optimised: tuple[str, ...] = (), deep: tuple[str, ...] = ()):
    """Take the methods that make a claim; one worker has all tests of a method, so that it is compiled once."""
    chosen = []
    for name, case in CASES.items():
        marks = [pytest.mark.xdist_group(name), *([pytest.mark.optimised] if name.startswith(optimised) else [])]
        marks += [pytest.mark.deep] if name in deep else []
        chosen += [pytest.param(case, marks=marks, id=name)] if claim(case) else []
    return pytest.mark.parametrize("case", chosen)


every = each()


def gradients(seed: int, like=PARAMS, devices: int = W):
    """Heavy-tailed gradients with a part that all devices share, stacked."""
    leaves, structure = jax.tree.flatten(like)
    rng = np.random.default_rng(seed)
    made = [rng.laplace(size=(devices, *x.shape)) ** 3 + rng.normal(size=(1, *x.shape)) for x in leaves]
    return jax.tree.unflatten(structure, [jnp.asarray(g, x.dtype) for g, x in zip(made, leaves, strict=True)])


@functools.cache
def transform(case: Case) -> optax.GradientTransformationExtraArgs:
    return gp.compress(case.make(), AXIS, error_feedback=case.feedback)


@functools.lru_cache(maxsize=1)
def by_vmap(case: Case):
    return jax.jit(jax.vmap(lambda g, s: transform(case).update(g, s), axis_name=AXIS))


@functools.lru_cache(maxsize=1)
def by_pmap(case: Case):
    """The compiled step, and a first state, stacked; replicas are checked on what each device computes for itself."""
    step, state = jax.pmap(transform(case).update, AXIS), stack(transform(case).init(PARAMS))
    return step.lower(gradients(0), state).compile()


@functools.lru_cache(maxsize=1)
def by_shard_map(case: Case):
    """The compiled step, with its state where `gp.state_specs` says.

    Types are checked: that they say of the update and of all shared state that devices hold the same, is proof.
    """
    specs = specs_of(case)
    mesh = jax.make_mesh((W,), (AXIS,), axis_types=(AxisType.Auto,))

    def local(g, s):
        return transform(case).update(jax.tree.map(lambda x: x[0], g), s)

    step = jax.shard_map(local, mesh=mesh, in_specs=(P(AXIS), specs), out_specs=(P(), specs), check_vma=True)
    return jax.jit(step)


def specs_of(case: Case):
    return gp.state_specs(jax.eval_shape(transform(case).init, PARAMS), AXIS)


def laid_out(case: Case, state):
    """A stacked state as `by_shard_map` has it: what differs per device, side by side."""
    return jax.tree.map(lambda x, at: x[0] if at == P() else x.reshape(-1, *x.shape[2:]), state, specs_of(case))


def fresh(case: Case):
    return stack(transform(case).init(PARAMS))


def kinds(tree):
    return jax.tree.map(lambda x: (jnp.shape(x), jnp.result_type(x)), tree)


# Products of matrices are summed in the same order in every program only there
@each(optimised=("powersgd", "demo"), deep=("powersgd, later", "demo, unsigned", "sidco, gamma"))
def test_pmap_equals_vmap_and_shard_map_and_replicas_are_bit_equal(case: Case) -> None:
    p_state = v_state = fresh(case)
    s_state = laid_out(case, v_state)
    axes = gp.state_axes(transform(case).init(PARAMS))
    for i in range(6):
        g = gradients(i)
        p_out, p_state = by_pmap(case)(g, p_state)
        v_out, v_state = by_vmap(case)(g, v_state)
        # One step at a time: virtual devices wait for one another, and few threads run them all.
        s_out, s_state = jax.block_until_ready(by_shard_map(case)(g, s_state))
        assert_equal(p_out, v_out)
        assert_equal(p_state, v_state)
        assert_equal(s_out, jax.tree.map(lambda x: x[0], v_out))
        assert_equal(s_state, laid_out(case, v_state))
        shared = jax.tree.map(lambda x, a: x if a is None else x[:1], p_state, axes, is_leaf=lambda a: a is None)
        for leaf in jax.tree.leaves((p_out, shared)):
            assert (np.asarray(leaf) == np.asarray(leaf)[:1]).all()
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((p_out, p_state)))
    assert any(np.asarray(x).any() for x in jax.tree.leaves(p_out))


WORDS = {"u32": 32, "s32": 32, "f32": 32, "u16": 16, "bf16": 16, "u8": 8, "s8": 8}
# What leaves a device, for each bit of the result that the compiled program names
LINK = {"all-gather": (W - 1) / W, "all-reduce": 2 * (W - 1) / W, "all-to-all": (W - 1) / W}
PAYLOAD = {"all-gather": 1 / W, "all-reduce": 1, "all-to-all": 1}


@every
def test_bytes_are_what_the_compiled_collectives_carry(case: Case) -> None:
    """Result sizes read from the compiled text; a method with branches sends no more than all of them together."""
    text = by_pmap(case).as_text()
    payload = link = 0.0
    for shapes, kind in re.findall(r"= (\(.*?\)|\S+) ([a-z-]+)\(", text):
        if not any(kind.startswith(name) for name in (*LINK, "collective", "reduce-scatter")):
            continue
        for dtype, size in re.findall(r"(\w+)\[([\d,]*)\]", shapes):
            bits = WORDS[dtype] * int(np.prod([int(n) for n in size.split(",") if n]))
            payload, link = payload + PAYLOAD[kind] * bits, link + LINK[kind] * bits
    _, state = by_pmap(case)(gradients(0), fresh(case))
    stats = gp.stats(state)
    assert payload > 0
    if "conditional(" in text:
        assert 0 < stats.payload_bits[0] <= payload
        assert 0 < stats.link_bits[0] <= link
    else:
        np.testing.assert_allclose(stats.payload_bits, payload, rtol=1e-6)
        np.testing.assert_allclose(stats.link_bits, link, rtol=1e-6)


@every
def test_it_composes_and_its_state_stays_in_structure_and_dtype(case: Case) -> None:
    """Traced only: as a scan's carry the state of each composition must keep its structure, shapes and dtypes."""
    make = functools.partial(gp.compress, case.make(), AXIS, error_feedback=case.feedback)
    chained = optax.inject_hyperparams(
        lambda rate: optax.chain(optax.clip_by_global_norm(1.0), make(), optax.scale(rate), optax.adam(1e-3))
    )
    spared = {"bias": False, "empty": True, "kernel": True, "scale": False, "thin": True}
    compositions = [
        make(),
        chained(rate=optax.linear_schedule(1.0, 0.1, 10)),
        optax.MultiSteps(optax.masked(make(), spared), every_k_schedule=2).gradient_transformation(),
    ]
    halves = {"bias": jnp.bfloat16, "kernel": jnp.float16, "scale": jnp.bfloat16}
    mixed = {name: x.astype(halves.get(name, x.dtype)) for name, x in PARAMS.items()}
    for tx, like in zip(compositions, (mixed, PARAMS, PARAMS), strict=True):

        def steps(stacked, tx=tx, like=like):
            def body(state, g):
                out, state = tx.update(g, state, like, value=1.0)
                return state, out

            return jax.lax.scan(body, tx.init(like), stacked)

        several = jax.tree.map(lambda x: jax.ShapeDtypeStruct((W, 3, *x.shape), x.dtype), like)
        state, out = jax.eval_shape(jax.vmap(steps, axis_name=AXIS), several)
        assert kinds(out) == kinds(several)
        floats = [x for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.floating)]
        assert like is PARAMS or all(x.dtype == jnp.float32 for x in floats)


@every
def test_zero_gradients_are_zero_and_do_no_harm(case: Case) -> None:
    state, zeros = fresh(case), jax.tree.map(jnp.zeros_like, gradients(0))
    for _ in range(2):
        out, state = by_vmap(case)(zeros, state)
        assert_equal(out, zeros)
    for i in range(3):
        out, state = by_vmap(case)(gradients(i), state)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((out, state)))
    assert np.any(flat(out))


@every
def test_a_nonfinite_gradient_on_one_device_changes_nothing_anywhere(case: Case) -> None:
    state = fresh(case)
    for i in range(2):
        _, state = by_vmap(case)(gradients(i), state)
    for count, (bad, leaf, place) in enumerate(
        [(jnp.nan, "kernel", (2, 5, 5)), (jnp.inf, "bias", (0, 0)), (-jnp.inf, "kernel", (3, 39, 49))], start=1
    ):
        g = gradients(9)
        g[leaf] = g[leaf].at[place].set(bad)
        out, new = by_vmap(case)(g, state)
        assert_equal(out, jax.tree.map(jnp.zeros_like, out))
        assert_equal(new._replace(stats=()), state._replace(stats=()))
        assert (new.stats.nonfinite == count).all()
        state = new
    out, state = by_vmap(case)(gradients(10), state)
    assert (state.stats.nonfinite == 3).all()
    assert np.isfinite(flat(out)).all()
    # Nor does a sum that is not, of numbers that are
    out, state = by_vmap(case)(jax.tree.map(lambda x: jnp.full_like(x, 3e38), g), state)
    assert np.isfinite(flat(out)).all()


@each(lambda case: case.conserves and case.feedback is True)
def test_what_went_in_comes_out_or_is_remembered(case: Case) -> None:
    state = fresh(case)
    for i in range(4):
        g = gradients(i)
        before = flat(g) + unpadded(state.memory.residual, PARAMS)
        out, state = by_vmap(case)(g, state)
        sent = before - unpadded(state.memory.residual, PARAMS)
        # The mean itself may be rounded to bfloat16.
        tolerance = 2.0**-8 if case is CASES["bfloat16"] else 3e-6
        np.testing.assert_allclose(
            flat(out)[0], sent.mean(0), rtol=tolerance, atol=tolerance * np.abs(before).mean(0).max()
        )


@each(lambda case: case.contracts)
def test_the_rest_is_smaller_than_the_whole(case: Case) -> None:
    """With the same gradient on every device, so that what is sent is an approximation of it."""
    for i in range(3):
        g = stack(jax.tree.map(lambda x: x[0], gradients(i)))
        _, state = by_vmap(case)(g, fresh(case))
        rest = np.linalg.norm(unpadded(state.memory.residual, PARAMS), axis=1)
        assert (rest < np.linalg.norm(flat(g), axis=1)).all()


@each(lambda case: case.unbiased)
def test_the_mean_of_many_draws_is_the_gradient(case: Case) -> None:
    """Along eight directions the mean error is within 5 standard errors: by chance alone 1 in 10^5 runs fails."""
    g, draws, state = gradients(0), 200, fresh(case)
    outs, nothing = np.zeros((draws, flat(g).shape[1])), state.memory
    for draw in range(draws):
        out, state = by_vmap(case)(g, state._replace(memory=nothing))
        outs[draw] = flat(out)[0]
    target = flat(g).mean(0)
    rng = np.random.default_rng(1)
    directions = np.stack([target, np.sign(target), np.abs(target), *rng.normal(size=(5, target.size))])
    errors = (outs - target) @ directions.T
    spread = errors.std(axis=0, ddof=1) / np.sqrt(draws)
    noise = 1e-6 * np.linalg.norm(target) * np.linalg.norm(directions, axis=1)
    assert (np.abs(errors.mean(0)) <= 5 * spread + noise).all()


ODD = {"none": {}, "one": jnp.zeros(1)}  # an empty leaf, a scalar and a thin one are in PARAMS


@pytest.mark.parametrize("like", ODD.values(), ids=ODD)
@every
def test_trees_of_nothing_and_of_one_element(case: Case, like) -> None:
    tx = gp.compress(case.make(), error_feedback=case.feedback)
    g = jax.tree.map(lambda x: x + 1.5, like)
    out, state = jax.jit(tx.update)(g, tx.init(like))
    assert kinds(out) == kinds(g)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((out, state)))
