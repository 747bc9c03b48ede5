"""The documents: commands that run, links that resolve, a tree that is complete."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from trainer.demo import check_captions, heldout_captions, read_results

ROOT = Path(__file__).parent.parent
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
SMALL = {
    "demo-data": ["--num-samples", "300"],
    "fit-autoencoder": ["--steps", "20"],
    "encode": [],
    "build-index": [],
    "fit": ["--device", "cpu"],
    "sample": ["--device", "cpu"],
    "evaluate": ["--num-samples", "40", "--num-inference-steps", "1"],
}
"""Options that make a command of the quick start small enough for a test."""


def commands_of(document: Path) -> list[list[str]]:
    """Return the `pipeline` and `trainer` commands in a document's code blocks, continuation lines joined."""
    blocks = re.findall(r"^```\n(.*?)^```", document.read_text(), flags=re.DOTALL | re.MULTILINE)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines if re.match(r"(pipeline|trainer) ", line)]


def run(arguments: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    code = f"from {arguments[0]}.cli import main; main()"
    return subprocess.run([sys.executable, "-c", code, *arguments[1:]], cwd=folder, capture_output=True, text=True)


@pytest.mark.slow
def test_the_quick_start_runs_as_written(tmp_path):
    """The README's commands in their order, with smaller numbers, produce what the README promises."""
    commands = [command for command in commands_of(ROOT / "README.md") if not any("s3://" in part for part in command)]
    assert [command[1] for command in commands] == [
        *("demo-data", "fit-autoencoder", "fit-autoencoder", "encode", "build-index", "fit", "sample", "evaluate")
    ]
    for command in commands:
        small = ["2048" if part == "800000" else part for part in command]
        result = run([*small, *SMALL[command[1]]], tmp_path)
        assert result.returncode == 0, f"{' '.join(command)}: {result.stderr[-2000:]}"
    assert (tmp_path / "circle.png").stat().st_size > 0
    assert "<svg" in (tmp_path / "demo/run/report/index.html").read_text()
    # `make demo` runs the same commands into the same folders, and then reads their results.
    results = read_results(tmp_path / "demo") | check_captions(tmp_path / "demo/run", heldout_captions(4))
    assert (results["rows"], results["rejected"], results["images checked"]) == (300, 0, 4)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_commands_use_options_that_exist(document):
    """Every option in a code block belongs to its command, so that no document keeps an old name."""
    for command in commands_of(document):
        own = command[: command.index("--")] if "--" in command else command
        known = options_of(command[0], command[1])
        given = {part.partition("=")[0] for part in own if re.match(r"--[a-z]", part)}
        assert given <= known, f"{document.name}: {' '.join(command)}"


def options_of(script: str, command: str) -> set[str]:
    import importlib

    import typer

    group = typer.main.get_command(importlib.import_module(f"{script}.cli").app)
    assert command in group.commands, f"there is no command `{script} {command}`"
    return {name for option in group.commands[command].params for name in (*option.opts, *option.secondary_opts)} | {
        "--help"
    }


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_relative_links_resolve(document):
    for target in re.findall(r"\]\(([^)\s]+)\)", document.read_text()):
        if not re.match(r"[a-z]+:", target):
            assert (document.parent / target.partition("#")[0]).exists(), f"{document.name} links to {target}"


def test_the_tree_names_every_file():
    """docs/design.md has a line for each module of the packages, and none for a file that is gone."""
    tree = re.search(r"^```\n(index/.*?)^```", (ROOT / "docs/design.md").read_text(), flags=re.DOTALL | re.MULTILINE)
    assert tree is not None
    listed, folders = set(), []
    for line in tree[1].splitlines():
        name = line.split()[0]
        depth = (len(line) - len(line.lstrip())) // 2
        if name.endswith("/"):
            folders[depth:] = [name]
        else:
            listed.add("".join(folders[:depth]) + name)
    files = {
        path.relative_to(ROOT).as_posix()
        for package in ("index", "pipeline", "trainer")
        for path in (ROOT / package).rglob("*.py")
        if path.name != "__init__.py"
    }
    assert listed == files


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 130


def test_every_figure_of_the_docs_is_shown_somewhere():
    text = "".join(document.read_text() for document in DOCUMENTS)
    for figure in (ROOT / "docs").glob("*.[ps][nv]g"):
        assert figure.name in text, f"no document shows {figure.name}"
