"""Sums of codes over devices, taken on the way: an all-reduce of whole words, each of which holds several fields."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from gradpart_jax import accounting
from gradpart_jax.accounting import WORD_BITS, Wire
from gradpart_jax.bits import pack_apart, unpack_apart, words_apart
from gradpart_jax.exchange import AxisName, axis_size, total


def words_added(size: int, width: int) -> int:
    """Say how many words `add_codes` sends: the codes', and a count of non-finite devices.

    >>> words_added(100, 8)
    26
    """
    return words_apart(size, width) + 1


def add_codes(
    codes: jax.Array, width: int, finite: jax.Array, axis_name: AxisName
) -> tuple[jax.Array, jax.Array, Wire]:
    """Add up codes over devices.

    Args:
      codes: uint32[k], whose sums are below 2^width, so that fields overflow neither into one another nor out of words.
      width: bits of a sum.
      finite: bool[], whether this device has anything to tell.
      axis_name: the mapped axis.

    Returns:
      uint32[k]; bool[], whether all devices are finite; and what was sent.

    >>> import jax.numpy as jnp
    >>> add_codes(jnp.array([1, 6], jnp.uint32), 3, jnp.bool_(True), None)[0].tolist()
    [1, 6]
    """
    broken = (~finite).astype(jnp.uint32)[None]
    sums = total(jnp.concatenate([pack_apart(codes, width), broken]), axis_name)
    wire = accounting.reduced(WORD_BITS * sums.size, axis_size(axis_name))
    return unpack_apart(sums[:-1], codes.size, width), sums[-1] == 0, wire
