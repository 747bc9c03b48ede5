"""Both command lines: what their help shows, what they refuse in one line, and what they do with small real data."""

import importlib.metadata
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from PIL import Image

import pipeline.cli
import trainer.cli
from index.build.build_index import BuildConfig
from index.errors import CoalescerError
from index.table.storage import write_json
from pipeline.config import EncodeConfig
from pipeline.filters import Filters
from trainer.autoencoders.image import ImageAutoencoderConfig
from trainer.config import FitConfig

BIN = Path(sys.executable).parent
PROGRAMS = {
    name: typer.main.get_command(module.app) for name, module in (("pipeline", pipeline.cli), ("trainer", trainer.cli))
}
COMMANDS = [(program, command) for program, group in PROGRAMS.items() for command in group.commands]
BRITISH = re.compile(r"colour|centre|neighbour|optimis|normalis|initialis|serialis|grey|behaviour|licence|favour", re.I)
OLD = {
    "--workers", "--heldout-share", "--reject-limit", "--where", "--dial", "--num", "--guidance", "--samples",
    "--tokens", "--neighbors", "--precision", "--accumulate", "--keep", "--grid", "--perplexity",
}  # fmt: skip
every_command = pytest.mark.parametrize(("program", "command"), COMMANDS, ids=map("-".join, COMMANDS))


def call(*argv, cwd=None, **environment: str):
    argv = [str(BIN / argv[0]), *map(str, argv[1:])]
    environment = {**os.environ, **environment}
    return subprocess.run(argv, capture_output=True, text=True, cwd=cwd, stdin=subprocess.DEVNULL, env=environment)


def parameters(program: str, command: str) -> list:
    return PROGRAMS[program].commands[command].params


def required_arguments(program: str, command: str) -> list[str]:
    """Return a value for everything that the command needs; none of the names exist."""
    argv = [*{"fit-autoencoder": ["image"], "sample": ["nowhere"], "plan": ["1000"]}.get(command, [])]
    argv += [] if command == "plan" else ["nowhere"]
    for option in parameters(program, command):
        if option.param_type_name == "option" and option.required:
            argv += [option.opts[0], "made/none.png" if command == "sample" else "made/none.lance"]
    return argv


@pytest.fixture
def main(monkeypatch, capsys):
    """A function that runs a command line in this process and returns its exit code, output and errors."""

    def run(program, *argv, cwd=None) -> tuple[int, str, str]:
        if cwd is not None:
            monkeypatch.chdir(cwd)
        monkeypatch.setattr(sys, "argv", [program, *map(str, argv)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            {"pipeline": pipeline.cli.main, "trainer": trainer.cli.main}[program]()
        return ended.value.code, *capsys.readouterr()

    return run


@pytest.fixture
def refused(main):
    """A function that expects a command to fail by a user's mistake without writing, and returns its error line."""

    def run(cwd, program, *argv) -> str:
        before = sorted(cwd.rglob("*"))
        code, out, err = main(program, *argv, cwd=cwd)
        assert (code, out) == (2, "")
        assert sorted(cwd.rglob("*")) == before, "something was written"
        *status, line = err.splitlines()
        assert line.startswith("error: ")
        assert all(each.startswith(f"{program} {argv[0]}: ") for each in status)
        return line

    return run


# What help shows.


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_bare_program_shows_the_help_of_its_commands(program):
    bare, asked = call(program), call(program, "--help")
    assert (bare.returncode, bare.stdout, bare.stderr) == (0, asked.stdout, "")
    for command in PROGRAMS[program].commands.values():
        assert command.name in bare.stdout
        assert command.help.partition("\n")[0].rstrip(".") in bare.stdout, "cut short"


@pytest.mark.parametrize("program", PROGRAMS)
def test_version(program):
    assert call(program, "--version").stdout == f"coalescer {importlib.metadata.version('coalescer')}\n"


@every_command
@pytest.mark.parametrize("columns", ["20", "80", "120"])
def test_examples_in_help_can_be_copied(program, command, columns, main, monkeypatch):
    monkeypatch.setenv("COLUMNS", columns)
    code, help, _ = main(program, command, "--help")
    assert code == 0
    block = help.partition("Examples:\n")[2].partition("\nArguments:")[0].replace("\\\n", "")
    examples = [shlex.split(line) for line in block.splitlines() if line.strip()]
    assert len(examples) >= 2
    for example in examples:
        assert example[:2] == [program, command]
        PROGRAMS[program].commands[command].make_context(command, example[2:])  # parses, but does not run
    assert max(map(len, help.splitlines())) <= 84 if columns == "80" else True


@every_command
def test_every_option_is_explained_in_plain_words(program, command, main):
    code, help, _ = main(program, command, "--help")
    assert code == 0
    assert "<list" not in help
    assert "[default: (" not in help
    assert not BRITISH.search(help)
    for parameter in parameters(program, command):
        assert parameter.help, parameter.name
        assert parameter.help.endswith((".", "...")), parameter.help
        assert not OLD & {*parameter.opts, *parameter.secondary_opts}
        if parameter.multiple:
            assert parameter.help.endswith("May be repeated.")


@every_command
def test_every_default_is_shown(program, command, main):
    help = main(program, command, "--help")[1].partition("\nOptions:\n")[2]
    shown = {block.split()[0]: " ".join(block.split()) for block in re.split(r"\n(?=  --)", help)}
    for option in parameters(program, command):
        if option.param_type_name == "option" and not option.is_flag and option.default is not None:
            assert "[default: " in shown[option.opts[0]]


def test_an_option_means_the_same_in_every_command():
    shared = (
        "seed",
        "device",
        "image_size",
        "val_fraction",
        "limit",
        "num_workers",
        "storage_option",
        "as_json",
        "size",
    )
    for name in shared:
        uses = [option for command in COMMANDS for option in parameters(*command) if option.name == name]
        assert len({(*option.opts, option.help, option.metavar) for option in uses}) == 1, name


def test_every_command_has_json():
    assert all("--json" in {flag for option in parameters(*command) for flag in option.opts} for command in COMMANDS)


@every_command
def test_help_imports_nothing_heavy(program, command):
    code = f"import sys; sys.argv = ['{program}', '{command}', '--help']\nfrom {program}.cli import main\n"
    code += "try: main()\nfinally: print(*sys.modules, file=sys.stderr)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stderr.split()
    assert f"{program}.cli" in loaded
    assert not {"torch", "apache_beam", "lancedb", "lance", "numpy", "pyarrow", "PIL", "rich"} & set(loaded)


@every_command
def test_a_command_says_what_it_does_before_its_heavy_imports(program, command, tmp_path):
    code = f"import sys; sys.modules['numpy'] = None; from {program}.cli import main; main()"  # None cannot be imported
    argv = [sys.executable, "-c", code, command, *required_arguments(program, command)]
    done = subprocess.run(argv, capture_output=True, text=True, cwd=tmp_path)
    assert done.stderr.startswith(f"{program} {command}: ")
    assert done.stdout == ""


# Choices.


@every_command
def test_a_wrong_choice_is_refused_while_parsing(program, command, refused, tmp_path):
    for option in parameters(program, command):
        choices = option.type_descriptor.choices
        if choices and option.param_type_name == "option":
            line = refused(tmp_path, program, command, *required_arguments(program, command), option.opts[0], "magic")
            assert option.opts[0] in line
            assert all(repr(choice) in line for choice in choices)


@pytest.mark.parametrize(
    ("command", "name", "build"),
    [
        (("pipeline", "encode"), "geometry", EncodeConfig),
        (("pipeline", "encode"), "dtype", EncodeConfig),
        (("pipeline", "encode"), "dedup", Filters),
        (("pipeline", "build-index"), "index_type", BuildConfig),
        *((("trainer", "fit"), name, FitConfig) for name in ("objective", "coupling", "network", "size", "search")),
        *((("trainer", "fit"), name, FitConfig) for name in ("condition", "dtype", "preset")),
        (("trainer", "fit-autoencoder"), "size", ImageAutoencoderConfig),
    ],
    ids=str,
)
def test_choices_are_those_of_the_library(command, name, build):
    needed = (
        {"shards": (), "image_encoder": "a", "text_encoder": "b", "image_size": 32} if build is EncodeConfig else {}
    )
    with pytest.raises(CoalescerError) as error:
        build(**needed, **{name: "magic"})
    allowed = re.search(r"one of (.*)$", str(error.value)).group(1)
    (option,) = (option for option in parameters(*command) if option.name == name)
    # The command line alone resolves `auto` of encode.
    assert sorted(set(option.type_descriptor.choices) - ({"auto"} - set(allowed.split(", ")))) == sorted(
        allowed.split(", ")
    )


def test_choices_are_completed():
    environment = {"_TRAINER_COMPLETE": "complete_bash", "COMP_WORDS": "trainer fit --search ", "COMP_CWORD": "3"}
    assert call("trainer", **environment).stdout.split() == ["ann", "exact"]


# What is refused.


@pytest.mark.slow
def test_a_mistake_ends_the_real_script_alike(tmp_path):
    done = call("pipeline", "inspect", "none.lance", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines()[-1].startswith("error: no table at none.lance")


def test_usage_errors_are_one_line(refused, tmp_path):
    assert "SOURCE" in refused(tmp_path, "pipeline", "encode")
    assert "`pipeline encode --help`" in refused(tmp_path, "pipeline", "encode")
    assert "--workers" in refused(tmp_path, "pipeline", "encode", "a", "--workers", "2")
    assert "'sound'" in refused(tmp_path, "trainer", "fit-autoencoder", "sound", "a", "--out", "a")
    assert "'two'" in refused(tmp_path, "trainer", "evaluate", "nowhere", "--num-inference-steps", "two")
    assert "'much'" in refused(tmp_path, "pipeline", "build-index", "x.lance", "--desc-scale", "much")
    assert "--set 'p'" in refused(tmp_path, "trainer", "fit", "x.lance", "--out", "a", "--set", "p")


def test_mistakes_end_in_one_line_and_exit_code_2(refused, tmp_path, shapes, encoded, image_encoder, text_encoder):
    encoders = ["--image-encoder", image_encoder, "--text-encoder", text_encoder, "--image-size", "32"]
    encode = ["pipeline", "encode", shapes, "--table", "t.lance"]
    assert "no shards at 'none'" in refused(tmp_path, "pipeline", "encode", "none", "--table", "t.lance", *encoders)
    assert "--desc-scale 0.5" in refused(tmp_path, *encode, *encoders, "--desc-scale", "0.5")
    assert "DB/NAME.lance" in refused(tmp_path, "pipeline", "encode", shapes, "--table", "t", *encoders)
    wrong = ["--image-encoder", "nowhere", *encoders[2:]]
    assert "no folder nowhere" in refused(tmp_path, *encode, *wrong)
    assert "no table at none.lance" in refused(tmp_path, "pipeline", "build-index", "none.lance")
    assert "no table at none.lance" in refused(tmp_path, "pipeline", "inspect", "none.lance")
    assert "build-index" in refused(tmp_path, "trainer", "fit", encoded.uri, "--out", "run")
    assert "nowhere is not a run" in refused(tmp_path, "trainer", "sample", "nowhere", "a circle", "--out", "a.png")
    assert "ends in .png" in refused(tmp_path, "trainer", "sample", "nowhere", "a circle", "--out", "a.gif")
    for kind in ("image", "text"):
        assert "no shards at" in refused(tmp_path, "trainer", "fit-autoencoder", kind, "none", "--out", "a")
    assert "--image-size 33" in refused(
        tmp_path, "trainer", "fit-autoencoder", "image", shapes, "--out", "a", "--image-size", "33"
    )
    assert "--num-samples 3 is out of range: use 8 or more" in refused(
        tmp_path, "trainer", "evaluate", "nowhere", "--num-samples", "3"
    )


def test_ctrl_c_ends_a_command_quietly(tmp_path):
    # Background jobs ignore SIGINT, and so would what they start.
    reset = "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); os.execv(sys.argv[1], sys.argv[1:])"
    command = [BIN / "pipeline", "demo-data", tmp_path / "shapes", "--num-samples", "1000000"]
    argv = [sys.executable, "-c", reset, *map(str, command)]
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stderr.readline().startswith("pipeline demo-data: ")
    while not list(tmp_path.glob("shapes/*.tar*")):
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60) == ("", "")
    assert process.returncode == 130


# The whole line.


@pytest.mark.slow
def test_the_whole_line_by_its_commands(refused, tmp_path, shapes, image_encoder, text_encoder):
    encoders = ["--image-encoder", image_encoder, "--text-encoder", text_encoder, "--image-size", "32"]
    encode = ["pipeline", "encode", shapes, "--table", "[db]/shapes.lance", *encoders, "--val-fraction", "0.2"]
    fit = ["trainer", "fit", "[db]/shapes.lance", "--size", "tiny", "--images", "640", "--batch-size", "32"]

    def run(*argv, **environment):
        done = call(*argv, cwd=tmp_path, **environment)
        assert done.returncode == 0, done.stderr
        return done

    def as_json(*argv):
        return json.loads(run(*argv, "--json").stdout)

    assert as_json(*encode[:8], *encode[8:], "--dry-run")["latent_shape"] == [2, 4, 4]
    options = ["--json", "--", "--job_name=shapes"]
    assert json.loads(run(*encode, *options).stdout)["rows"] == 360
    again = run(*encode, COLUMNS="20")
    assert "nothing to do" in again.stdout
    assert as_json("pipeline", "build-index", "[db]/shapes.lance", "--index-type", "ivf_flat")["train_rows"] > 0
    shown = run("pipeline", "inspect", "[db]/shapes.lance")
    assert "[db]/shapes.lance" in shown.stdout
    shown = as_json("pipeline", "inspect", "[db]/shapes.lance")
    assert (shown["rows"], shown["indexed"]) == (360, True)
    assert "ivf_flat" in shown.values()

    assert as_json(*fit, "--out", "a")["images"] == 640
    run(*fit, "--out", "b", "--objective", "flow_matching", "--coupling", "independent", NO_COLOR="1")
    sample = ["trainer", "sample", "a", "a small [red] circle", "a large blue square", "--out", "images/s.png"]
    sampled = as_json(*sample, "--num-images-per-prompt", "3")
    assert [image["caption"] for image in sampled["images"]] == [sample[3]] * 3 + [sample[4]] * 3
    with Image.open(tmp_path / "images" / "s.png") as grid:
        assert grid.width < grid.height * 3  # one row for each caption
    evaluate = ["trainer", "evaluate", "a", "--num-inference-steps", "1,2", "--num-samples", "64"]
    assert list(as_json(*evaluate)["metrics"]) == ["1", "2"]
    assert str(Path("a", "report", "index.html")) in run(*evaluate, COLUMNS="20").stdout
    compare = ["trainer", "compare", "a", "b", "--out", "both", "--num-inference-steps", "2", "--num-samples", "64"]
    assert len(as_json(*compare, "--caption", "a small [red] circle")["groups"]) == 2
    # One grid of held-out captions and one of the user's caption; nothing comes from the network.
    page = (tmp_path / "both" / "index.html").read_text()
    assert page.count("data:image/png;base64,") == 2
    assert 'src="http' not in page

    other = tmp_path / "other"
    other.mkdir()
    line = refused(other, *encode[:4], tmp_path / "[db]" / "shapes.lance", *encoders)
    assert "--val-fraction: 0.2, now 0.05" in line


def test_demo_data_and_autoencoders_by_their_commands(main, tmp_path):
    code, out, _ = main(
        "pipeline", "demo-data", "shapes", "--num-samples", 40, "--image-size", 16, "--json", cwd=tmp_path
    )
    assert (code, json.loads(out)["num_samples"]) == (0, 40)
    for kind, options in (("image", ["--image-size", 16, "--latent-size", 4, "--latent-channels", 3]), ("text", [])):
        argv = ["fit-autoencoder", kind, "shapes", "--out", kind, "--steps", 2, "--batch-size", 4, "--limit", 30]
        code, out, _ = main("trainer", *argv, *options, "--json", cwd=tmp_path)
        assert code == 0
        assert json.loads(out) == json.loads((tmp_path / kind / "report.json").read_text())
        if kind == "image":
            assert json.loads(out)["latent_shape"] == [3, 4, 4]


def test_json_is_written_aside_and_renamed(tmp_path):
    write_json(tmp_path / "a" / "b.json", {"x": "é"})
    assert json.loads((tmp_path / "a" / "b.json").read_text()) == {"x": "é"}
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b.json"]
