"""How dense quantisers exchange: codes of all devices gathered, or dealt to owners of a part who merge them."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from gradpart_jax import bits
from gradpart_jax.accounting import WORD_BITS, Wire, add, dealt, gathered
from gradpart_jax.exchange import AxisName, axis_size, deal, gather
from gradpart_jax.scheme import Reduced, Settle, dense_report
from gradpart_jax.segments import Layout
from gradpart_jax.varying import alike

HALF = 16


class Coded(NamedTuple):
    """One device's vector as codes and scales."""

    codes: jax.Array  # uint32[k], each below 2^width
    scales: jax.Array  # float32[s]: at least one


# From codes and scales to float32[n].
Decode: TypeAlias = Callable[[jax.Array, jax.Array], jax.Array]


class Form(NamedTuple):
    """Sizes of a payload of codes."""

    elements: int  # k
    width: int  # bits of a code
    scales: int  # s
    scale_bits: int = WORD_BITS  # 16 where the scales are numbers of bfloat16

    @property
    def code_words(self) -> int:
        """Words that the codes fill."""
        return -(-self.elements * self.width // WORD_BITS)

    @property
    def words(self) -> int:
        """Words of the payload."""
        return self.code_words - (-self.scales * self.scale_bits // WORD_BITS)


def exchange_coded(
    vector: jax.Array,
    coded: Coded,
    decode: Decode,
    form: Form,
    layout: Layout,
    axis_name: AxisName,
    settle: Settle,
) -> Reduced:
    """Gather every device's codes, decode them in device order, and average.

    A device whose vector is not finite sends scales that are not, and so all know. Decoders multiply exactly (see
    `levels`) or not at all: then the sum over devices has the same bits in every program.

    Args:
      vector: float32[n], what is encoded.
      coded: its codes and scales; of any values where the vector is not finite.
      decode: from codes and scales to a vector.
      form: the sizes.
      layout: the segments.
      axis_name: the mapped axis.
      settle: takes what was sent.

    Returns:
      Reduced.
    """
    finite = jnp.all(jnp.isfinite(vector))
    words = _write(coded._replace(scales=jnp.where(finite, coded.scales, jnp.nan)), form)
    payloads = gather(words, axis_name)
    known = jnp.all(jnp.isfinite(jax.vmap(lambda w: _scales(w, form))(payloads)))

    def receive(total: jax.Array, words: jax.Array) -> tuple[jax.Array, None]:
        codes = bits.unpack(words[: form.code_words], form.elements, form.width)
        return total + decode(codes, jnp.where(known, _scales(words, form), 0.0)), None

    total, _ = jax.lax.scan(receive, alike(jnp.zeros(vector.shape), payloads), payloads)
    devices = axis_size(axis_name)
    # Of finite numbers too a sum may be infinite.
    everywhere = known & jnp.all(jnp.isfinite(total))
    own = decode(coded.codes, jnp.where(everywhere, coded.scales, 0.0))
    return Reduced(
        mean=jnp.where(everywhere, total / devices, 0.0),
        memory=settle(own, everywhere),
        finite=everywhere,
        wire=gathered(WORD_BITS * form.words, devices),
        report=dense_report(layout),
    )


def merge_by_owners(
    parts: jax.Array, merge: Callable[[jax.Array], jax.Array], axis_name: AxisName
) -> tuple[jax.Array, Wire]:
    """Deal each device its part of every device's vector, merge the parts there, and give the results to all.

    Args:
      parts: [W, m], this device's vector cut into one part for each owner.
      merge: from [W, m], every device's numbers for one part, to [k].
      axis_name: the mapped axis.

    Returns:
      [W, k], the owners' results in device order, the same on every device; and what it carried: 2 (W - 1) / W of a
      vector on the link if k = m, whatever the number of devices.

    >>> import jax.numpy as jnp
    >>> merge_by_owners(jnp.array([[3, 4]]), lambda parts: parts.sum(axis=0), None)[0].tolist()
    [[3, 4]]
    """
    devices = axis_size(axis_name)
    merged = merge(deal(parts, axis_name))
    sizes = [8 * array.dtype.itemsize * array.size for array in (parts, merged)]
    return gather(merged, axis_name), add(dealt(sizes[0], devices), gathered(sizes[1], devices))


def _write(coded: Coded, form: Form) -> jax.Array:
    raw = jax.lax.bitcast_convert_type(coded.scales, jnp.uint32)
    scales = raw if form.scale_bits == WORD_BITS else bits.pack(raw >> HALF, HALF)
    return jnp.concatenate([bits.pack(coded.codes, form.width), scales])


def _scales(words: jax.Array, form: Form) -> jax.Array:
    words = words[form.code_words :]
    raw = words if form.scale_bits == WORD_BITS else bits.unpack(words, form.scales, HALF) << HALF
    return jax.lax.bitcast_convert_type(raw, jnp.float32)
