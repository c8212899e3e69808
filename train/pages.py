"""Memory that is freed stays with the process, so that the next step's arrays need not be paged in again."""

from __future__ import annotations

import ctypes
import os

TRIM_THRESHOLD, MMAP_MAX, ARENA_MAX = -1, -4, -8  # of glibc's <malloc.h>
OWN = "MALLOC_", "GLIBC_TUNABLES"  # how users set the allocator in the environment


def keep() -> bool:
    """Tell the C library to keep what is freed; call it before JAX starts.

    By default glibc gives arrays of megabytes back when they are freed, and the system hands their pages out anew, one
    by one and zeroed, at every step: on CPUs that can be a third of a step. What the environment says of the allocator
    stands. The process then keeps as much memory as it has needed at its peak.

    Returns:
      Whether it will; not where the environment speaks of it, nor with another library than glibc.
    """
    if any(name.startswith(OWN) for name in os.environ):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library; Windows
        return False
    # Nothing apart from the heap, nothing given back; and a single heap, for those of further threads are given back
    return all([mallopt(MMAP_MAX, 0), mallopt(TRIM_THRESHOLD, -1), mallopt(ARENA_MAX, 1)])
