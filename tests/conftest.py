"""Four virtual devices for every test, set before the first use of a backend; programs are compiled quickly, shared, and let go in time."""

import atexit
import gc
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest
from hypothesis import HealthCheck, settings

ROOT = Path(__file__).parents[1]
# Most of the time goes into compiling, which takes a quarter as long like this; `XLA_FLAGS= pytest` compiles as users do.
QUICK = "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"


def known(flags: str) -> bool:
    """Ask XLA whether it knows flags; those that it does not know would end every process."""
    ask = [sys.executable, "-c", "import jax; jax.devices()"]
    return not subprocess.run(ask, env=os.environ | {"XLA_FLAGS": flags}, capture_output=True).returncode


# Programs, notebooks and other workers start the same steps again and again: each is compiled once a session.
if "PYTEST_XDIST_WORKER" not in os.environ:
    if "XLA_FLAGS" not in os.environ and known(QUICK):
        os.environ["XLA_FLAGS"] = QUICK
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="gradpart-jax-tests-")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.5"
jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
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


@pytest.fixture
def usual_signals() -> Iterator[None]:
    """Have signals do what they do in a terminal: under nohup, and behind `&` in a script, some are ignored."""
    usual = {signal.SIGINT: signal.default_int_handler, signal.SIGHUP: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in usual.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


MAPS = Path("/proc/self/maps")
MOST_MAPS = 25_000


@pytest.fixture(autouse=True)
def few_memory_maps() -> Iterator[None]:
    """Let compiled programs go in time: each takes many memory maps, of which Linux allows a process 65,530."""
    yield
    if MAPS.exists() and MAPS.read_bytes().count(b"\n") > MOST_MAPS:
        jax.clear_caches()
        gc.collect()


def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Run a test of what the compiler leaves of the bits in a process of its own, compiled as users do."""
    if pyfuncitem.get_closest_marker("optimised") is None or os.environ.get("XLA_FLAGS") != QUICK:
        return None
    test = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", pyfuncitem.nodeid]
    ended = subprocess.run(
        test, cwd=ROOT, env=os.environ | {"XLA_FLAGS": ""}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert ended.returncode == 0, ended.stdout
    return True


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the tests of an `xdist_group` one after another, so that one worker compiles what they share, once.

    Workers begin with long runs of tests and steal from each other at the end (--dist=worksteal). --dist=loadgroup
    would do without this, and does nothing from pytest 9.2 on.
    """
    first: dict[str, int] = {}
    places = []
    for at, item in enumerate(items):
        mark = item.get_closest_marker("xdist_group")
        places.append(at if mark is None else first.setdefault(mark.args[0], at))
    items[:] = [items[at] for at in sorted(range(len(items)), key=places.__getitem__)]
