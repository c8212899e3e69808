"""The house's rules: who may import whom, and what a user of the library must install."""

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "gradpart_jax"

# Each room stands on rooms of the floors below its own, never beside or above, but for the pairs named here.
FLOORS = (
    {"stored", "prefix_sums", "checks", "varying", "costs", "unfolding"},
    {"_version", "families", "bits", "segments", "replicated"},
    {"buffers", "codecs", "exchange", "summaries", "reductions", "matrices", "shares"},
    {"feedback", "accounting", "regions", "predictor", "payload", "magnitudes", "moments", "levels"},
    {"scheme", "outlook", "meshes", "sums"},
    {"candidates", "sizes", "sparse", "coded", "states", "agreement"},
    {"selection"},
    {"gathered", "scattered", "led"},
    {"baselines.*"},
    {"gradpart", "transform", "baselines"},
    {"compressors", "placement", "planner", "local_steps", "agreeing"},
    {"recipes", "replicas"},
    {"__init__"},
)


def rooms() -> dict[str, ast.Module]:
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        found[name.removesuffix(".__init__")] = ast.parse(path.read_text())
    return found


def imports(tree: ast.Module) -> set[str]:
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            assert node.module is not None
            found |= {f"{node.module}.{a.name}" if node.module == "gradpart_jax" else node.module for a in node.names}
    return found


def floor(room: str) -> int:
    kind = "baselines.*" if room.startswith("baselines.") else room
    found = [i for i, names in enumerate(FLOORS) if kind in names]
    assert found, f"{room} has no floor: add it to FLOORS"
    return found[0]


@pytest.mark.parametrize("room", rooms())
def test_imports_go_down(room: str) -> None:
    for name in imports(rooms()[room]):
        top, _, rest = name.partition(".")
        if top == "gradpart_jax":
            assert floor(rest or "__init__") < floor(room), f"{room} imports {rest}, which is not below it"


def test_users_install_what_is_imported_and_nothing_else() -> None:
    found = {name.partition(".")[0] for tree in rooms().values() for name in imports(tree)}
    listed = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text())["project"]["dependencies"]
    assert found - {"gradpart_jax", *sys.stdlib_module_names} == {one.partition(">")[0] for one in listed}


def test_collectives_stand_only_in_exchange_and_flax_only_where_networks_are() -> None:
    collectives = {"psum", "pmean", "pmax", "pmin", "all_gather", "all_to_all", "ppermute", "psum_scatter"}
    for room, tree in rooms().items():
        used = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        assert room == "exchange" or not used & collectives, f"{room} uses {used & collectives}"
        assert room in ("predictor", "baselines.lgc") or not any(i.split(".")[0] == "flax" for i in imports(tree)), room


def test_importing_the_library_starts_no_backend_and_loads_no_extra() -> None:
    code = (
        "import sys, jax, gradpart_jax; from jax._src import xla_bridge;"
        "assert not xla_bridge._backends, 'a backend was started';"
        "loaded = {m.split('.')[0] for m in sys.modules};"
        "print(sorted(loaded & {'tensorflow_datasets', 'matplotlib', 'tyro', 'sklearn', 'train'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
