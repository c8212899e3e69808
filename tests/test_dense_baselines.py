"""Each dense baseline against plain numpy, written from its formula, over several steps and four devices."""

from __future__ import annotations

import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gradpart_jax as gp
from gradpart_jax import baselines, coded, levels

W, AXIS, STEPS = 4, "w", 4
SHAPES = {"bias": (7,), "conv": (3, 3, 4, 20), "kernel": (40, 50), "scale": ()}
PARAMS = {name: jnp.zeros(shape) for name, shape in SHAPES.items()}


def gradients(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {n: (rng.laplace(size=(W, *s)) ** 3 + rng.normal(size=s)).astype(np.float32) for n, s in SHAPES.items()}


def run(scheme: gp.Scheme, steps: int = STEPS, **arguments):
    """Updates of several steps, and the residual memories after each as trees, stacked over devices."""
    tx = gp.compress(scheme, AXIS, **arguments)
    step = jax.jit(jax.vmap(tx.update, axis_name=AXIS))
    state = jax.tree.map(lambda x: jnp.broadcast_to(x, (W, *x.shape)), tx.init(PARAMS))
    for i in range(steps):
        out, state = step({n: jnp.asarray(g) for n, g in gradients(i).items()}, state)
        yield {n: np.asarray(x[0]) for n, x in out.items()}, cut(state.memory.residual), state


def cut(vector) -> dict[str, np.ndarray]:
    found, at = {}, 0
    for name, shape in SHAPES.items():
        size = int(np.prod(shape))
        if vector.shape[-1]:
            found[name] = np.asarray(vector[:, at : at + size]).reshape(W, *shape)
        at += -(-size // 32) * 32
    return found


def flatten(tree: dict[str, np.ndarray], device: int) -> np.ndarray:
    """The flat vector of one device, each leaf padded to 32."""
    return np.concatenate([np.pad(x[device].reshape(-1), (0, -x[device].size % 32)) for x in tree.values()])


def close(a: dict[str, np.ndarray], b: dict[str, np.ndarray], tolerance: float = 2e-5) -> None:
    for name in SHAPES:
        np.testing.assert_allclose(
            a[name], b[name], rtol=tolerance, atol=tolerance * np.abs(b[name]).max(), err_msg=name
        )


def check_with_memory(scheme: gp.Scheme, send, tolerance: float = 2e-5) -> None:
    """Compare with error feedback around a numpy `send(leaf of one device) -> what it decodes to`.

    Each step starts from the memory that the step before has left: an entry near 0 may else have either sign.
    """
    memory = {n: np.zeros((W, *s), np.float32) for n, s in SHAPES.items()}
    for i, (out, residual, _) in enumerate(run(scheme)):
        a = {n: g + memory[n] for n, g in gradients(i).items()}
        sent = {n: np.stack([send(x.astype(np.float64)) for x in leaf]) for n, leaf in a.items()}
        close(out, {n: x.mean(0) for n, x in sent.items()}, tolerance)
        close(residual, {n: a[n] - sent[n] for n in a})
        memory = residual


def sign(x: np.ndarray) -> np.ndarray:
    return np.where(x < 0, -1.0, 1.0)


def one_bit(x: np.ndarray) -> np.ndarray:
    m = x.reshape(-1, x.shape[-1]) if x.ndim > 1 else x.reshape(-1, 1)
    out = np.zeros_like(m)
    for j in range(m.shape[1]):
        low = m[:, j] < 0
        for part in (low, ~low):
            if part.any():
                out[part, j] = m[part, j].mean()
    return out.reshape(x.shape)


@pytest.mark.parametrize(
    ("scheme", "send"),
    [
        (baselines.ef_signsgd(), lambda x: np.abs(x).mean() * sign(x)),
        (baselines.onebit_sgd(), one_bit),
    ],
    ids=["ef_signsgd", "onebit_sgd"],
)
def test_signs_with_scales(scheme: gp.Scheme, send) -> None:
    check_with_memory(scheme, send)


def test_bfloat16_rounds_the_gradient_and_the_mean() -> None:
    def rounded(x: np.ndarray) -> np.ndarray:
        return np.asarray(jnp.asarray(x, jnp.float32).astype(jnp.bfloat16), np.float64)

    check_with_memory(baselines.dense("bfloat16"), rounded, tolerance=2.0**-8)
    for out, _, _ in run(baselines.dense("bfloat16"), steps=1):
        for leaf in out.values():
            np.testing.assert_array_equal(rounded(leaf), leaf)


def test_signsgd_is_the_vote_of_the_majority_and_one_device_in_turn_decides_ties() -> None:
    ties = 0
    for i, (out, memory, _) in enumerate(run(baselines.signsgd(), steps=6)):
        for name, g in gradients(i).items():
            votes = sign(g).sum(0)
            np.testing.assert_array_equal(out[name], np.where(votes == 0, sign(g[i % W]), np.sign(votes)))
            assert not memory[name].any()
            ties += np.sum(votes == 0)
    assert ties > 1000


def test_a_device_with_no_gradient_at_all_has_no_vote() -> None:
    tx = gp.compress(baselines.signsgd(), AXIS)
    step = jax.jit(jax.vmap(tx.update, axis_name=AXIS))
    state = jax.tree.map(lambda x: jnp.broadcast_to(x, (3, *x.shape)), tx.init(jnp.zeros(2)))
    votes = jnp.array([[-1.0, -1.0], [0.0, 0.0], [0.0, 1.0]])
    # A zero of a device that votes is a plus; of the two that do, the first from device t on decides
    for decides in (0, 2, 2, 0):
        out, state = step(votes, state)
        np.testing.assert_array_equal(out[0], sign(np.asarray(votes[decides])))
    out, _ = step(jnp.zeros((3, 2)), state)
    np.testing.assert_array_equal(out, 0.0)


@pytest.mark.parametrize("devices", [1, 2, 3, 8])
def test_signsgds_link_does_not_grow_with_the_devices(devices: int) -> None:
    tx = gp.compress(baselines.signsgd(), AXIS)
    gradient = jnp.ones((devices, 32 * 48))
    state = jax.tree.map(lambda x: jnp.broadcast_to(x, (devices, *x.shape)), tx.init(gradient[0]))
    _, state = jax.vmap(tx.update, axis_name=AXIS)(gradient, state)
    part = 32 * (48 // devices + 1)
    assert (gp.stats(state).payload_bits == (devices + 1) * part).all()
    assert (gp.stats(state).link_bits == 2 * (devices - 1) * part).all()


def test_int8_is_the_nearest_of_127_steps_in_each_block() -> None:
    block, memory = 256, None
    for i, (out, residual, state) in enumerate(run(baselines.int8(block))):
        flat = np.stack([flatten(gradients(i), d) for d in range(W)])
        memory = np.zeros_like(flat, np.float64) if memory is None else memory
        a = flat + memory
        padded = np.pad(a, ((0, 0), (0, -a.shape[1] % block))).reshape(W, -1, block)
        greatest = np.abs(padded).max(axis=2)
        memory = np.asarray(state.memory.residual, np.float64)
        rest = np.pad(memory, ((0, 0), (0, -a.shape[1] % block))).reshape(W, -1, block)
        # Half a step at most, of a step at most one part in 128 wider than a 127th of the greatest
        assert (np.abs(rest).max(axis=2) <= greatest / 127 * (1 + 2.0**-7) / 2 * (1 + 1e-5)).all()
        steps = np.asarray(levels.step_above(jnp.asarray(greatest / 127, jnp.float32)), np.float64)[..., None]
        expected = steps * np.rint(padded / steps)
        off = np.abs(padded - rest - expected) > 1e-5 * greatest[..., None]
        assert off.mean() < 1e-3  # a value in the middle between two levels may go to either
        averaged = flatten({n: x[None] for n, x in out.items()}, 0)
        np.testing.assert_allclose(averaged, (a - memory).mean(axis=0), rtol=1e-4, atol=1e-5 * np.abs(a).max())
        assert residual["kernel"].any()


def test_a_step_is_the_next_number_that_bfloat16_has() -> None:
    rng = np.random.default_rng(0)
    x = np.concatenate([[0.0, 1.0, 1.5, 2.0**-126], np.exp(rng.uniform(-80, 80, 1000))]).astype(np.float32)
    steps = np.asarray(levels.step_above(jnp.asarray(x)))
    assert (steps >= x).all()
    assert (steps <= x * (1 + 2.0**-7)).all()
    np.testing.assert_array_equal(steps, np.asarray(jnp.asarray(steps).astype(jnp.bfloat16).astype(jnp.float32)))


def draws(scheme: gp.Scheme, count: int = 400) -> tuple[np.ndarray, np.ndarray]:
    """One device's vector and many draws of what is sent for it."""
    tx = gp.compress(scheme, error_feedback=False)
    vector = jnp.asarray(flatten(gradients(0), 0))
    _, outs = jax.lax.scan(lambda s, _: tx.update(vector, s)[::-1], tx.init(vector), None, length=count)
    return np.asarray(vector, np.float64), np.asarray(outs, np.float64)


def test_qsgd_draws_the_two_levels_around_a_value() -> None:
    bucket, s = 128, 7
    vector, outs = draws(baselines.qsgd(bits=4, bucket=bucket))
    padded = np.pad(vector, (0, -vector.size % bucket)).reshape(-1, bucket)
    norms = np.linalg.norm(padded, axis=1)
    steps = np.asarray(levels.step_above(jnp.asarray(norms / s, jnp.float32)), np.float64)
    step = np.repeat(steps, bucket)[: vector.size]
    ratio = np.abs(vector) / step
    drawn = outs * np.sign(vector) / step
    low = np.floor(ratio)
    assert ((np.abs(drawn - low) < 1e-4) | (np.abs(drawn - low - 1) < 1e-4)).all()
    # The variance of a draw is that of a coin: chance alone puts the total 5 % off in fewer than 1 of 10^6 runs.
    expected = (step**2 * (ratio - low) * (1 - ratio + low)).sum()
    assert abs(outs.var(axis=0).sum() / expected - 1) < 0.05


@pytest.mark.parametrize("make", [gp.baselines.qsgd, gp.baselines.terngrad])
@pytest.mark.parametrize("scale", [1e-24, 1e-10, 1e18, 1e30])
def test_chance_is_the_same_at_any_scale(make, scale: float) -> None:
    tx = gp.compress(make(), error_feedback=False)
    g = jnp.float32(scale) * jax.random.normal(jax.random.key(0), (256,))
    out, state = jax.jit(tx.update)(g, tx.init(g))
    assert int(gp.stats(state).nonfinite) == 0
    assert np.mean(np.abs(out)) == pytest.approx(np.mean(np.abs(g)), rel=0.2)


def test_terngrad_draws_minus_nothing_or_plus_the_clipped_greatest() -> None:
    for i, (out, _, _) in enumerate(run(baselines.terngrad(), error_feedback=False)):
        for name, g in gradients(i).items():
            scales = [min(np.abs(x).max(), 2.5 * np.sqrt((x.astype(np.float64) ** 2).mean())) for x in g]
            possible = np.zeros((*g.shape[1:], 1))
            for x, scale in zip(g, scales, strict=True):
                possible = np.concatenate([possible, possible + (np.sign(x) * scale)[..., None]], axis=-1)
            distance = np.abs(out[name][..., None] - possible / W).min(axis=-1)
            assert (distance < 1e-5 * max(scales)).all()
    vector, outs = draws(baselines.terngrad())
    scale = min(np.abs(vector).max(), 2.5 * np.sqrt((vector**2).mean()))
    chance = np.minimum(np.abs(vector) / scale, 1)
    standard = np.sqrt(chance * (1 - chance) / len(outs))
    assert (np.abs((outs != 0).mean(axis=0) - chance) <= 7 * standard + 20 / len(outs)).all()


def test_natural_draws_the_powers_of_two_around_a_value() -> None:
    vector, outs = draws(baselines.natural())
    low = np.sign(vector) * 2.0 ** np.floor(np.log2(np.maximum(np.abs(vector), 1e-300)))
    low = np.where(vector == 0, 0, low)
    assert ((outs == low) | (outs == 2 * low)).all()
    chance = np.where(low != 0, vector / np.where(low != 0, low, 1) - 1, 0)
    standard = np.sqrt(chance * (1 - chance) / len(outs))
    up = ((outs == 2 * low) & (low != 0)).mean(axis=0)
    assert (np.abs(up - chance) <= 7 * standard + 20 / len(outs)).all()
    assert outs.var(axis=0).sum() <= (vector**2).sum() / 8 * 1.05


@pytest.mark.parametrize(("scheme", "word"), [(baselines.natural(), 2**32 - 1), (baselines.int8(), 0x7F7F7F7F)])
def test_any_words_decode_to_finite_values(monkeypatch, scheme: gp.Scheme, word: int) -> None:
    gather = coded.gather

    def tampered(words: jax.Array, axis_name: str | None) -> jax.Array:
        scales = jnp.uint32(min(word, 0x7F7F7F7F))  # of which those that are not finite say that all is not
        return jnp.full_like(gather(words, axis_name), jnp.uint32(word)).at[:, -1].set(scales)

    monkeypatch.setattr(coded, "gather", tampered)
    tx = gp.compress(scheme)
    out, state = tx.update(jnp.ones(64), tx.init(jnp.ones(64)))
    assert np.isfinite(out).all()
    assert (np.abs(out) > 1e38).all()
    assert gp.stats(state).nonfinite == 0


def qsgd(x: np.ndarray, uniform) -> np.ndarray:
    v = np.pad(x, (0, -x.size % 128)).reshape(-1, 128)
    step = np.asarray(levels.step_above(jnp.asarray(np.linalg.norm(v, axis=1) / 7, jnp.float32)), np.float64)[:, None]
    ratio = np.abs(v) / step
    low = np.floor(ratio)
    level = np.minimum(low + (ratio - low + uniform(v.size).reshape(v.shape) >= 1), 7)
    return (np.sign(v) * step * level).reshape(-1)[: x.size]


def terngrad(x: np.ndarray, uniform) -> np.ndarray:
    out, u, at = np.zeros_like(x), uniform(x.size), 0
    for shape in SHAPES.values():
        span = slice(at, at + int(np.prod(shape)))
        v = x[span]
        scale = min(np.abs(v).max(), 2.5 * np.sqrt((v**2).mean()))
        out[span] = np.sign(v) * scale * (np.minimum(np.abs(v) / scale, 1) + u[span] >= 1)
        at += -(-v.size // 32) * 32
    return out


def natural(x: np.ndarray, uniform) -> np.ndarray:
    low = 2.0 ** np.floor(np.log2(np.where(x == 0, 1, np.abs(x))))
    return np.sign(x) * low * np.where(np.abs(x) / low - 1 + uniform(x.size) >= 1, 2, 1)


@pytest.mark.parametrize(
    ("make", "send"), [(baselines.qsgd, qsgd), (baselines.terngrad, terngrad), (baselines.natural, natural)]
)
def test_each_device_draws_for_itself_anew_in_each_step(make, send) -> None:
    """With the same coins: seed, step and device decide."""

    def uniform(step: int, device: int, size: int) -> np.ndarray:
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(5), step), device)
        return np.asarray(jax.random.bits(key, (size,), jnp.uint32), np.float64) / 2.0**32

    for i, (out, _, _) in enumerate(run(make(seed=5), error_feedback=False)):
        vectors = [flatten(gradients(i), d).astype(np.float64) for d in range(W)]
        sent = [send(x, functools.partial(uniform, i, d)) for d, x in enumerate(vectors)]
        mean, got = np.mean(sent, axis=0), flatten({n: x[None] for n, x in out.items()}, 0)
        # Chances have 16 bits: a coin on the edge may fall to either side
        assert np.mean(np.abs(got - mean) > 1e-5 * np.max(np.abs(sent), axis=0) + 1e-30) < 1e-3


def as_matrix(x: np.ndarray) -> np.ndarray:
    return x.reshape(x.shape[0], -1, x.shape[-1])


def orthonormal(m: np.ndarray) -> np.ndarray:
    return np.linalg.qr(m)[0]


class Power:
    """PowerSGD with warm start by numpy's QR, on matrices stacked over devices."""

    def __init__(self, first: dict[str, np.ndarray]) -> None:
        self.right = dict(first)

    def reduce(self, name: str, a: np.ndarray) -> np.ndarray:
        m = as_matrix(a)
        left = orthonormal(np.mean(m @ orthonormal(self.right[name]), axis=0))
        self.right[name] = np.mean(m.swapaxes(1, 2) @ left, axis=0)
        return (left @ self.right[name].T).reshape(a.shape[1:])


@pytest.mark.parametrize(("start_step", "warm"), [(0, True), (2, True), (1, False)])
def test_powersgd_is_a_step_of_power_iteration(start_step: int, warm: bool) -> None:
    scheme = baselines.powersgd(rank=2, start_step=start_step, warm_start=warm, seed=3)
    found = {}
    tx = gp.compress(scheme)
    for first in tx.init(PARAMS).scheme.shared.right:
        found[first.shape[1]] = np.asarray(first[0], np.float64)
    reference = Power({"conv": found[20], "kernel": found[50]})
    memory = {n: np.zeros((W, *s)) for n, s in SHAPES.items()}
    for i, (out, residual, state) in enumerate(run(scheme, steps=6)):
        a = {n: g + memory[n] for n, g in gradients(i).items()}
        if not warm:
            key = jax.random.fold_in(jax.random.key(3), i)
            drawn = [jax.random.normal(jax.random.fold_in(key, j), (1, n, 2))[0] for j, n in enumerate((20, 50))]
            reference.right = {n: np.asarray(q, np.float64) for n, q in zip(("conv", "kernel"), drawn, strict=True)}
        dense = i < start_step
        expected = {n: x.mean(0) if dense or x.ndim < 3 else reference.reduce(n, x) for n, x in a.items()}
        memory = {n: np.zeros_like(x) if dense or x.ndim < 3 else x - expected[n] for n, x in a.items()}
        close(out, expected, 2e-4)
        close(residual, memory, 2e-4)
        words = (36 + 20 + 40 + 50) * 2 + 8
        assert float(state.stats.payload_bits[0]) == 32 * (sum(x[0].size for x in a.values()) if dense else words)


def test_powersgd_recovers_from_zero_gradients_and_dependent_columns() -> None:
    tx = gp.compress(baselines.powersgd(rank=3))
    state, step = tx.init(jnp.zeros((30, 30))), jax.jit(tx.update)
    gradient = jnp.outer(jnp.arange(1.0, 31), jnp.arange(30.0))
    for g in (jnp.zeros((30, 30)), gradient, gradient):
        out, state = step(g, state)
        np.testing.assert_allclose(out, g, rtol=1e-4, atol=1e-3)
    full = jnp.asarray(np.random.default_rng(0).normal(size=(30, 30)), jnp.float32)
    for _ in range(60):
        out, state = step(full, state)
    # The memory brings every direction to the wire in the end: what has come out, on average, is what went in.
    assert float(jnp.linalg.norm(state.memory.residual)) < 12 * float(jnp.linalg.norm(full))


def test_powersgds_program_does_not_grow_with_the_rank() -> None:
    orthonormalise = importlib.import_module("gradpart_jax.baselines.powersgd").orthonormalise
    two, many = (len(jax.make_jaxpr(orthonormalise)(jnp.zeros((1, 40, rank))).pretty_print()) for rank in (2, 30))
    assert many < 1.1 * two
    columns = np.random.default_rng(0).normal(size=(40, 30))
    columns[:, 7] = columns[:, 3]
    found, rest = np.asarray(jax.jit(orthonormalise)(jnp.asarray(columns, jnp.float32))), np.arange(30) != 7
    assert not found[:, 7].any()
    expected = orthonormal(columns[:, rest])
    signs = np.sign(np.sum(expected * found[:, rest], axis=0))
    np.testing.assert_allclose(found[:, rest], expected * signs, atol=1e-4)


def test_demo_sends_the_largest_cosine_coefficients_of_a_decaying_momentum() -> None:
    scipy_fft = pytest.importorskip("scipy.fft", reason="scipy is the reference for the cosine transform")
    keep, chunk, decay = 8, 16, 0.9
    cosines = importlib.import_module("gradpart_jax.baselines.demo").cosines
    np.testing.assert_allclose(cosines(16), scipy_fft.dct(np.eye(16), norm="ortho", axis=0), atol=1e-12)
    momentum = {n: np.zeros((W, *s)) for n, s in SHAPES.items()}
    both = zip(
        *(run(baselines.demo(keep, chunk, sign=sign), memory_decay=decay) for sign in (False, True)), strict=True
    )
    for i, ((out, residual, _), (signs, same, _)) in enumerate(both):
        for name, g in gradients(i).items():
            a = g + momentum[name]
            m = as_matrix(a) if a.ndim > 2 else a.reshape(W, -1, 1)
            h, w = min(chunk, m.shape[1]), min(chunk, m.shape[2])
            update, sent = np.zeros(m.shape[1:]), np.zeros_like(m)
            for r in range(0, m.shape[1], h):
                for c in range(0, m.shape[2], w):
                    block = np.zeros((W, h, w))
                    piece = m[:, r : r + h, c : c + w]
                    block[:, : piece.shape[1], : piece.shape[2]] = piece
                    freq = scipy_fft.dctn(block, axes=(1, 2), norm="ortho").reshape(W, -1)
                    kept, count = np.zeros_like(freq), np.zeros(h * w)
                    for d in range(W):
                        top = np.argsort(-np.abs(freq[d]), kind="stable")[:keep]
                        kept[d, top] = freq[d, top]
                        count[top] += 1
                    mean = (kept.sum(0) / np.maximum(count, 1)).reshape(h, w)
                    back = functools.partial(scipy_fft.idctn, norm="ortho")
                    update[r : r + h, c : c + w] = back(mean)[: piece.shape[1], : piece.shape[2]]
                    for d in range(W):
                        sent[d, r : r + h, c : c + w] = back(kept[d].reshape(h, w))[: piece.shape[1], : piece.shape[2]]
            momentum[name] = decay * (a - sent.reshape(a.shape))
            np.testing.assert_allclose(out[name], update.reshape(g.shape[1:]), atol=1e-4 * np.abs(update).max())
            np.testing.assert_allclose(residual[name], momentum[name], atol=1e-4 * np.abs(a).max())
            np.testing.assert_array_equal(same[name], residual[name])
            np.testing.assert_array_equal(signs[name], np.sign(out[name]))


def test_ef21_sends_what_an_estimate_lacks() -> None:
    estimate = {n: np.zeros((W, *s)) for n, s in SHAPES.items()}
    for i, (out, kept, state) in enumerate(run(baselines.onebit_sgd(), steps=8, error_feedback="ef21")):
        for name, g in gradients(i).items():
            estimate[name] = estimate[name] + np.stack([one_bit(x) for x in g - estimate[name]])
        close(kept, estimate, 1e-4)
        close(out, {n: x.mean(0) for n, x in estimate.items()}, 1e-4)
        close({n: x[0] for n, x in cut(state.estimate).items()}, out, 1e-6)


def test_ef21_reaches_a_gradient_that_stays() -> None:
    tx = gp.compress(baselines.topk(0.2), error_feedback="ef21")
    gradient = jnp.asarray(flatten(gradients(0), 0))
    state = tx.init(gradient)
    step = jax.jit(tx.update)
    for _ in range(6):
        out, state = step(gradient, state)
    np.testing.assert_allclose(out, gradient, rtol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        (lambda: baselines.dense("float16"), ValueError, "dtype='float16'"),
        (lambda: baselines.qsgd(bits=1), ValueError, "bits=1"),
        (lambda: baselines.qsgd(bucket=0), ValueError, "bucket=0"),
        (lambda: baselines.terngrad(clip=0.0), ValueError, "clip=0.0"),
        (lambda: baselines.terngrad(seed="a"), TypeError, "seed='a'"),
        (lambda: baselines.int8(block=1.5), TypeError, "block=1.5"),
        (lambda: baselines.natural(seed=-1), ValueError, "seed=-1"),
        (lambda: baselines.powersgd(rank=0), ValueError, "rank=0"),
        (lambda: baselines.powersgd(start_step=-1), ValueError, "start_step=-1"),
        (lambda: baselines.powersgd(min_compression=0), ValueError, "min_compression=0"),
        (lambda: baselines.demo(keep=0), ValueError, "keep=0"),
        (lambda: baselines.demo(chunk=1), ValueError, "chunk=1"),
        (lambda: gp.compress(baselines.int8(), error_feedback="ef22"), ValueError, "error_feedback='ef22'"),
        (lambda: gp.compress(baselines.int8(), error_feedback="ef21", momentum=0.9), ValueError, "EF21"),
    ],
)
def test_bad_arguments_are_named(arguments, error, words: str) -> None:
    with pytest.raises(error, match=words):
        arguments()


@pytest.mark.optimised
def test_demo_of_thin_leaves_is_the_same_bits_by_pmap_and_vmap() -> None:
    """Short transforms are not contracted with what stands around them."""
    like = {"kernel": jnp.zeros((20, 30)), "thin": jnp.zeros((3, 1, 2))}
    tx = gp.compress(gp.baselines.demo(4), "w", memory_decay=0.999)
    state = jax.tree.map(lambda x: jnp.broadcast_to(x, (4, *jnp.shape(x))), tx.init(like))
    by_vmap, by_pmap = jax.jit(jax.vmap(tx.update, axis_name="w")), jax.pmap(tx.update, "w")
    one = other = (None, state)
    for i in range(3):
        g = jax.tree.map(lambda x, i=i: jax.random.normal(jax.random.key(i), (4, *x.shape)), like)
        one, other = by_vmap(g, one[1]), by_pmap(g, other[1])
        jax.tree.map(np.testing.assert_array_equal, one, other)
