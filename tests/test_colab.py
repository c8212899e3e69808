"""The notebooks: as they are stored, and as they run with a quick setting on virtual CPU devices."""

import ast
import os
import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest
from IPython.core.inputtransformer2 import TransformerManager
from nbclient import NotebookClient

ROOT = Path(__file__).parent.parent
NOTEBOOKS = ("quickstart", "anatomy")
OUTSIDE = {"gradpart_jax", "jax", "flax", "optax", "numpy", "matplotlib", "sklearn", "IPython"}


def stored(name: str) -> Any:
    return nbformat.read(ROOT / "colab" / f"{name}.ipynb", as_version=nbformat.NO_CONVERT)


def python(cell: Any) -> str:
    return TransformerManager().transform_cell(cell.source)


def cells(name: str) -> list[Any]:
    return [cell for cell in stored(name).cells if cell.cell_type == "code"]


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_is_valid_and_stored_without_outputs(name: str) -> None:
    notebook = stored(name)
    nbformat.validate(notebook)
    assert (notebook.nbformat, notebook.nbformat_minor) >= (4, 5)
    assert len({cell.id for cell in notebook.cells}) == len(notebook.cells)
    for cell in cells(name):
        assert cell.outputs == []
        assert cell.execution_count is None


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_badge_first_and_form_fields(name: str) -> None:
    first = stored(name).cells[0].source.splitlines()[0]
    assert first.startswith("[![Open In Colab](https://colab.research.google.com/assets/colab-badge.svg)]")
    assert first.endswith(f"/blob/main/colab/{name}.ipynb)")
    install, settings, *_ = cells(name)
    address = first.split("/github/")[1].split("/blob/")[0]
    assert f'repository = "https://github.com/{address}"  # @param' in install.source
    assert settings.source.count("# @param") >= 5


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_imports_the_package_and_common_libraries_only(name: str) -> None:
    for cell in cells(name):
        for node in ast.walk(ast.parse(python(cell))):
            if isinstance(node, ast.Import | ast.ImportFrom):
                modules = [a.name for a in node.names] if isinstance(node, ast.Import) else [str(node.module)]
                for module in modules:
                    assert module.split(".")[0] in OUTSIDE | sys.stdlib_module_names


@pytest.mark.parametrize("name", NOTEBOOKS)
@pytest.mark.parametrize(
    ("present", "expected"),
    [
        ({"gradpart_jax", "libtpu"}, None),
        ({"libtpu"}, '"jax[tpu]"'),
        ({"jax_cuda12_plugin"}, '"jax[cuda12]"'),
        (set(), '"jax"'),
    ],
)
def test_installs_only_where_the_package_is_missing(
    name: str, present: set[str], expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "4")
    found = set(present)
    monkeypatch.setattr("importlib.util.find_spec", lambda module: object() if module in found else None)
    commands = []

    class Shell:
        def run_line_magic(self, magic: str, line: str) -> None:
            # IPython fills variables in from the caller's names
            commands.append((magic, line.format(**namespace)))
            found.add("gradpart_jax")

    namespace: dict[str, Any] = {"get_ipython": Shell}
    code = compile(python(cells(name)[0]), name, "exec")
    for _ in range(2):
        exec(code, namespace)
    if expected is None:
        assert commands == []
    else:
        ((magic, line),) = commands
        assert magic == "pip"
        assert '"gradpart_jax @ git+https://' in line
        assert expected in line


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "devices", "figures", "said"),
    [
        ("quickstart", 4, 2, "4 workers on 4 x"),
        pytest.param("quickstart", 1, 2, "4 workers on 1 x", marks=pytest.mark.deep),
        ("anatomy", 4, 10, "decoded + memory equals gradient + memory: True"),
    ],
)
def test_runs_without_a_warning(name: str, devices: int, figures: int, said: str, tmp_path: Path) -> None:
    notebook = stored(name)
    environment = os.environ | {
        "GRADPART_QUICK": "1",
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(devices),
        "PYTHONPATH": str(ROOT),
    }
    client = NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": tmp_path}})
    client.execute(env=environment)
    install, *_ = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert install.outputs == []
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert [output.text for output in outputs if output.get("name") == "stderr"] == []
    assert said in "".join(output.text for output in outputs if output.output_type == "stream")
    assert sum("image/png" in output.get("data", {}) for output in outputs) == figures
    assert list(tmp_path.iterdir()) == []
