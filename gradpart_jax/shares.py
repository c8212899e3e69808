"""Each device's share of the flat vector: the words whose sums it owns.

Words are dealt out in groups of as many as there are devices, each group from another device on. So every leaf falls to
all devices alike, whatever its size and however its large entries lie, and no range needs to be balanced.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from gradpart_jax.bits import WORD
from gradpart_jax.segments import Layout
from gradpart_jax.stored import stored


@dataclasses.dataclass(frozen=True)
class Share:
    """One device's share, as a vector of its own; it stands where a Layout may.

    Attributes:
      sizes: elements of each leaf in the whole vector, of which empty leaves are told.
      starts: int32[S], first position of each leaf's part in the share.
      total: length of the share, a multiple of 32, the same for all devices.
      whole: length of the whole vector.
      owner: int32[], the device.
      devices: W.
    """

    sizes: tuple[int, ...]
    starts: jax.Array
    total: int
    whole: int
    owner: jax.Array
    devices: int

    def restore(self, positions: jax.Array) -> jax.Array:
        """Find positions in the whole vector.

        Args:
          positions: int32[...], in the share; from `total` on there is none.

        Returns:
          int32[...]; `whole` where there is none.
        """
        group, bit = positions // WORD, positions % WORD
        word = group * self.devices + _place(group, self.owner, self.devices)
        return jnp.where((positions < self.total) & (word < self.whole // WORD), word * WORD + bit, self.whole)


def share_size(layout: Layout, devices: int) -> int:
    """Say how long a share is.

    Args:
      layout: of the whole vector.
      devices: W.

    Returns:
      A multiple of 32; shares may hold a few positions that the whole vector has not.
    """
    return -(-layout.total // (WORD * devices)) * WORD


def share_of(layout: Layout, devices: int, owner: jax.Array) -> Share:
    """Describe a device's share.

    Args:
      layout: of the whole vector.
      devices: W.
      owner: int32[] in [0, W).

    Returns:
      Share.
    """
    word = jnp.asarray(layout.starts, jnp.int32) // WORD
    group, place = word // devices, word % devices
    before = _place(group, owner, devices) < place
    return Share(
        sizes=layout.sizes,
        starts=(group + before.astype(jnp.int32)) * WORD,
        total=share_size(layout, devices),
        whole=layout.total,
        owner=owner,
        devices=devices,
    )


def scatter_share(values: jax.Array, layout: Layout, devices: int, owner: jax.Array) -> jax.Array:
    """Put a share's elements in their places in the whole vector.

    Args:
      values: float32[share].
      layout: of the whole vector.
      devices: W.
      owner: int32[] in [0, W), whose share it is.

    Returns:
      float32[n], 0 where others own.

    >>> import jax.numpy as jnp
    >>> from gradpart_jax.segments import layout_of
    >>> layout = layout_of(jnp.zeros(96))
    >>> whole = sum(scatter_share(jnp.full(64, owner + 1.0), layout, 2, owner) for owner in range(2))
    >>> whole[::32].tolist()
    [1.0, 2.0, 1.0]
    """
    mine = _words_of(owner, values.shape[0] // WORD, devices)
    return jnp.where(mine[..., None], values.reshape(-1, 1, WORD), 0.0).reshape(-1)[: layout.total]


def take_share(vector: jax.Array, devices: int, owner: jax.Array) -> jax.Array:
    """Read a share's elements from the whole vector.

    Args:
      vector: float32[n], n a multiple of 32.
      devices: W.
      owner: int32[] in [0, W), whose share it is.

    Returns:
      float32[share], 0 where the whole vector has no such word.

    >>> import jax.numpy as jnp
    >>> take_share(jnp.arange(96.0), 2, jnp.int32(0))[::32].tolist()
    [0.0, 64.0]
    """
    return deal_words(vector.reshape(-1, WORD), devices, owner[None]).reshape(-1)


def owned_by(owner: jax.Array, layout: Layout, devices: int) -> jax.Array:
    """Say which words of the whole vector are a device's share.

    Args:
      owner: int32[] in [0, W).
      layout: of the whole vector.
      devices: W.

    Returns:
      bool[n / 32].

    >>> import jax.numpy as jnp
    >>> from gradpart_jax.segments import layout_of
    >>> owned_by(jnp.int32(0), layout_of(jnp.zeros(96)), 2).tolist()
    [True, False, True]
    """
    groups = share_size(layout, devices) // WORD
    return stored(_words_of(owner, groups, devices).astype(jnp.int32).reshape(-1)[: layout.total // WORD]) > 0


def deal_words(words: jax.Array, devices: int, owners: jax.Array) -> jax.Array:
    """Sort a vector's words by owner.

    Args:
      words: [n / 32, ...].
      devices: W.
      owners: int32[O] in [0, W), whose words are wanted.

    Returns:
      [O, share / 32, ...], 0 where the whole vector has no such word.

    >>> import jax.numpy as jnp
    >>> deal_words(jnp.arange(6, dtype=jnp.uint32), 2, jnp.arange(2)).tolist()
    [[0, 2, 5], [1, 3, 4]]
    """
    rest = [(0, 0)] * (words.ndim - 1)
    words = jnp.pad(words, [(0, -words.shape[0] % devices), *rest])
    group = jnp.arange(words.shape[0] // devices, dtype=jnp.int32)[None, :]
    # Stored, else each element works its word's place out anew
    place = stored(group * devices + _place(group, owners[:, None], devices))
    return words.at[place].get(mode="promise_in_bounds", unique_indices=True)


def _words_of(owner: jax.Array, groups: int, devices: int) -> jax.Array:
    """Say which words of each group are a device's: bool[groups, W]."""
    # Stored, else each element works its word's owner out anew
    place = stored(_place(jnp.arange(groups, dtype=jnp.int32), owner, devices))
    return jnp.arange(devices, dtype=jnp.int32)[None, :] == place[:, None]


def _place(group: jax.Array, owner: jax.Array, devices: int) -> jax.Array:
    """Say which word of a group a device owns."""
    mixed = group.astype(jnp.uint32) * jnp.uint32(0x9E3779B1) >> 15
    first = (mixed % jnp.uint32(devices)).astype(jnp.int32)  # owner of the first word
    return (owner - first) % devices
