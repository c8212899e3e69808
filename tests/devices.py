"""What tests over several devices share: trees with a row for each device."""

import jax
import jax.numpy as jnp
import numpy as np

W, AXIS = 4, "w"


def stack(tree, *devices: int):
    """Give every device, of one axis or of several, the same."""
    return jax.tree.map(lambda x: jnp.broadcast_to(x, (*(devices or (W,)), *jnp.shape(x))), tree)


def flat(tree, devices: int = W) -> np.ndarray:
    """Lay a tree's leaves out as one row for each device."""
    return np.concatenate([np.asarray(x, np.float64).reshape(devices, -1) for x in jax.tree.leaves(tree)], axis=1)


def unpadded(memory: jax.Array, like) -> np.ndarray:
    """Leave out of memories what stands between their leaves."""
    parts, at = [], 0
    for leaf in jax.tree.leaves(like):
        parts.append(np.asarray(memory, np.float64)[:, at : at + leaf.size])
        at += -(-leaf.size // 32) * 32
    return np.concatenate(parts, axis=1)


def assert_equal(a, b) -> None:
    """See that two trees have the same leaves, bit for bit."""
    jax.tree.map(np.testing.assert_array_equal, a, b)
