"""Words, buffers, codecs and payloads, against brute force, on any input whatever."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradpart_jax import bits, buffers
from gradpart_jax.codecs import Bitmap, EliasFano, Magnitudes, index_codec
from gradpart_jax.outlook import Outlook
from gradpart_jax.payload import LARGEST_BASE, Contents, Header, PayloadFormat
from gradpart_jax.prefix_sums import prefix_sum
from gradpart_jax.regions import Regions
from gradpart_jax.segments import layout_of, segment_of
from gradpart_jax.selection import choose
from gradpart_jax.sizes import DENSEST, best_format, expected_loss, plan_of

WORDS = 12
seeds = st.integers(0, 2**31 - 1)
shares = st.floats(0, 1)
bitmask = jax.jit(bits.bitmask)
jitted = functools.cache(lambda function, *static: jax.jit(function, static_argnums=static))


def flags_of(words) -> np.ndarray:
    """Unpack words, the lowest bit first."""
    return np.unpackbits(np.asarray(words).view(np.uint8), axis=-1, bitorder="little").astype(bool)


def mask(seed: int, share: float) -> np.ndarray:
    return np.random.default_rng(seed).random(32 * WORDS) < share


@given(seeds, shares)
def test_bitmask_rank_and_select_agree_with_brute_force(seed: int, share: float) -> None:
    flags = mask(seed, share)
    words = bitmask(flags)
    assert np.array_equal(flags_of(words), flags)
    assert np.array_equal(bits.popcount(words), flags.reshape(-1, 32).sum(1))
    assert np.array_equal(bits.prefix(words), np.cumsum([0, *flags.reshape(-1, 32).sum(1)])[:-1])
    positions, count = jitted(bits.select, 1)(words, 40)
    expected = np.full(40, flags.size)
    places = np.flatnonzero(flags)[:40]
    expected[: places.size] = places
    assert np.array_equal(positions, expected)
    assert int(count) == flags.sum()


@given(seeds, shares, st.sampled_from([0, 1, 50, 200]), st.integers(0, 1000))
def test_keep_clears_a_cyclic_run_and_no_more_than_the_surplus(
    seed: int, share: float, capacity: int, turn: int
) -> None:
    flags = mask(seed, share)
    kept = np.asarray(flags_of(jitted(bits.keep, 1)(bitmask(flags), capacity, jnp.int32(turn))))
    assert not (kept & ~flags).any()
    assert kept.sum() == min(flags.sum(), capacity)
    lost = (flags & ~kept)[flags]
    assert np.abs(np.diff(np.append(lost, lost[:1]).astype(int))).sum() <= 2


def test_overflow_starves_no_position() -> None:
    """All bits set, a tenth fits: no position waits long, in turns by `keep`, by chance after `thin`."""
    words = jnp.full(100, 0xFFFFFFFF, jnp.uint32)
    both = lambda w, c, t: bits.keep(bits.thin(w, c, t), c, t)  # noqa: E731
    for method, longest in ((bits.keep, 30), (both, 150)):
        kept = flags_of(jax.vmap(lambda t, m=method: m(words, 320, t))(jnp.arange(300)))
        gaps = [np.diff([-1, *np.flatnonzero(place), 300]).max() for place in np.asarray(kept).T]
        assert max(gaps) <= longest
    with jax.disable_jit():
        assert (both(words, 320, jnp.int32(1)) == jax.jit(both, static_argnums=1)(words, 320, jnp.int32(1))).all()


@given(seeds, st.sampled_from([1, 3, 7, 8, 13, 32]), st.sampled_from([1, 32, 77]))
def test_pack_and_unpack_are_inverse(seed: int, width: int, count: int) -> None:
    codes = np.random.default_rng(seed).integers(0, 2**width, count, dtype=np.uint32)
    packed = jitted(bits.pack, 1)(codes, width)
    assert packed.size == -(-count * width // 32)
    assert np.array_equal(jitted(bits.unpack, 1, 2)(packed, count, width), codes)


@given(seeds, st.integers(1, 9), st.integers(1, 32), st.sampled_from([1, 32, 77]))
def test_words_of_codes_packed_apart_add_up(seed: int, terms: int, width: int, count: int) -> None:
    codes = np.random.default_rng(seed).integers(0, max(2**width // terms, 1), (terms, count), dtype=np.uint32)
    packed = [jitted(bits.pack_apart, 1)(one, width) for one in codes]
    assert {x.size for x in packed} == {bits.words_apart(count, width)}
    assert np.array_equal(jitted(bits.unpack_apart, 1, 2)(sum(packed), count, width), codes.sum(0))


@given(seeds, shares, st.sampled_from([0, 1, 3, 30, 80]))
def test_largest_keeps_the_largest(seed: int, share: float, capacity: int) -> None:
    random = np.random.default_rng(seed)
    scores = random.integers(10, 30, 64).astype(np.float32)  # with ties
    filled = random.random(64) < share
    count, turn = filled.sum(), jnp.int32(seed % 7)
    flagged, cut = jitted(buffers.largest)(scores, filled, jnp.int32(capacity), turn)
    fixed, same = jitted(buffers.largest, 2)(scores, filled, capacity, turn)
    np.testing.assert_array_equal((*flagged, cut), (*fixed, same))  # whether the capacity is known beforehand or not
    flagged = np.asarray(flagged)
    assert flagged.sum() == min(count, capacity)
    assert not (flagged & ~filled).any()
    np.testing.assert_array_equal(np.sort(scores[flagged]), np.sort(scores[filled])[max(count - capacity, 0) :])
    assert float(cut) == scores[flagged].min(initial=np.inf)


CODECS = [EliasFano(1000, 30), EliasFano(5, 5), EliasFano(100_000, 64), Bitmap(96, 40), index_codec(0, 0)]


def test_no_two_of_many_equal_ones_draw_the_same_lot() -> None:
    flagged, _ = jitted(buffers.largest, 2)(jnp.ones(400_000), jnp.ones(400_000, bool), 3780, jnp.int32(0))
    assert flagged.sum() == 3780
    assert np.unique(bits.scramble(400_000, jnp.int32(-5), buffers.LOT_BITS)).size == 400_000


@pytest.mark.parametrize("codec", CODECS, ids=str)
@given(seed=seeds, share=shares)
def test_positions_come_back(codec, seed: int, share: float) -> None:
    count = min(round(share * codec.capacity), codec.size)
    places = np.sort(np.random.default_rng(seed).choice(codec.size, count, replace=False)) if count else np.zeros(0)
    indices = np.full(codec.capacity, codec.size, np.int32)
    indices[:count] = places
    words = jitted(type(codec).encode, 0)(codec, indices, jnp.int32(count))
    assert words.size == codec.words
    assert np.array_equal(jitted(type(codec).decode, 0)(codec, words, jnp.int32(count)), indices)


@pytest.mark.parametrize("size", [10**4, 10**6, 10**8])
@pytest.mark.parametrize("density", [0.03, 0.01, 0.001])
def test_indices_are_near_the_entropy_bound(size: int, density: float) -> None:
    count = round(size * density)
    bound = (math.lgamma(size + 1) - math.lgamma(count + 1) - math.lgamma(size - count + 1)) / math.log(2)
    assert bound <= index_codec(size, count).bits <= 1.1 * bound + 64


@given(seeds, st.sampled_from([1, 2, 4, 8]))
def test_decoded_magnitudes_leave_an_exact_rest(seed: int, width: int) -> None:
    rng = np.random.default_rng(seed)
    codec = Magnitudes(width, 2**0.5)
    base = np.float32(10.0) ** rng.uniform(-15, 10, 50).astype(np.float32)
    reach = (2**0.5) ** codec.levels
    values = (base * rng.uniform(1.0, reach, 50) * rng.choice([-1, 1], 50)).astype(np.float32)
    decoded = np.asarray(codec.decode(codec.encode(jnp.asarray(values), jnp.asarray(base)), jnp.asarray(base)))
    assert (np.sign(decoded) == np.sign(values)).all()
    if width > 1:
        ratio = decoded / values
        assert ((ratio >= 0.5) & (ratio <= 2)).all()
        assert ((values.astype(np.float64) - decoded) == (values - decoded)).all()


def read(shape: PayloadFormat, words: jax.Array, bases: tuple[jax.Array, jax.Array]) -> Contents:
    return shape.decode(words, shape.positions(words), bases)


@given(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=8), st.booleans())
def test_a_payload_of_any_words_decodes_to_something_harmless(noise: list[int], dense: bool) -> None:
    shape = PayloadFormat(200, 20, 60) if dense else PayloadFormat(20_000, 20, 60)
    words = jnp.asarray(np.resize(np.asarray(noise, np.uint32), shape.words))
    bases = jnp.full(20, 1e3), jnp.full(60, LARGEST_BASE)
    contents = jitted(read, 0)(shape, words, bases)
    for buffer in (contents.key, contents.sparse):
        indices = np.asarray(buffer.indices)
        assert ((indices >= 0) & (indices <= shape.size)).all()
        assert np.isfinite(buffer.values).all()
    factors = np.asarray([contents.header.trim, contents.header.key_scale, contents.header.level_scale])
    assert (np.isfinite(factors) & (factors > 0)).all()
    assert int(contents.header.candidates) >= 0


@given(seeds, st.integers(0, 20), st.integers(0, 60))
def test_a_payload_comes_back(seed: int, keys: int, sparses: int) -> None:
    shape, rng = PayloadFormat(5000, 20, 60), np.random.default_rng(seed)

    def buffer(count: int, capacity: int) -> buffers.Buffer:
        indices, values = np.full(capacity, 5000, np.int32), np.zeros(capacity, np.float32)
        indices[:count] = np.sort(rng.choice(5000, count, replace=False))
        values[:count] = rng.normal(size=count)
        return buffers.Buffer(jnp.asarray(indices), jnp.asarray(values), jnp.int32(count))

    header = Header(jnp.bool_(seed % 2 == 0), jnp.int32(seed), jnp.float32(1.25), jnp.float32(0.5), jnp.float32(3.0))
    bases = jnp.full(20, 0.3), jnp.full(60, 0.1)
    words, seen = jitted(PayloadFormat.encode, 0)(shape, Contents(header, buffer(keys, 20), buffer(sparses, 60)), bases)
    assert words.size * 32 == shape.bits
    jax.tree.map(np.testing.assert_array_equal, jitted(read, 0)(shape, words, bases), seen)


@given(st.integers(2000, 10**6), st.floats(0.02, 31.0))
def test_more_bits_lose_less_and_no_budget_is_exceeded(size: int, bits: float) -> None:
    shape, wider = best_format(size, bits * size), best_format(size, 1.1 * bits * size)
    assert shape.bits <= bits * size or shape.entries == 1
    assert shape.entries <= math.ceil(DENSEST * size)
    assert expected_loss(wider) <= expected_loss(shape)
    assert best_format(size, bits * size, 3).key_bits == 3


@pytest.mark.parametrize("bits", [0.1, 0.5, 2.0, 2.7, 3.5])
def test_the_expected_loss_is_that_of_exponential_magnitudes(bits: float) -> None:
    size = 50_000
    shape = best_format(size, bits * size)
    x = np.sort(np.random.default_rng(0).exponential(size=size))[::-1].astype(np.float32)
    key, sparse, rest = np.split(x, [shape.key_capacity, shape.entries])
    codec, base = Magnitudes(shape.key_bits, shape.level_ratio), jnp.full(key.size, key[-1])
    error = np.asarray(codec.decode(codec.encode(jnp.asarray(key), base), base)) - key
    lost = np.sum(error**2) + np.sum((sparse - sparse.mean()) ** 2 if sparse.size else 0.0) + np.sum(rest**2)
    assert lost / np.sum(x**2) == pytest.approx(expected_loss(shape), rel=0.1)


@pytest.mark.parametrize("values", ["equal", "spread"])
def test_no_position_starves_under_thresholds_far_too_low(values) -> None:
    """Three hundred steps. Where all values stay alike, none is larger for having waited, and each has its turn."""
    size = 4096
    layout = layout_of(jnp.zeros(size))
    plan = plan_of(layout, 1.0)
    one = jnp.ones(1)
    regions = Regions(asked=one * plan.entries, sparse=one * 1e-6, key=one * 2e-6, level=one)
    outlook = Outlook(None, regions, one * 1e-6, jnp.float32(0.9), one, jnp.float32(0.2))
    vector = jnp.ones(size)
    if values == "spread":  # what waits grows by its own size, as in a memory
        vector = jax.random.uniform(jax.random.key(0), (size,), minval=0.5, maxval=1.5)

    def step(waited, turn):
        given = vector if values == "equal" else vector * (1.0 + waited)
        chosen, finite = choose(given, outlook, turn, plan.ladder[-1], layout)
        waited = waited + 1.0
        for buffer in (chosen.key, chosen.sparse):
            waited = waited.at[buffer.indices].set(0.0, mode="drop")
        return waited, (jnp.max(waited), chosen.key.used + chosen.sparse.used, finite)

    _, (longest, sent, finite) = jax.jit(lambda: jax.lax.scan(step, jnp.zeros(size), jnp.arange(300)))()
    assert bool(jnp.all(finite))
    assert float(jnp.mean(sent)) > 0.5 * plan.entries
    rounds = size / plan.entries
    assert float(jnp.max(longest)) < 12 * rounds, (float(jnp.max(longest)), rounds)


KINDS = ["normal", "subnormal", "zeros", "few", "ties", "negative zero", "huge"]


@pytest.mark.parametrize(("size", "entries"), [(1, 1), (31, 4), (33, 33), (1000, 37), (5000, 400), (300_000, 1000)])
@given(seed=seeds, kind=st.sampled_from(KINDS), broken=st.sampled_from([None, None, np.nan, np.inf, -np.inf]))
def test_selection_takes_the_largest_of_anything(size, entries, seed, kind, broken) -> None:
    rng = np.random.default_rng(seed)
    vector = rng.laplace(size=size).astype(np.float32)
    vector = {
        "normal": vector,
        "subnormal": vector * np.float32(1e-39),
        "zeros": 0 * vector,
        "few": np.where(rng.random(size) < 0.01, vector, 0),
        "ties": np.sign(vector),
        "negative zero": np.where(rng.random(size) < 0.5, np.float32(-0.0), vector),
        "huge": vector * np.float32(1e37),
    }[kind].astype(np.float32)
    if broken is not None:
        vector[rng.integers(size)] = broken
    layout = layout_of(jax.ShapeDtypeStruct((size,), jnp.float32))
    padded = np.pad(vector, (0, layout.total - size))
    shape = PayloadFormat(layout.total, max(1, entries // 4), entries - max(1, entries // 4))
    one = jnp.ones(1)
    # Thresholds that may be far off; a forecast gives none above 1e30
    scale = np.float32(10.0 ** rng.uniform(-3, 3) * {"huge": 1e27, "subnormal": 1e-34}.get(kind, 1.0)) * one
    view = Outlook(None, Regions(one, scale, 2 * scale, scale), 0.9 * scale, jnp.float32(0.9), one, jnp.float32(0.2))
    chosen, finite = jitted(choose, 3, 4)(padded, view, jnp.int32(seed % 1000), shape, layout)
    assert bool(finite) == (broken is None)
    if broken is not None:
        return
    keys, sparses = (np.asarray(b.indices)[: int(b.used)] for b in (chosen.key, chosen.sparse))
    assert np.abs(vector[keys]).min(initial=np.inf) >= np.abs(vector[sparses]).max(initial=0.0)
    places = np.concatenate([keys, sparses])
    for buffer in (chosen.key, chosen.sparse):
        used = int(buffer.used)
        assert (np.diff(np.asarray(buffer.indices)[:used]) > 0).all()
        np.testing.assert_array_equal(np.asarray(buffer.values)[:used], vector[np.asarray(buffer.indices)[:used]])
    assert len(set(places.tolist())) == places.size <= entries
    # The compiler takes subnormal numbers for zeros, so that those may be left out.
    visible = np.abs(np.where(np.abs(vector) < np.finfo(np.float32).tiny, 0, vector))
    expected = np.sort(visible[visible > 0])[::-1][:entries]
    found = np.sort(visible[places])[::-1]
    if kind == "ties":  # no threshold parts them: of more candidates than there is room for, words are drawn by lot
        assert (found > 0).sum() >= expected.size // 2
    elif visible.max(initial=0) > 0 or kind == "zeros":
        np.testing.assert_array_equal(found[found > 0], expected)


def test_what_int32_cannot_address_is_refused() -> None:
    huge = jax.ShapeDtypeStruct((2**16, 2**15), jnp.float32)
    with pytest.raises(ValueError, match="more than the 2147483616 that int32 indices address"):
        layout_of(huge)
    with pytest.raises(ValueError, match="size=2147483648 is out of range"):
        index_codec(2**31, 5)
    assert layout_of(jax.ShapeDtypeStruct((2**31 - 32,), jnp.float32)).total == 2**31 - 32


@pytest.mark.parametrize("segments", [2, 5, 80])
def test_a_position_falls_to_the_last_segment_that_begins_before_it(segments: int) -> None:
    """Of few segments and of many, which are found in two ways, and where some are empty."""
    rng = np.random.default_rng(segments)
    sizes = rng.integers(1, 200, segments) * rng.integers(0, 4, segments).clip(max=1)
    sizes[rng.integers(segments)] = 7
    layout = layout_of([jnp.zeros(size) for size in sizes])
    positions = np.sort(rng.integers(0, layout.total + 1, 300)).astype(np.int32)
    filled = np.flatnonzero(sizes)
    expected = filled[np.searchsorted(np.asarray(layout.starts)[filled], positions, side="right") - 1]
    np.testing.assert_array_equal(segment_of(jnp.asarray(positions), layout), expected)


@pytest.mark.parametrize("size", [0, 1, 32, 33, 1_024, 1_025, 300_000])
def test_prefix_sums_are_those_of_numpy(size: int) -> None:
    values = np.random.default_rng(size).integers(-1000, 1000, size, np.int32)
    np.testing.assert_array_equal(jax.jit(prefix_sum)(values), np.cumsum(values))
