"""signSGD with majority vote (Bernstein et al., ICLR 2019, algorithm 1), each device counting a part of the votes."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from gradpart_jax import bits
from gradpart_jax.bits import WORD, bitmask
from gradpart_jax.coded import merge_by_owners
from gradpart_jax.exchange import AxisName, axis_size
from gradpart_jax.scheme import Reduced, Scheme, SchemeState, Settle, dense_report
from gradpart_jax.segments import Layout
from gradpart_jax.varying import alike

FINITE, VOTING = 1, 2  # bits of a header


def signsgd() -> Scheme:
    """Send each value's sign; the update is the sign that most devices sent.

    V = sign(sum over devices of sign(v)). A sign has one bit, so that 0 counts as plus; a device whose gradient is 0
    everywhere does not vote, and the update is 0 where none does. Of two equal halves that one wins in which device
    t mod W voted, in step t (or, if it did not, the next that did): so the majority has one bit too, and no sign is
    favoured. The paper leaves ties open. Each device counts the votes on one part of the vector, in the place of the
    paper's server: the link carries the same whatever the number of devices.

    Nothing is owed: a sign is no approximation of a value, and a memory stays empty. Its updates have magnitude 1: give
    the optimizer a small learning rate. The paper's momentum on each device is `optax.trace` before `compress`.

    Returns:
      A Scheme that sends 1 bit an element by an all-to-all, and 1 bit an element of its own part by an all-gather; each
      part of either has a header of 32 bits.

    >>> import jax.numpy as jnp, gradpart_jax as gp
    >>> tx = gp.compress(gp.baselines.signsgd(), error_feedback=False)
    >>> tx.update(jnp.array([3.0, -0.1]), tx.init(jnp.zeros(2)))[0]
    Array([ 1., -1.], dtype=float32)
    """

    def reduce(
        vector: jax.Array, state: SchemeState, layout: Layout, axis_name: AxisName, settle: Settle
    ) -> tuple[Reduced, SchemeState]:
        step, devices = state.shared, axis_size(axis_name)
        signs = bitmask(vector < 0)
        parts = jnp.pad(signs, (0, -signs.size % devices)).reshape(devices, -1)
        header = jnp.where(jnp.all(jnp.isfinite(vector)), FINITE, 0) | jnp.where(jnp.any(vector != 0), VOTING, 0)
        headers = jnp.broadcast_to(header.astype(jnp.uint32), (devices, 1))
        counted, wire = merge_by_owners(
            jnp.concatenate([headers, parts], axis=1), lambda votes: _majority(votes, step), axis_name
        )
        everywhere, voted = (jnp.all(counted[:, 0] & flag > 0) for flag in (FINITE, VOTING))
        minus = bits.unpack(counted[:, 1:].reshape(-1), layout.total, 1) > 0
        outcome = Reduced(
            mean=jnp.where(everywhere & voted, jnp.where(minus, -1.0, 1.0), 0.0),
            memory=settle(vector, everywhere),
            finite=everywhere,
            wire=wire,
            report=dense_report(layout),
        )
        return outcome, SchemeState(step + 1, ())

    return Scheme("signSGD", lambda layout: SchemeState(jnp.int32(0), ()), reduce, lambda layout: layout.elements)


def _majority(votes: jax.Array, step: jax.Array) -> jax.Array:
    """Count what every device sent for one part: from uint32[W, 1 + words] to uint32[1 + words]."""
    devices = votes.shape[0]
    voting = votes[:, 0] & VOTING > 0
    device = jnp.arange(devices, dtype=jnp.int32)
    turn = jnp.where(voting, (device - step) % devices, devices)
    # One vote counts a half more: it decides where the others are equally divided, and nowhere else.
    weights = jnp.where(voting, 2 + (turn == jnp.min(turn)), 0)
    size = (votes.shape[1] - 1) * WORD

    def count(total: jax.Array, one: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        weight, words = one
        return total + jnp.where(bits.unpack(words, size, 1) > 0, -weight, weight), None

    start = alike(jnp.zeros(size, jnp.int32), votes)
    total, _ = jax.lax.scan(count, start, (weights, votes[:, 1:]))
    finite = jnp.all(votes[:, 0] & FINITE > 0)
    header = jnp.where(finite, FINITE, 0) | jnp.where(jnp.any(voting), VOTING, 0)
    return jnp.concatenate([header.astype(jnp.uint32)[None], bitmask(total < 0)])
