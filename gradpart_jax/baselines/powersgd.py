"""PowerSGD: each matrix as a product of two thin ones, by one step of power iteration (Vogels et al., NeurIPS 2019)."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from gradpart_jax.accounting import WORD_BITS, Wire, add, nothing, reduced
from gradpart_jax.checks import check_integer, check_number
from gradpart_jax.exchange import AxisName, axis_size, mean
from gradpart_jax.feedback import Sent
from gradpart_jax.matrices import matrix, matrix_shape
from gradpart_jax.replicated import replicated, seeded
from gradpart_jax.scheme import Reduced, Scheme, SchemeState, Settle, dense_report, early
from gradpart_jax.segments import Layout, loosen, tighten


class PowerState(NamedTuple):
    """What is kept from step to step, the same on every device."""

    step: jax.Array  # int32[]
    right: tuple[jax.Array, ...]  # float32[matrices, columns, rank], one for each shape


class Group(NamedTuple):
    """Segments that are matrices of the same shape."""

    segments: tuple[int, ...]
    rows: int
    columns: int
    rank: int


def powersgd(
    rank: int = 2,
    *,
    start_step: int = 0,
    min_compression: float = 2.0,
    warm_start: bool = True,
    seed: int = 0,
) -> Scheme:
    """Average matrices of low rank in place of the gradients' matrices.

    For a matrix M of gradient and memory, and Q of the step before, orthonormalised: P = mean of M Q over devices, is
    orthonormalised; Q = mean of M' P; every device takes P Q', and remembers M - P Q'. Both means are all-reduces.
    Leaves of one axis, and matrices that it would compress too little, are averaged as they are. Rows and columns are
    those of `matrices.matrix_shape`. A column of Q that comes out as 0 stays what it was.

    It needs the memory, which `compress` keeps by default.

    Args:
      rank: columns of P and Q, at least 1; at most a matrix's rows or columns are used of it.
      start_step: first steps that are exchanged dense, in which the memory stays empty.
      min_compression: a matrix is compressed only where it has more than this many times the elements of P and Q.
      warm_start: whether Q is kept from step to step; else it is drawn anew in each.
      seed: of Q.

    Returns:
      A Scheme that sends rank (rows + columns) numbers for a matrix.

    Raises:
      TypeError: an argument is of a wrong type.
      ValueError: an argument is out of range.

    >>> import jax.numpy as jnp, gradpart_jax as gp
    >>> tx = gp.compress(gp.baselines.powersgd(rank=1))
    >>> gradient = jnp.outer(jnp.arange(8.0), jnp.ones(8))
    >>> out, state = tx.update(gradient, tx.init(gradient))
    >>> bool(jnp.allclose(out, gradient, atol=1e-5)), float(gp.stats(state).payload_ratio)
    (True, 4.0)
    """
    check_integer("rank", rank, 1, 2**15)
    check_integer("start_step", start_step, 0, 2**31 - 1)
    check_number("min_compression", min_compression, above=0.0, static=True)
    check_integer("seed", seed, 0, 2**32 - 1)

    def draw(groups: list[Group], step: jax.Array) -> tuple[jax.Array, ...]:
        key = jax.random.fold_in(seeded(seed), step)
        shapes = [(len(group.segments), group.columns, group.rank) for group in groups]
        return tuple(jax.random.normal(jax.random.fold_in(key, i), shape) for i, shape in enumerate(shapes))

    def init(layout: Layout) -> SchemeState:
        step = jnp.int32(0)
        return SchemeState(PowerState(step, draw(groups_of(layout, rank, min_compression), step)), ())

    def reduce(
        vector: jax.Array, state: SchemeState, layout: Layout, axis_name: AxisName, settle: Settle
    ) -> tuple[Reduced, SchemeState]:
        groups = groups_of(layout, rank, min_compression)
        shared: PowerState = state.shared
        before = shared.right if warm_start else draw(groups, shared.step)

        def low_rank(vector: jax.Array) -> tuple[Reduced, tuple[jax.Array, ...]]:
            return _low_rank_step(vector, before, groups, layout, axis_name, settle)

        def dense(vector: jax.Array) -> tuple[Reduced, tuple[jax.Array, ...]]:
            average = loosen(mean(tighten(vector, layout), axis_name), layout)
            finite = jnp.all(jnp.isfinite(average))
            memory = settle(Sent(jnp.bool_(True), ()), finite)
            wire = reduced(WORD_BITS * layout.elements, axis_size(axis_name))
            report = dense_report(layout)
            return Reduced(jnp.where(finite, average, 0.0), memory, finite, wire, report), before

        if start_step:
            outcome, right = jax.lax.cond(early(shared.step, start_step), dense, low_rank, vector)
        else:
            outcome, right = low_rank(vector)
        return outcome, SchemeState(PowerState(shared.step + 1, right), ())

    return Scheme("PowerSGD", init, reduce, lambda layout: layout.elements)


def groups_of(layout: Layout, rank: int, min_compression: float) -> list[Group]:
    """Find the matrices that are worth it, by shape: those of one shape are multiplied together.

    Args:
      layout: the segments.
      rank: as in `powersgd`.
      min_compression: as in `powersgd`.

    Returns:
      Groups, in the order in which their shapes appear.
    """
    found: dict[tuple[int, int], list[int]] = {}
    for segment, shape in enumerate(layout.shapes):
        rows, columns = matrix_shape(shape)
        if columns > 1 and (rows + columns) * min(rank, rows, columns) * min_compression < rows * columns:
            found.setdefault((rows, columns), []).append(segment)
    return [Group(tuple(owners), *shape, min(rank, *shape)) for shape, owners in found.items()]


def orthonormalise(columns: jax.Array) -> jax.Array:
    """Make columns orthonormal, from the first on (classical Gram-Schmidt, each column cleared twice).

    Args:
      columns: float32[..., n, r].

    Returns:
      float32[..., n, r]; a column that depends on those before it, or is 0, becomes 0.
    """
    places = jnp.arange(columns.shape[-1], dtype=jnp.int32)

    # A loop, for the program to be of the same length whatever the rank.
    def clear(i: jax.Array, columns: jax.Array) -> jax.Array:
        column = jax.lax.dynamic_index_in_dim(columns, i, axis=-1)
        done = jnp.where(places < i, columns, 0.0)
        greatest = jnp.max(jnp.abs(column), axis=-2, keepdims=True)
        column = column * jnp.where(greatest > 0, 1.0 / jnp.where(greatest > 0, greatest, 1.0), 0.0)
        length = jnp.sqrt(jnp.sum(column * column, axis=-2, keepdims=True))
        for _ in range(2):
            along = jnp.sum(done * column, axis=-2, keepdims=True)
            column = column - jnp.sum(done * along, axis=-1, keepdims=True)
        left = jnp.sqrt(jnp.sum(column * column, axis=-2, keepdims=True))
        new = left > 1e-5 * length
        column = column * jnp.where(new, 1.0 / jnp.where(new, left, 1.0), 0.0)
        return jax.lax.dynamic_update_index_in_dim(columns, column, i, axis=-1)

    return jax.lax.fori_loop(0, columns.shape[-1], clear, columns)


def _low_rank_step(
    vector: jax.Array,
    right: tuple[jax.Array, ...],
    groups: list[Group],
    layout: Layout,
    axis_name: AxisName,
    settle: Settle,
) -> tuple[Reduced, tuple[jax.Array, ...]]:
    matrices = [jnp.stack([matrix(vector, s, layout) for s in group.segments]) for group in groups]
    thin = {s for group in groups for s in group.segments}
    plain = [s for s in range(layout.segments) if s not in thin and layout.sizes[s]]
    products = replicated(_multiply)(matrices, replicated(_orthonormal)(list(right)))
    pieces = [*products, *[matrix(vector, s, layout) for s in plain]]
    averages, wire = _mean_of(pieces, axis_name)
    left = replicated(_orthonormal)(averages[: len(groups)])
    fresh, second = _mean_of(replicated(_multiply_transposed)(matrices, left), axis_name)
    parts = dict(zip(plain, averages[len(groups) :], strict=True))
    for group, product in zip(groups, replicated(_multiply_back)(left, fresh), strict=True):
        parts |= dict(zip(group.segments, product, strict=True))
    average = _assemble(parts, layout)
    finite = jnp.all(jnp.isfinite(average)) & jnp.all(jnp.stack([jnp.all(jnp.isfinite(x)) for x in averages]))
    own = _assemble(parts | {s: matrix(vector, s, layout) for s in plain}, layout)
    outcome = Reduced(
        mean=jnp.where(finite, average, 0.0),
        memory=settle(own, finite),
        finite=finite,
        wire=add(wire, second),
        report=dense_report(layout),
    )
    kept = [
        jnp.where(jnp.any(new != 0, axis=1, keepdims=True), new, old) for new, old in zip(fresh, right, strict=True)
    ]
    return outcome, tuple(kept)


def _mean_of(parts: list[jax.Array], axis_name: AxisName) -> tuple[list[jax.Array], Wire]:
    """Average several arrays by one all-reduce."""
    if not parts:
        return [], nothing()
    flat = mean(jnp.concatenate([part.reshape(-1) for part in parts]), axis_name)
    cut, at = [], 0
    for part in parts:
        cut.append(flat[at : at + part.size].reshape(part.shape))
        at += part.size
    return cut, reduced(WORD_BITS * at, axis_size(axis_name))


def _assemble(parts: dict[int, jax.Array], layout: Layout) -> jax.Array:
    return loosen(jnp.concatenate([parts[s].reshape(-1) for s in sorted(parts)]), layout)


def _orthonormal(groups: list[jax.Array]) -> list[jax.Array]:
    return [orthonormalise(columns) for columns in groups]


def _multiply(matrices: list[jax.Array], right: list[jax.Array]) -> list[jax.Array]:
    return [jnp.einsum("bnm,bmr->bnr", m, q) for m, q in zip(matrices, right, strict=True)]


def _multiply_transposed(matrices: list[jax.Array], left: list[jax.Array]) -> list[jax.Array]:
    return [jnp.einsum("bnm,bnr->bmr", m, p) for m, p in zip(matrices, left, strict=True)]


def _multiply_back(left: list[jax.Array], right: list[jax.Array]) -> list[jax.Array]:
    return [jnp.einsum("bnr,bmr->bnm", p, q) for p, q in zip(left, right, strict=True)]
