"""The house's rules: imports run one way, and a command line imports nothing heavy before it works."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ORDER = ("index", "pipeline", "trainer")


def imported_packages(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add((node.module or "").split(".")[0])
    return names


@pytest.mark.parametrize("package", ORDER)
def test_imports_run_one_way(package):
    later = set(ORDER[ORDER.index(package) + 1 :])
    files = sorted((ROOT / package).rglob("*.py"))
    assert files
    for path in files:
        assert not imported_packages(path) & later, f"{path} imports a package that stands after {package}"


def test_an_arrow_against_the_order_would_be_found(tmp_path):
    path = tmp_path / "bad.py"
    path.write_text("def f():\n    from trainer.fit import fit\n")
    assert "trainer" in imported_packages(path)


@pytest.mark.parametrize("module", ["pipeline.cli", "trainer.cli", "index.space.geometry", "index.table.schema"])
def test_nothing_heavy_is_imported_early(module):
    code = f"import sys, {module}; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    heavy = {"torch", "apache_beam", "lancedb", "lance", "transformers", "diffusers"}
    if module.endswith("cli"):
        heavy |= {"pyarrow", "numpy", "PIL"}
    assert not heavy & set(loaded)


def test_all_packages_are_named_in_the_distribution():
    import tomllib

    named = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    found = {
        ".".join(path.parent.relative_to(ROOT).parts)
        for package in ORDER
        for path in (ROOT / package).rglob("__init__.py")
    }
    assert named == found
