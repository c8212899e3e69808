"""Families against SciPy, the predictor's bins and cold starts, entropy rules, and arithmetic that rounds alike."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

import gradpart_jax as gp
from gradpart_jax import predictor, summaries
from gradpart_jax.families import FAMILIES, Moments, positive, raw_of
from gradpart_jax.regions import ENTROPY_RULES, Prospect, allot, entropy_bits, kapur_split, partition
from gradpart_jax.replicated import replicated

X = np.geomspace(1e-3, 20, 40).astype(np.float32)
RAW = [np.float32([0, 0, 0, 0, 0]), np.float32([-0.5, 0.5, 0.4, -0.4, 0.7]), np.float32([0.7, -1, -0.6, 0.5, -1])]


def reference(name: str, raw: np.ndarray):
    """SciPy's distribution of the same shape, with unit scale."""
    value = [float(positive(jnp.float32(r))) for r in raw]
    return {
        "laplace": lambda: scipy.stats.expon(),
        "normal": lambda: scipy.stats.halfnorm(),
        "generalised_normal": lambda: scipy.stats.gennorm(np.clip(value[0], 0.2, 8.0)),
        "gamma": lambda: scipy.stats.gamma(np.clip(value[0], 0.05, 50.0)),
        "mixture": lambda: None,
        "pareto": lambda: None,
    }[name]()


@pytest.mark.parametrize("raw", RAW, ids=["zero", "heavy", "light"])
@pytest.mark.parametrize("name", FAMILIES)
def test_families_agree_with_scipy_and_with_themselves(name: str, raw: np.ndarray) -> None:
    family = FAMILIES[name]
    shape = jnp.asarray(raw[: family.shapes])
    survival = np.asarray(family.survival(jnp.asarray(X), shape), float)
    density = np.asarray(family.density(jnp.asarray(X), shape), float)
    expected = reference(name, raw)
    if expected is not None:
        fold = 2.0 if name == "generalised_normal" else 1.0
        np.testing.assert_allclose(survival, fold * expected.sf(X), rtol=2e-3, atol=1e-6)
        np.testing.assert_allclose(density, fold * expected.pdf(X), rtol=2e-3, atol=1e-6)
        assert float(family.entropy(shape)) == pytest.approx(expected.entropy() - np.log(fold), abs=2e-3)
    elif name == "pareto":
        share, s, k = (float(x) for x in (jax.nn.sigmoid(shape[0]), positive(shape[1]), 0.5 * jnp.tanh(shape[2])))
        tail = X > 1
        np.testing.assert_allclose(
            survival[tail], share * scipy.stats.genpareto(k, loc=1, scale=s).sf(X[tail]), rtol=2e-3, atol=1e-6
        )
    # The density is minus the survival's slope, and the entropy its integral.
    exact = functools.partial(family.density, shape=shape)
    grid = np.geomspace(1e-7, 1e4, 40_001)
    f = np.asarray(exact(jnp.asarray(grid, jnp.float32)), float)
    mass = scipy.integrate.cumulative_trapezoid(f * grid, np.log(grid), initial=0)
    inner = grid < 100
    np.testing.assert_allclose(
        mass[inner] - mass[inner][0],
        (
            family.survival(jnp.float32(1e-7), shape)
            - np.asarray(family.survival(jnp.asarray(grid, jnp.float32), shape))
        )[inner],
        atol=4e-3,
    )
    entropy = scipy.integrate.trapezoid(-f * np.log(np.maximum(f, 1e-300)) * grid, np.log(grid))
    assert float(family.entropy(shape)) == pytest.approx(entropy, abs=0.03)


@functools.cache
def inverted(name: str):
    """A quantile, the survival there, and the survival's gradient with respect to the shape."""
    family = FAMILIES[name]

    def summed(shape: jax.Array) -> jax.Array:
        return jnp.sum(family.survival(jnp.asarray([1e-6, 1e-3, 0.5, 1.0, 2.0, 30.0, 1e6]), shape))

    def look(share: jax.Array, shape: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        x = family.quantile(share, shape)
        return x, family.survival(x, shape), jax.grad(summed)(shape)

    return jax.jit(look)


@pytest.mark.parametrize("name", FAMILIES)
@given(
    raw=st.lists(st.floats(-20, 20), min_size=5, max_size=5),
    share=st.floats(1e-6, 0.9999),
)
def test_quantiles_invert_survival_and_nothing_is_infinite(name: str, raw: list[float], share: float) -> None:
    family = FAMILIES[name]
    shape = jnp.asarray(raw[: family.shapes], jnp.float32)
    x, again, slope = inverted(name)(jnp.float32(share), shape)
    assert np.isfinite(x)
    assert x >= 0
    assert np.isfinite(slope).all()
    # At a family's bounds (a tail that ends, a quantile out of the range looked at) only finiteness is promised.
    if 1e-9 < float(x) < 1e7 and 1e-5 < share < 0.99 and np.max(np.abs(raw)) < 4:
        assert float(again) == pytest.approx(share, rel=0.02, abs=2e-5)


@pytest.mark.parametrize(("name", "kind"), [("generalised_normal", "gennorm"), ("gamma", "gamma")])
@pytest.mark.parametrize("shape", [0.6, 1.0, 2.5])
def test_closed_form_fits_find_the_shape(name: str, kind: str, shape: float) -> None:
    x = np.abs(getattr(scipy.stats, kind)(shape).rvs(200_000, random_state=0))
    moments = Moments(
        *(
            jnp.float32(m)
            for m in (
                0.5 * np.log(np.mean(x**2)) - np.log(np.mean(x)),
                np.log(np.mean(x)) - np.mean(np.log(x)),
                0.01,
                1.0,
                0.2,
            )
        )
    )
    assert float(positive(FAMILIES[name].fit(moments)[0])) == pytest.approx(shape, rel=0.08)


def test_the_anchored_fit_finds_body_and_tail() -> None:
    """Below the anchor, at 1, a log-logistic body; above it an exponential tail."""
    share, excess, power = 0.03, 0.2, 1.5
    upper = np.linspace(0, 1, 20_001)[1:-1]
    tail, body = 1 - excess * np.log(upper), (upper / (2 - upper)) ** (1 / power)
    mean, mean_log = (share * f(tail).mean() + (1 - share) * f(body).mean() for f in (np.asarray, np.log))
    moments = Moments(*map(jnp.float32, (0.3, np.log(mean) - mean_log, share, -np.log(mean), excess)))
    fitted = FAMILIES["pareto"].fit(moments)
    assert float(jax.nn.sigmoid(fitted[0])) == pytest.approx(share, rel=1e-3)
    np.testing.assert_allclose(positive(fitted[jnp.array([1, 3])]), [excess, power], rtol=0.05)


def test_thresholds_follow_what_was_sent() -> None:
    """The first of three segments sends too many, the last too few, and all thresholds are a tenth too low."""
    asked = jnp.full(3, 100.0)
    advance = functools.partial(
        summaries.advance, threshold=jnp.ones(3), share=asked / 1000, asked=asked, slope=jnp.float32(0.2)
    )
    few, none = jnp.float32([150, 100, 50]), jnp.zeros(3, bool)
    known, tenth = summaries.start(jnp.full(3, 1000.0)), jnp.float32(0.1)
    for _ in range(30):
        known = advance(known, realised=few, took=none, log_trim=tenth, surplus=4 * tenth, lowered=tenth)
    first, even, last = known.log_anchor
    assert first > even > last
    assert float(even) == pytest.approx(0.1 + float(known.drift))
    assert known.drift > 0.05  # what has risen for long is expected to rise on
    assert float(summaries.slope_of(known, tenth)) == pytest.approx(2 / 4, abs=0.06)
    # One that takes all the room tells of itself alone
    took = jnp.array([True, False, False])
    after = advance(known, realised=3 * few * took, took=took, log_trim=jnp.float32(1.0), surplus=tenth, lowered=tenth)
    assert after.log_anchor[0] > 1
    np.testing.assert_allclose(after.log_anchor[1:], after.drift, rtol=1e-5)
    np.testing.assert_array_equal(after.regression, known.regression)


def test_raw_shapes_round_trip() -> None:
    values = jnp.geomspace(1e-3, 1e3, 20)
    np.testing.assert_allclose(positive(raw_of(values)), values, rtol=1e-3)


@given(st.integers(0, 2**31 - 1), st.floats(-15, 15))
def test_histograms_count_what_numpy_counts(seed: int, scale: float) -> None:
    rng = np.random.default_rng(seed)
    values = (np.abs(rng.standard_t(3, 500)) * 10.0**scale).astype(np.float32)
    segment, valid = rng.integers(0, 3, 500), rng.random(500) < 0.9
    top = summaries.top_bin(jnp.asarray(values), jnp.asarray(segment), jnp.asarray(valid), 3)
    counts = np.asarray(summaries.histogram(jnp.asarray(values), jnp.asarray(segment), jnp.asarray(valid), top, 3))
    bounds = np.asarray(summaries.edges(top))
    for s in range(3):
        chosen = values[(segment == s) & valid]
        place = np.clip(np.searchsorted(bounds[s], chosen, side="right") - 1, 0, summaries.BINS - 1)
        assert np.array_equal(counts[s], np.bincount(place, minlength=summaries.BINS))
        assert chosen.max() < bounds[s][-1]


def test_the_largest_magnitudes_that_there_are_leave_no_infinity_behind() -> None:
    values, segment, valid = jnp.float32([2e38, 3.4e38, 1.0]), jnp.arange(3) // 2, jnp.ones(3, bool)
    top = summaries.top_bin(values, segment, valid, 2)
    mass = summaries.histogram(values, segment, valid, top, 2)
    known = summaries.introduce(summaries.start(jnp.float32([2, 1])), mass, top)
    assert mass.sum(1).tolist() == [2.0, 1.0]
    assert all(bool(jnp.isfinite(x).all()) for x in (*summaries.moments(known), known.log_anchor))


@pytest.mark.parametrize("name", FAMILIES)
def test_a_cold_start_is_sound(name: str) -> None:
    """Nothing seen, sizes from one to a billion, zeros: thresholds are finite and positive, masses sum to one."""
    size = jnp.float32([1, 10, 1e9])

    @jax.jit
    def look(weights, known):
        forecast = predictor.forecast(weights, known, name)
        return forecast.masses(known.top), partition(forecast.survival, forecast.quantile, 0.01 * size, size)

    for mass in (jnp.zeros((3, summaries.BINS)), jnp.zeros((3, summaries.BINS)).at[:, 0].set(5.0)):
        known = summaries.observe(summaries.start(size), mass, jnp.zeros(3, jnp.int32))
        masses, regions = look(predictor.load(name), known)
        np.testing.assert_allclose(np.sum(masses, axis=1), 1.0, atol=1e-3)
        for threshold in (regions.sparse, regions.key, regions.level):
            assert (np.isfinite(threshold) & (threshold > 0)).all()


def test_what_is_zero_at_first_is_forecast_as_soon_as_it_is_not() -> None:
    """One leaf's gradient is zero for one step, the other's for three: steps that are powers of two look anew."""
    noise = np.random.default_rng(0).laplace(size=(8, 2, 20_000)).astype(np.float32)
    tx = gp.partition_compress(bits_per_element=0.5, learn_every=1000)
    update = jax.jit(tx.update)
    state = tx.init({"a": noise[0, 0], "b": noise[0, 1]})
    stats = []
    for step, (a, b) in enumerate(noise):
        _, state = update({"a": a * (step >= 1), "b": b * (step >= 3)}, state)
        stats.append(gp.stats(state))
    threshold = np.stack([s.threshold[:, 0] for s in stats])
    assert (threshold[1:, 0] > 1).all()
    assert (threshold[:4, 1] < 1e-30).all()
    assert (threshold[4:, 1] > 1).all()
    # Were a leaf's thresholds those of zeros, all of its 20,000 entries would be candidates.
    overflow = np.asarray([float(s.overflow) for s in stats])
    assert (overflow[[1, 2, 4, 5, 6, 7]] < 10_000).all()
    bits = np.asarray([float(s.payload_bits) for s in stats])
    assert (bits[[0, 1, 2, 4]] == bits[0]).all()
    assert (bits[[3, 5, 6, 7]] == bits[0] - 32 * 2 * (1 + summaries.BINS)).all()
    # And so it is shown
    seen = gp.inspect(state)
    np.testing.assert_allclose([np.sum(masses, axis=1) for masses in (seen.forecast, seen.observed)], 1.0, atol=1e-3)
    assert (np.abs(seen.forecast - seen.observed).sum(axis=1) < 0.5).all()
    np.testing.assert_array_equal(seen.threshold, stats[-1].threshold)


def test_learning_lowers_the_cross_entropy() -> None:
    """A network from scratch, shown the same histogram of a distribution it fits badly."""
    values = jnp.asarray(np.abs(np.random.default_rng(0).lognormal(0, 1.5, 20_000)), jnp.float32)
    segment, valid = jnp.zeros(20_000, jnp.int32), jnp.ones(20_000, bool)
    top = summaries.top_bin(values, segment, valid, 1)
    mass = summaries.histogram(values, segment, valid, top, 1)
    weights = predictor.initialise(0, "pareto")
    state = predictor.start_learning(weights)
    known = summaries.observe(summaries.start(jnp.float32([20_000])), mass, top)
    learn = jax.jit(functools.partial(predictor.learn, name="pareto"))
    before = float(predictor.loss(weights, known, mass, top, "pareto"))
    for _ in range(60):
        weights, state = learn(weights, state, known, mass, top)
    assert float(predictor.loss(weights, known, mass, top, "pareto")) < before - 0.01


def test_forecasts_do_not_depend_on_neighbours() -> None:
    size = jnp.float32([100, 2000])
    mass = jax.random.uniform(jax.random.key(0), (2, summaries.BINS))
    top = jnp.int32([500, 520])
    known = summaries.observe(summaries.start(size), mass, top)
    alone = summaries.observe(summaries.start(size[1:]), mass[1:], top[1:])
    both, one = (predictor.forecast(predictor.load("pareto"), k, "pareto").masses(k.top) for k in (known, alone))
    np.testing.assert_allclose(both[1:], one, rtol=1e-5, atol=1e-7)


@given(st.lists(st.floats(0.01, 10), min_size=2, max_size=6), st.floats(0.001, 1.0), st.integers(0, 1000))
def test_the_budget_is_shared_out_whole(weights: list[float], share: float, seed: int) -> None:
    size = np.random.default_rng(seed).integers(1, 1000, len(weights)).astype(np.float32)
    total = share * size.sum()
    asked = np.asarray(allot(jnp.asarray(weights, jnp.float32), jnp.asarray(size), total))
    assert (asked <= size * (1 + 1e-6)).all()
    assert asked.sum() == pytest.approx(total, rel=1e-3)
    free = asked < size * 0.999
    per_weight = (asked / (size * np.asarray(weights)))[free]
    assert per_weight.size == 0 or per_weight.max() <= per_weight.min() * 1.001


def test_entropy_rules() -> None:
    """A uniform histogram has log2 B bits, a peaked one none, and the rules by entropy prefer the first."""
    spread, peak = jnp.ones(16), jnp.zeros(16).at[3].set(2.0)
    entropy = entropy_bits(jnp.stack([spread, peak]))
    np.testing.assert_allclose(entropy, [4.0, 0.0], atol=1e-5)
    scale = jnp.array([1.0, 3.0])
    prospect = Prospect(
        entropy,
        survival=lambda x: jnp.exp(-x / scale[:, None]),
        quantile=lambda share: -scale * jnp.log(share),
        size=jnp.array([1000.0, 500.0]),
        total=100.0,
    )
    weights = {name: np.asarray(rule(prospect)) for name, rule in ENTROPY_RULES.items()}
    assert weights["fixed"][0] == weights["fixed"][1]
    assert all(weights[name][0] > weights[name][1] for name in ("entropy", "perplexity"))
    # One threshold for both, at which as many lie above as are to be sent
    thresholds = -np.asarray(scale) * np.log(weights["energy"])
    assert thresholds[0] == pytest.approx(thresholds[1], rel=1e-3)
    assert float(np.sum(weights["energy"] * np.asarray(prospect.size))) == pytest.approx(100.0, rel=1e-2)


def test_kapur_agrees_with_brute_force() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        mass = rng.gamma(0.5, size=24)

        def side(p: np.ndarray) -> float:
            p = p / p.sum()
            return float(-np.sum(p * np.log(np.maximum(p, 1e-30))))

        scores = [side(mass[:j]) + side(mass[j:]) for j in range(1, 24)]
        found = int(kapur_split(jnp.asarray(mass, jnp.float32)))
        assert scores[found - 1] == pytest.approx(max(scores), abs=1e-4)


def test_replicated_arithmetic_rounds_alike_alone_and_batched() -> None:
    def control(x: jax.Array, y: jax.Array) -> jax.Array:
        z = jnp.exp(jnp.tanh(x * y + 0.3)) / (jnp.sum(x) + y[0])
        return jax.lax.fori_loop(0, 5, lambda _, z: z * 0.9 + jnp.sin(z) * y, z)

    x = jax.random.normal(jax.random.key(0), (8, 33))
    alone = jnp.stack([jax.jit(replicated(control))(a, b) for a, b in zip(x, x[::-1], strict=True)])
    batched = jax.jit(jax.vmap(replicated(control)))(x, x[::-1])
    pmapped = jax.pmap(replicated(control))(x[:4], x[::-1][:4])
    np.testing.assert_array_equal(alone, batched)
    np.testing.assert_array_equal(alone[:4], pmapped)
    np.testing.assert_allclose(alone, jax.vmap(control)(x, x[::-1]), rtol=1e-4, atol=1e-5)
