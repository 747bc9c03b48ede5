"""The order of packages and of their rooms: imports point to what is written earlier in it, inside functions too."""

import ast
import subprocess
import sys
from collections.abc import Container, Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# A room is a folder or a file of a package. It may import itself, rooms before it, and packages before its own.
ORDER = {
    "index": [
        *("errors", "reach", "ranges", "options", "background", "terminal"),
        *("space", "table", "search", "report", "build"),
    ],
    "pipeline": [
        *("rejects", "filters", "images", "sources", "config", "encoders"),
        *("beam", "encode", "estimate", "targets", "demo", "cli"),
    ],
    "trainer": [
        *("models", "optimizer", "run_folder", "checkpoints", "stream", "tokens"),
        *("objectives", "config", "targets", "resume"),
        *("grid", "sampler", "tracking", "process", "loop", "training_loop", "autoencoders", "fit"),
        *("evaluation", "demo", "cli"),
    ],
}


def modules(package: str) -> list[Path]:
    return [path for path in sorted((ROOT / package).rglob("*.py")) if path != ROOT / package / "__init__.py"]


def room_of(path: Path) -> tuple[str, str]:
    package, room = path.relative_to(ROOT).with_suffix("").parts[:2]
    return package, room


def imported_names(path: Path) -> Iterator[tuple[str, int]]:
    """The dotted name and the line of each import of our own packages, wherever in the file it is."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from ((name, node.lineno) for name in names if name.partition(".")[0] in ORDER)


def imported_files(path: Path, files: Container[str]) -> Iterator[str]:
    """The modules among `files` that a file imports, or imports names of."""
    for name, _ in imported_names(path):
        yield from (module for module in (name, name.rpartition(".")[0]) if module in files)


@pytest.mark.parametrize("package", ORDER)
def test_packages_and_rooms_import_one_way(package):
    packages, paths = list(ORDER), modules(package)
    assert paths
    wrong = []
    for path in paths:
        _, room = room_of(path)
        assert room in ORDER[package], f"{path.relative_to(ROOT)}: write {room!r} into ORDER, after what it imports"
        for name, line in imported_names(path):
            other, other_room = name.split(".")[:2]
            here = f"{path.relative_to(ROOT)}:{line}"
            if packages.index(other) > packages.index(package):
                wrong.append(f"{here} imports {other}, which comes after {package}")
            elif other == package and ORDER[package].index(other_room) > ORDER[package].index(room):
                wrong.append(f"{here} imports {other}.{other_room}, which comes after {room}")
    assert not wrong, "\n".join(wrong)


def test_files_import_each_other_in_no_circle():
    paths = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for name in ORDER for path in modules(name)}
    imports = {name: {each for each in imported_files(path, paths) if each != name} for name, path in paths.items()}
    assert len(list(TopologicalSorter(imports).static_order())) == len(paths)  # CycleError names the circle


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
    folders = {
        ".".join(path.parent.relative_to(ROOT).parts)
        for package in ORDER
        for path in (ROOT / package).rglob("__init__.py")
    }
    assert named == folders
