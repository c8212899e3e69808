"""Sparse baselines against plain numpy versions, written from the formulas, over several steps on several devices."""

import functools
import importlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special, stats

import gradpart_jax as gp
from gradpart_jax import magnitudes, moments, sparse
from gradpart_jax.buffers import Buffer
from gradpart_jax.codecs import index_codec
from gradpart_jax.segments import layout_of

W = 4
AXIS = "w"
PARAMS = {"bias": jnp.zeros(7), "kernel": jnp.zeros((40, 50)), "none": jnp.zeros(0), "scale": jnp.zeros(())}
LAYOUT = layout_of(PARAMS)
NAMES = [k for k in PARAMS if PARAMS[k].size]


def gradients(seed: int):
    """Heavy-tailed gradients with a part that all devices share, stacked: a dict of float32[W, ...]."""
    rng = np.random.default_rng(seed)
    made = {}
    for name, leaf in PARAMS.items():
        own = rng.laplace(size=(W, *leaf.shape)) ** 3 + rng.normal(size=(1, *leaf.shape))
        made[name] = own.astype(np.float32)
    return made


@functools.cache
def many(tx):
    return jax.jit(jax.vmap(lambda g, s: tx.update(g, s), axis_name=AXIS))


def start(tx):
    return jax.tree.map(lambda x: jnp.broadcast_to(x, (W, *jnp.shape(x))), tx.init(PARAMS))


def vectors(tree) -> list[dict[str, np.ndarray]]:
    return [{k: np.asarray(tree[k][w]).reshape(-1) for k in NAMES} for w in range(W)]


def check(scheme, reference, steps: int = 5, rtol: float = 1e-6, **options):
    """Run a scheme beside `reference(vectors, step)`, which gives what each device sends, and their mean.

    A reference is given, and gives, a list over devices of dicts of flat leaves; the mean is that of what is sent,
    unless it gives a pair (sent, mean).
    """
    tx = gp.compress(scheme, AXIS, **options)
    state = start(tx)
    memory = [{k: np.zeros(PARAMS[k].size, np.float32) for k in NAMES} for _ in range(W)]
    for step in range(steps):
        g = gradients(step)
        out, state = many(tx)(g, state)
        a = [{k: v[k] + m[k] for k in NAMES} for v, m in zip(vectors(g), memory, strict=True)]
        sent = reference(a, step)
        sent, mean = sent if isinstance(sent, tuple) else (sent, None)
        memory = [{k: x[k] - s[k] for k in NAMES} for x, s in zip(a, sent, strict=True)]
        for k in NAMES:
            expected = np.mean([s[k] for s in sent], axis=0, dtype=np.float64) if mean is None else mean[k]
            for w in range(W):
                got = np.asarray(out[k][w]).reshape(-1)
                np.testing.assert_allclose(got, expected, rtol=rtol, atol=1e-6, err_msg=f"step {step}, {k}")
                at = LAYOUT.starts[list(PARAMS).index(k)]
                kept = np.asarray(state.memory.residual[w])[at : at + PARAMS[k].size]
                np.testing.assert_allclose(kept, memory[w][k], rtol=rtol, atol=1e-6, err_msg=f"step {step}, {k}")
    return state


def quota(ratio: float, size: int) -> int:
    return min(size, max(1, round(ratio * size)))


def largest(x: np.ndarray, k: int) -> np.ndarray:
    """Keep the k largest magnitudes, the first of equal ones."""
    kept = np.zeros_like(x)
    order = np.argsort(-np.abs(x), kind="stable")[:k]
    kept[order] = x[order]
    return kept


def each(select):
    return lambda a, step: [{k: select(x[k], k, w, step) for k in NAMES} for w, x in enumerate(a)]


@pytest.mark.parametrize("ratio", [0.02, 1.0])
def test_topk(ratio: float) -> None:
    state = check(gp.baselines.topk(ratio), each(lambda x, *_: largest(x, quota(ratio, x.size))))
    found = gp.stats(state)
    entries = sum(quota(ratio, PARAMS[k].size) for k in NAMES)
    np.testing.assert_array_equal(found.sent, np.full(W, entries, np.float32))
    np.testing.assert_array_equal(found.realised, found.asked)
    assert float(found.payload_bits[0]) == sparse.SparseFormat(LAYOUT.total, entries).bits


def test_equal_magnitudes_are_taken_in_order_and_zeros_never() -> None:
    x = jnp.asarray(np.resize([0.0, 2.0, -2.0, 1.0], LAYOUT.total).astype(np.float32))
    sizes = jnp.asarray(LAYOUT.sizes, jnp.int32)
    for share in (0.0, 0.1, 0.6, 1.0):
        ranks = jnp.floor(share * sizes).astype(jnp.int32)
        inside = np.concatenate([np.arange(s, s + n) for s, n in zip(LAYOUT.starts, LAYOUT.sizes, strict=True)])
        y = jnp.zeros_like(x).at[inside].set(x[inside])
        words = np.asarray(magnitudes.top(y, ranks, LAYOUT))
        got = np.unpackbits(words.view(np.uint8), bitorder="little").astype(bool)
        expected = np.zeros(LAYOUT.total, bool)
        for s, n, k in zip(LAYOUT.starts, LAYOUT.sizes, np.asarray(ranks), strict=True):
            expected[s : s + n] = largest(np.asarray(y[s : s + n]), int(k)) != 0
        np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("scale", [1e-38, 1.0, 3e38])
def test_ranks_hold_at_any_scale(scale: float) -> None:
    x = np.random.default_rng(0).uniform(-1, 1, LAYOUT.total).astype(np.float32) * np.float32(scale)
    ranks = jnp.asarray([min(n, 5) for n in LAYOUT.sizes], jnp.int32)
    got = np.asarray(magnitudes.rank_magnitude(jnp.asarray(x), ranks, LAYOUT))
    for s, (at, n) in enumerate(zip(LAYOUT.starts, LAYOUT.sizes, strict=True)):
        padded = np.abs(x[at : at + -(-n // 32) * 32])
        assert n == 0 or got[s] == np.sort(padded)[-min(n, 5)]


def test_a_tail_is_numpys() -> None:
    x = np.random.default_rng(1).laplace(size=LAYOUT.total).astype(np.float32)
    inside = np.zeros(LAYOUT.total, bool)
    for at, n in zip(LAYOUT.starts, LAYOUT.sizes, strict=True):
        inside[at : at + n] = True
    x = np.where(inside, x, 0).astype(np.float32)
    scale = moments.greatest_magnitude(jnp.asarray(x), LAYOUT)
    bound = 0.1
    found = moments.tail(jnp.asarray(x), scale, jnp.full(len(LAYOUT.sizes), bound), LAYOUT)
    for s, (at, n) in enumerate(zip(LAYOUT.starts, LAYOUT.sizes, strict=True)):
        if n:
            y = np.abs(x[at : at + n]).astype(np.float64)
            y /= y.max()
            kept = y[y > bound]
            assert float(found.number[s]) == kept.size
            np.testing.assert_allclose(found.mean[s], np.mean(kept - bound), rtol=1e-5)
            np.testing.assert_allclose(found.square[s], np.mean((kept - bound) ** 2), rtol=1e-5)
            np.testing.assert_allclose(found.log[s], np.mean(np.log(kept)), rtol=1e-4, atol=1e-5)


def test_a_payload_is_read_as_it_was_written_and_garbage_does_no_harm() -> None:
    rng = np.random.default_rng(0)
    shape = sparse.SparseFormat(1000, 50)
    for used in (0, 1, 49, 50):
        indices = np.full(50, 1000, np.int32)
        indices[:used] = np.sort(rng.choice(1000, used, replace=False))
        values = np.where(indices < 1000, rng.normal(size=50), 0).astype(np.float32)
        buffer = Buffer(jnp.asarray(indices), jnp.asarray(values), jnp.int32(used))
        words = shape.encode(buffer, jnp.bool_(used != 1), jnp.int32(77))
        assert words.shape == (shape.words,)
        jax.tree.map(np.testing.assert_array_equal, shape.decode(words), buffer)
        assert bool(shape.finite(words)) == (used != 1)
        assert int(shape.candidates(words)) == 77
    for _ in range(50):
        found = shape.decode(jnp.asarray(rng.integers(0, 2**32, shape.words, np.uint32)))
        assert ((found.indices >= 0) & (found.indices <= 1000)).all()
        assert np.isfinite(np.asarray(found.values)).all()


@pytest.mark.parametrize("bits", [0.1, 1.0, 40.0])
def test_a_budget_becomes_a_ratio(bits: float) -> None:
    n = 100_000
    k = round(sparse.ratio_within(bits, n) * n)
    assert sparse.SparseFormat(n, k).bits <= bits * n
    assert k == n or sparse.SparseFormat(n, k + 1).bits > bits * n


@pytest.mark.parametrize("unbiased", [False, True])
def test_randomk_sends_one_entry_of_each_run_on_all_devices(unbiased: bool) -> None:
    ratio, n = 0.1, LAYOUT.elements
    count = quota(ratio, n)
    runs = np.array_split(np.arange(n), count)  # the longer ones first
    lengths = np.concatenate([np.full(r.size, r.size) for r in runs])
    tx = gp.compress(gp.baselines.randomk(ratio, unbiased=unbiased, seed=3), AXIS, error_feedback=False)
    state, times = start(tx), np.zeros(n)
    for step in range(100):
        g = gradients(step % 3)
        out, state = many(tx)(g, state)
        tight = np.concatenate([np.asarray(out[k][0]).reshape(-1) for k in NAMES])
        mean = np.concatenate([g[k].mean(0, dtype=np.float64).reshape(-1) for k in NAMES])
        taken = tight != 0
        assert [int(taken[r].sum()) for r in runs] == [1] * count
        np.testing.assert_allclose(tight[taken], (mean * (lengths if unbiased else 1))[taken], rtol=1e-5, atol=1e-3)
        times += taken
    # A sum of 100 n draws' squares: each run's chi-squared has (length - 1) degrees of freedom. Error rate 1e-6.
    chi = np.sum((times - 100 / lengths) ** 2 / (100 / lengths))
    freedom = n - count
    assert abs(chi - freedom) < 5 * np.sqrt(2 * freedom)


def test_randomk_remembers() -> None:
    tx = gp.compress(gp.baselines.randomk(0.1), AXIS)
    state, total = start(tx), 0.0
    for step in range(5):
        out, state = many(tx)(gradients(step), state)
        total = total + np.asarray(out["kernel"][0], np.float64)
    owed = np.asarray(state.memory.residual, np.float64)[:, 32:2032].mean(0).reshape(40, 50)
    summed = sum(gradients(step)["kernel"].astype(np.float64).mean(0) for step in range(5))
    np.testing.assert_allclose(total + owed, summed, atol=1e-4)


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: gp.baselines.topk(0.0), ValueError, "ratio=0.0"),
        (lambda: gp.baselines.topk(jnp.float32(0.1)), TypeError, "ratio sizes buffers"),
        (lambda: gp.baselines.randomk("half"), TypeError, "ratio='half'"),
        (lambda: gp.baselines.randomk(seed=-1), ValueError, "seed=-1"),
        (lambda: gp.baselines.threshold(0.0), ValueError, "value=0.0"),
        (lambda: gp.baselines.dgc(sample=2.0), ValueError, "sample=2.0"),
        (lambda: gp.baselines.dgc(warmup_steps=5, warmup=(0.1, 2)), ValueError, "warmup=2"),
        (lambda: gp.baselines.gaussiank(slack=0.5), ValueError, "slack=0.5"),
        (lambda: gp.baselines.redsync(slack="much"), TypeError, "slack='much'"),
        (lambda: gp.baselines.sidco(fit="normal"), ValueError, "exponential"),
        (lambda: gp.baselines.sidco(stages=9), ValueError, "stages=9"),
        (lambda: gp.baselines.scalecom(low_pass=0.0), ValueError, "low_pass=0.0"),
        (lambda: gp.baselines.egc(ratio=-1), ValueError, "ratio=-1"),
        (lambda: gp.baselines.oktopk(reuse_threshold=0), ValueError, "reuse_threshold=0"),
        (lambda: gp.baselines.lgc(code=33), ValueError, "code=33"),
        (lambda: gp.baselines.lgc(train_steps=1.5), TypeError, "train_steps=1.5"),
    ],
)
def test_bad_arguments_are_named(make, error, words: str) -> None:
    with pytest.raises(error, match=re.escape(words)):
        make()


def test_a_fixed_threshold() -> None:
    state = check(
        gp.baselines.threshold(2.0, ratio=0.9), each(lambda x, *_: np.where(np.abs(x) >= 2.0, x, 0)), rtol=1e-5
    )
    assert (np.asarray(gp.stats(state).overflow) == 0).all()


def test_a_threshold_is_that_of_the_devices_that_sent() -> None:
    tx = gp.compress(gp.baselines.threshold(1.0, ratio=0.9), AXIS)
    g = gradients(0)
    g["kernel"] = g["kernel"] * np.float32([0, 1, 0, 0])[:, None, None]
    _, state = many(tx)(g, start(tx))
    sent = np.abs(g["kernel"][1])
    at = list(PARAMS).index("kernel")
    np.testing.assert_array_equal(gp.stats(state).threshold[:, at], sent[sent >= 1.0].min())


def test_what_a_fixed_threshold_lets_through_beyond_the_payload_comes_later() -> None:
    tx = gp.compress(gp.baselines.threshold(1e-3, ratio=0.1), AXIS)
    state, sent = start(tx), np.zeros(2000, bool)
    g = gradients(0)
    for _ in range(40):
        out, state = many(tx)(g, state)
        sent |= np.asarray(out["kernel"][0]).reshape(-1) != 0
    found = gp.stats(state)
    np.testing.assert_array_equal(found.sent, found.capacity)
    assert (np.asarray(found.overflow) > 0).all()
    assert sent.mean() > 0.99


def sampled(x: np.ndarray, step: int, ratio: float) -> np.ndarray:
    k = quota(ratio, x.size)
    drawn = min(x.size, max(int(np.ceil(0.01 * x.size)), int(np.ceil(1 / ratio))))
    stride = x.size // drawn
    sample = np.sort(np.abs(x[step % stride :: stride][:drawn]))[::-1]
    threshold = sample[quota(ratio, drawn) - 1]
    for corrections in range(11):
        count = np.sum((np.abs(x) >= threshold) & (x != 0))
        factor = 0.8 if count < 0.8 * k else 1.3 if count > 4 * k else 1.0
        if factor == 1.0 or k == x.size:
            break
        if corrections == 10:
            return largest(x, k)
        threshold = threshold * np.float32(factor)
    return largest(np.where(np.abs(x) >= threshold, x, 0), k)


def test_dgc() -> None:
    check(gp.baselines.dgc(0.02), each(lambda x, k, w, step: sampled(x, step, 0.02)), steps=8)


def test_dgc_warms_up() -> None:
    ratios, bits = [0.5, 0.5, 0.1, 0.1, 0.02, 0.02], []
    scheme = gp.baselines.dgc(0.02, warmup_steps=2, warmup=(0.5, 0.1))
    check(scheme, each(lambda x, k, w, step: sampled(x, step, ratios[step])), steps=6)
    tx = gp.compress(scheme, AXIS, momentum=0.9)
    state = start(tx)
    for step in range(6):
        _, state = many(tx)(gradients(step), state)
        bits.append(float(gp.stats(state).payload_bits[0]))
    expected = [sparse.SparseFormat(LAYOUT.total, sum(quota(r, PARAMS[k].size) for k in NAMES)).bits for r in ratios]
    assert bits == expected
    # Nor does it warm up once more, after 2^31 steps
    wrapped = state.scheme._replace(shared=jnp.full(W, -(2**31), jnp.int32))
    _, state = many(tx)(gradients(6), state._replace(scheme=wrapped))
    assert float(gp.stats(state).payload_bits[0]) == bits[-1]


def normal_quantile(x: np.ndarray, ratio: float) -> np.ndarray:
    k, y = quota(ratio, x.size), x.astype(np.float64)
    threshold = max(y.mean() + abs(stats.norm.ppf(ratio / 2)) * y.std(), 0.0)
    for _ in range(2):
        count = np.sum((np.abs(y) >= threshold) & (y != 0))
        threshold *= 0.5 if count < 2 * k / 3 else 1.5 if count > 4 * k / 3 else 1.0
    return np.where(np.abs(x) >= min(threshold, np.abs(y).max()), x, 0)


def test_gaussiank() -> None:
    check(gp.baselines.gaussiank(0.02, slack=20.0), each(lambda x, *_: normal_quantile(x, 0.02)), steps=8)


def halved(x: np.ndarray, ratio: float) -> np.ndarray:
    k, y = quota(ratio, x.size), np.abs(x.astype(np.float64))
    low, high = 0.0, 1.0
    for _ in range(10):
        t = (low + high) / 2
        threshold = y.mean() + t * (y.max() - y.mean())
        count = np.sum((y >= threshold) & (y > 0))
        if k < count < 2 * k:
            break
        low, high = (low, t) if count <= k else (t, high)
    return np.where(y >= threshold, x, 0)


def test_redsync() -> None:
    check(gp.baselines.redsync(0.02, slack=20.0), each(lambda x, *_: halved(x, 0.02)), steps=8)


class FittedStages:
    """The number of stages of each device and leaf."""

    def __init__(self, fit: str, ratio: float) -> None:
        self.fit, self.ratio = fit, ratio
        self.stages: dict[tuple[int, int], int] = {}
        self.counts: dict[tuple[int, int], list[int]] = {}

    def quantile(self, x: np.ndarray, low: float, share: float, stage: int) -> float:
        excess = x[x > low] - low
        if excess.size < 3:
            return low
        mean, variance = excess.mean(), excess.var()
        if self.fit == "exponential":
            return low - mean * np.log(share)
        if self.fit == "gamma" and stage == 0:
            s = np.log(mean) - np.log(x[x > 0]).mean()
            order = (3 - s + np.sqrt((s - 3) ** 2 + 24 * s)) / (12 * s)
            return mean / order * special.gammaincinv(order, 1 - share)
        k, scale = (mean**2 / variance - 1) / 2, mean * (mean**2 / variance + 1) / 2
        return low - scale * np.expm1(k * np.log(share)) / k

    def __call__(self, x: np.ndarray, k: int, w: int, step: int) -> np.ndarray:
        y, asked, key = np.abs(x.astype(np.float64)), quota(self.ratio, x.size), (w, x.size)
        number, share = self.stages.setdefault(key, 1), asked / x.size
        low = 0.0
        for stage in range(number):
            part = max(share, 0.25) if stage == 0 else (min(share / 0.25, 1.0)) ** (1 / (number - 1))
            low = self.quantile(y, low, share if number == 1 else part, stage)
        sent = np.where((y >= min(low, y.max())) & (y > 0), x, 0)
        counts = self.counts.setdefault(key, [])
        counts.append(int(np.sum(sent != 0)))
        if len(counts) % 5 == 0:
            mean = np.mean(counts[-5:]) / asked
            self.stages[key] = int(np.clip(number + (mean < 0.8) - (mean > 1.2), 1, 5))
        return sent


@pytest.mark.parametrize("fit", ["exponential", "gamma", "pareto"])
def test_sidco(fit: str) -> None:
    reference = FittedStages(fit, 0.05)
    state = check(gp.baselines.sidco(0.05, fit=fit, slack=20.0), each(reference), steps=16, rtol=1e-5)
    number = np.asarray(state.scheme.local.number)
    assert number.max() > 1
    for w in range(W):
        for k in NAMES:
            assert number[w, list(PARAMS).index(k)] == reference.stages[w, PARAMS[k].size]


@pytest.mark.parametrize("fit", ["exponential", "gamma", "pareto"])
def test_sidcos_share_is_of_what_is_fitted(fit: str) -> None:
    """A leaf of nine tenths zeros sends as much as is asked for, not a tenth of it."""
    tx, rng = gp.compress(gp.baselines.sidco(0.01, fit=fit), error_feedback=False), np.random.default_rng(0)
    held, counts = rng.random(20_000) < 0.1, []
    state, update = tx.init(jnp.zeros(20_000)), jax.jit(tx.update)
    for _ in range(40):
        out, state = update(jnp.asarray(held * rng.normal(size=held.size), jnp.float32), state)
        counts.append(int(jnp.sum(out != 0)))
    assert 120 < np.mean(counts[20:]) <= 250


SEARCHING = {"dgc": {}, "sidco": {}, "gaussiank": {}, "redsync": {}, "topk": {}, "egc": {}}
FITTED = [("sidco", {"fit": "gamma"}), ("sidco", {"fit": "pareto"})]


@pytest.mark.parametrize(("name", "options"), [*SEARCHING.items(), *FITTED])
def test_no_leaf_waits_for_ever(name: str, options: dict) -> None:
    """Of magnitudes that are all nearly equal a search for a threshold goes past them all."""
    rng = np.random.default_rng(1)
    g = {
        "equal": np.ones(1000),
        "even": np.linspace(0.9, 1.1, 100),
        "few": rng.normal(size=4),
        "three": np.full(3, -0.3),
        "wide": rng.uniform(0.9, 1.1, 2000),
    }
    g = {key: jnp.asarray(x, jnp.float32) for key, x in g.items()}
    tx = gp.compress(getattr(gp.baselines, name)(0.01, **options))
    state, update, waiting = tx.init(g), jax.jit(tx.update), set(g)
    for _ in range(150):  # what many reach goes in turns
        out, state = update(g, state)
        waiting -= {key for key in waiting if np.any(out[key])}
    assert waiting == set()


def test_dgc_of_all_is_the_gradient_and_its_sample_reaches_the_end() -> None:
    g = jax.random.normal(jax.random.key(0), (100,))
    tx = gp.compress(gp.baselines.dgc(1.0))
    np.testing.assert_array_equal(tx.update(g, tx.init(g))[0], g)
    rising = jnp.where(jnp.arange(1500) < 1000, 1e-3, 1.0) * (1 + jnp.arange(1500) / 1500)
    tx = gp.compress(gp.baselines.dgc(0.001), error_feedback=False)
    state = tx.init(rising)
    for _ in range(3):
        out, state = jax.jit(tx.update)(rising, state)
        assert np.flatnonzero(out).tolist() == [1498, 1499]


def followed(a, step):
    """Values at the leader's largest."""
    leader = a[step % W]
    masks = {k: largest(leader[k], quota(0.05, leader[k].size)) != 0 for k in NAMES}
    return [{k: np.where(masks[k], x[k], 0) for k in NAMES} for x in a]


def test_scalecom_follows_each_device_in_turn() -> None:
    state = check(gp.baselines.scalecom(0.05), followed, steps=6, rtol=1e-5)
    count = sum(quota(0.05, PARAMS[k].size) for k in NAMES)
    positions = 32 * (index_codec(LAYOUT.total, count).words + 1)
    np.testing.assert_array_equal(gp.stats(state).payload_bits, np.full(W, positions + 32 * count, np.float32))


def test_scalecoms_memory_is_filtered() -> None:
    b = 0.25
    tx = gp.compress(gp.baselines.scalecom(0.05, low_pass=b), AXIS)
    state = start(tx)
    memory = [{k: np.zeros(PARAMS[k].size) for k in NAMES} for _ in range(W)]
    for step in range(6):
        g = gradients(step)
        out, state = many(tx)(g, state)
        a = [{k: v[k] + m[k] for k in NAMES} for v, m in zip(vectors(g), memory, strict=True)]
        sent = followed(a, step)
        memory = [
            {k: (1 - b) * m[k] + b * (x[k] - s[k]) for k in NAMES} for m, x, s in zip(memory, a, sent, strict=True)
        ]
        for k in NAMES:
            mean = np.mean([s[k] for s in sent], axis=0)
            np.testing.assert_allclose(np.asarray(out[k][0]).reshape(-1), mean, rtol=1e-4, atol=1e-4)


def by_entropy(ratio: float):
    def select(a, step):
        sent = []
        for x in a:
            weights = {}
            for k in NAMES:
                y = np.abs(x[k][x[k] != 0])
                bins = y.view(np.int32) >> 21
                counts = np.bincount(np.maximum(bins - bins.max() + 63, 0), minlength=64)
                p = counts[counts > 0] / counts.sum()
                weights[k] = x[k].size * -np.sum(p * np.log(p))
            left = sum(quota(ratio, x[k].size) for k in NAMES) - len(NAMES)
            share = {k: 1 + int(np.floor(left * w / sum(weights.values()) + 1e-3)) for k, w in weights.items()}
            sent.append({k: largest(x[k], min(share[k], x[k].size)) for k in NAMES})
        return sent

    return select


def test_egc() -> None:
    check(gp.baselines.egc(0.05), by_entropy(0.05), steps=6)


class TwiceSelected:
    """Thresholds of each device and of the sum, searched for every third step."""

    def __init__(self, ratio: float) -> None:
        self.k = quota(ratio, LAYOUT.elements)
        self.local: dict[int, float] = {}
        self.common = 0.0

    def __call__(self, a, step: int):
        flat = [np.concatenate([x[k] for k in NAMES]) for x in a]
        if step % 3 == 0:
            self.local = {w: np.sort(np.abs(x))[-self.k] for w, x in enumerate(flat)}
        sent = [np.where(np.abs(x) >= self.local[w], x, 0) for w, x in enumerate(flat)]
        total = np.zeros_like(flat[0])
        for x in sent:
            total = total + x
        if step % 3 == 0:
            self.common = np.sort(np.abs(total))[-self.k]
        kept = (np.abs(total) >= self.common) & (total != 0)
        cuts = np.cumsum([PARAMS[k].size for k in NAMES])[:-1]
        parts = [dict(zip(NAMES, np.split(np.where(kept, x, 0), cuts), strict=True)) for x in sent]
        return parts, dict(zip(NAMES, np.split(np.where(kept, total / W, 0), cuts), strict=True))


def test_oktopk() -> None:
    scheme = gp.baselines.oktopk(0.05, reuse_threshold=3, reuse_regions=4, slack=20.0)
    check(scheme, TwiceSelected(0.05), steps=8, rtol=1e-5)


def test_oktopk_looks_for_a_threshold_at_once_where_it_lets_too_much_through() -> None:
    tx = gp.compress(gp.baselines.oktopk(0.05, reuse_threshold=100), AXIS, error_feedback=False)
    k = quota(0.05, LAYOUT.elements)
    most = int(np.ceil(1.25 * k))
    state, before = start(tx), np.zeros(W)
    for step, factor in enumerate((1.0, 100.0, 90.0, 1.0)):
        g = {name: np.float32(factor) * leaf for name, leaf in gradients(step).items()}
        _, state = many(tx)(g, state)
        found = np.asarray(state.scheme.local)[:, 0]
        for w, x in enumerate(vectors(g)):
            magnitudes = np.sort(np.abs(np.concatenate([x[name] for name in NAMES])))
            anew = step == 0 or np.sum(magnitudes >= before[w]) > most
            assert found[w] == (magnitudes[-k] if anew else before[w])
        assert step != 1 or (found > 50 * before).all()
        assert step != 3 or (found == before).all()
        before = found


def test_oktopk_alone_sends_the_largest_of_what_a_stale_threshold_lets_through() -> None:
    tx = gp.compress(gp.baselines.oktopk(0.05, reuse_threshold=100))
    update, x = jax.jit(tx.update), np.random.default_rng(0).laplace(size=2000).astype(np.float32)
    _, state = update(jnp.asarray(x), tx.init(jnp.zeros(2000)))
    before = np.asarray(state.memory.residual)[:2000]
    out, state = update(jnp.asarray(50 * x), state)
    a = 50 * x + before
    np.testing.assert_array_equal(out, largest(a, 100))


def test_oktopks_regions_balance_the_load_and_its_link_does_not_grow() -> None:
    tx = gp.compress(gp.baselines.oktopk(0.05, reuse_threshold=4, reuse_regions=4), AXIS)
    state, k = start(tx), quota(0.05, LAYOUT.elements)
    total = 0.0
    for step in range(8):
        g = gradients(step)
        g["kernel"] = g["kernel"] * np.linspace(0, 3, 40, dtype=np.float32)[:, None] ** 2  # most lies at the end
        out, state = many(tx)(g, state)
        total = total + g["kernel"].astype(np.float64).mean(0) - np.asarray(out["kernel"][0], np.float64)
        found = gp.stats(state)
        bits = sparse.SparseFormat(LAYOUT.total, int(np.ceil(1.25 * k / W))).bits
        counting = 32 * 1024 if step % 4 == 0 else 0
        assert float(found.payload_bits[0]) == (W + 1) * bits + counting
        assert float(found.link_bits[0]) == (W - 1) * bits + (W - 1) * bits + 1.5 * counting
        assert float(found.sent[0]) > 0.5 * k
        if step % 4 == 0:
            assert float(found.overflow[0]) < 0.15 * k
    owed = np.asarray(state.memory.residual, np.float64)[:, 32:2032].mean(0).reshape(40, 50)
    np.testing.assert_allclose(owed, total, rtol=1e-4, atol=1e-3)
    loads = np.asarray(state.scheme.shared.load)
    assert (loads == loads[0]).all()
    capacity = tx.init(jax.tree.map(lambda x: x[0], g)).stats.capacity
    np.testing.assert_array_equal(found.capacity, capacity)


@pytest.mark.parametrize("load", [0, 1, 5_000_000, 2**31 - 1])
def test_oktopks_regions_are_of_equal_load_however_great_it_is(load: int) -> None:
    oktopk = importlib.import_module("gradpart_jax.baselines.oktopk")
    owner = oktopk._owner(jnp.full(1024, load, jnp.int32), devices=256)
    np.testing.assert_allclose(owner, np.arange(1024) // 4, atol=1)


def network(weights, blocks: np.ndarray) -> np.ndarray:
    layers = weights["encoder"]["params"]
    first, second, last = (layers[name] for name in ("curved", "straight", "out"))
    hidden = np.tanh(blocks @ first["kernel"] + first["bias"]) + blocks @ second["kernel"] + second["bias"]
    return hidden @ last["kernel"] + last["bias"]


class Adam:
    """Adam on the mean squared error of the autoencoder, its gradient written out, from the weights given."""

    def __init__(self, weights) -> None:
        self.weights, self.step = weights, 0
        self.first, self.second = (jax.tree.map(np.zeros_like, weights) for _ in range(2))

    def __call__(self, x: np.ndarray) -> None:
        layers, decoder = self.weights["encoder"]["params"], self.weights["decoder"]
        curved = np.tanh(x @ layers["curved"]["kernel"] + layers["curved"]["bias"])
        hidden = curved + x @ layers["straight"]["kernel"] + layers["straight"]["bias"]
        codes = hidden @ layers["out"]["kernel"] + layers["out"]["bias"]
        d_decoded = 2 * (codes @ decoder - x) / x.size
        d_codes = d_decoded @ decoder.T
        d_hidden = d_codes @ layers["out"]["kernel"].T
        inputs = {"curved": x, "straight": x, "out": hidden}
        errors = {"curved": d_hidden * (1 - curved**2), "straight": d_hidden, "out": d_codes}
        dense = {k: {"kernel": inputs[k].T @ errors[k], "bias": errors[k].sum(0)} for k in errors}
        gradient = {"encoder": {"params": dense}, "decoder": codes.T @ d_decoded}
        self.step += 1
        self.first = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, self.first, gradient)
        self.second = jax.tree.map(lambda v, g: 0.999 * v + 0.001 * g**2, self.second, gradient)
        one, two = 1 - 0.9**self.step, 1 - 0.999**self.step
        self.weights = jax.tree.map(
            lambda w, m, v: w - 3e-3 * (m / one) / (np.sqrt(v / two) + 1e-8), self.weights, self.first, self.second
        )


def test_lgc_sends_values_while_its_network_learns_them_and_codes_afterwards() -> None:
    tx = gp.compress(gp.baselines.lgc(0.05, train_steps=3), AXIS)
    state, count = start(tx), sum(quota(0.05, PARAMS[k].size) for k in NAMES)
    memory = [{k: np.zeros(PARAMS[k].size) for k in NAMES} for _ in range(W)]
    rows = -(-count // 32)
    reference = Adam(jax.tree.map(lambda x: np.asarray(x[0], np.float64), state.scheme.shared.weights))
    for step in range(6):
        g = gradients(step)
        out, state = many(tx)(g, state)
        a = [{k: v[k] + m[k] for k in NAMES} for v, m in zip(vectors(g), memory, strict=True)]
        sent = followed(a, step)
        leader = a[step % W]
        places = np.concatenate([largest(leader[k], quota(0.05, leader[k].size)) != 0 for k in NAMES])
        values = np.stack([np.concatenate([x[k] for k in NAMES])[places] for x in a])
        scale = np.sqrt(np.mean(values[step % W] ** 2))
        blocks = np.pad(values / scale, ((0, 0), (0, rows * 32 - count))).reshape(W, rows, 32)
        if step < 3:
            reference(blocks.mean(0))
        else:
            decoded = network(reference.weights, blocks) @ reference.weights["decoder"]
            decoded *= np.sum(decoded * blocks, 2, keepdims=True) / np.sum(decoded**2, 2, keepdims=True)
            assert (np.sum((blocks - decoded) ** 2, 2) <= np.sum(blocks**2, 2)).all()
            cuts, flat = np.cumsum([PARAMS[k].size for k in NAMES])[:-1], np.zeros((W, places.size))
            flat[:, places] = scale * decoded.reshape(W, -1)[:, :count]
            sent = [dict(zip(NAMES, np.split(x, cuts), strict=True)) for x in flat]
        memory = [{k: x[k] - s[k] for k in NAMES} for x, s in zip(a, sent, strict=True)]
        for k in NAMES:
            mean = np.mean([s[k] for s in sent], axis=0)
            np.testing.assert_allclose(np.asarray(out[k][0]).reshape(-1), mean, rtol=1e-3, atol=1e-3)
            at = LAYOUT.starts[list(PARAMS).index(k)]
            kept = np.asarray(state.memory.residual)[:, at : at + PARAMS[k].size]
            np.testing.assert_allclose(kept, np.stack([m[k] for m in memory]), rtol=1e-3, atol=1e-3)
        for got, expected in zip(*map(jax.tree.leaves, (state.scheme.shared.weights, reference.weights)), strict=True):
            np.testing.assert_allclose(got, np.broadcast_to(expected, got.shape), rtol=0, atol=1e-5)
        positions = index_codec(LAYOUT.total, count).words + 2
        assert float(gp.stats(state).payload_bits[0]) == 32 * (positions + (count if step < 3 else 8 * rows))


def test_lgcs_network_learns() -> None:
    """Values of rank two, block by block: the code holds them."""
    rng = np.random.default_rng(0)
    pattern = rng.normal(size=(2, 32)).astype(np.float32)
    tx = gp.compress(gp.baselines.lgc(1.0, train_steps=400), error_feedback=False)
    state, update = tx.init(jnp.zeros(640)), jax.jit(tx.update)
    for _ in range(401):
        g = jnp.asarray((rng.normal(size=(20, 2)).astype(np.float32) @ pattern).reshape(-1))
        out, state = update(g, state)
    assert float(jnp.sum((out - g) ** 2)) < 0.1 * float(jnp.sum(g**2))
