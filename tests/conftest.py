"""Four virtual devices for every test, set before the first use of a backend; compiled programs do not pile up."""

import gc
import os
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest
from hypothesis import HealthCheck, settings

jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_numpy_rank_promotion", "raise")

settings.register_profile(
    "lean",
    max_examples=30,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.register_profile("deep", parent=settings.get_profile("lean"), max_examples=1000, derandomize=False)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "lean"))

MAPS = Path("/proc/self/maps")
MOST_MAPS = 25_000


@pytest.fixture(autouse=True)
def few_memory_maps() -> Iterator[None]:
    """Let compiled programs go in time: each takes many memory maps, of which Linux allows a process 65,530."""
    yield
    if MAPS.exists() and MAPS.read_bytes().count(b"\n") > MOST_MAPS:
        jax.clear_caches()
        gc.collect()
