"""Numeric options of every command: their ranges, checked before anything is read; `--out`, devices, and secrets."""

import base64
import bz2
import dataclasses
import math
import os
import pickle
import re
import subprocess
import sys
import zlib
from pathlib import Path
from typing import get_type_hints

import pytest
import typer

import pipeline.cli
import trainer.cli
from index.build.build_index import BuildConfig
from index.errors import OptionError
from index.options import check_file, check_folder
from index.ranges import COUNT, FRACTION, POSITIVE, Range, check_ranges, ranges_of
from index.table.storage import Storage
from pipeline.config import EncodeConfig, RuntimeConfig
from trainer.autoencoders.image import ImageAutoencoderConfig
from trainer.autoencoders.text import TextAutoencoderConfig
from trainer.config import FitConfig
from trainer.config import RuntimeConfig as FitRuntimeConfig
from trainer.evaluation.protocol import EvaluationConfig

PROGRAMS = {
    name: typer.main.get_command(module.app) for name, module in (("pipeline", pipeline.cli), ("trainer", trainer.cli))
}
MAINS = {"pipeline": pipeline.cli.main, "trainer": trainer.cli.main}


def numeric_options() -> list:
    """Return program, command, option and range of every option that takes a number, or several."""
    found = []
    for program, group in PROGRAMS.items():
        for name, command in group.commands.items():
            ranges = dict(ranges_of(command.callback))
            for option in command.params:
                number = option.type_descriptor.annotation in (int, float) or option.name in ranges
                if number and option.param_type_name == "option":
                    found.append((program, name, option, ranges.get(option.name)))
    return found


NUMERIC = numeric_options()
every_numeric_option = pytest.mark.parametrize(
    ("program", "command", "option", "allowed"), NUMERIC, ids=[f"{p}-{c}{o.opts[0]}" for p, c, o, _ in NUMERIC]
)


def outside(allowed: Range) -> list[str]:
    values = ["nan", "inf", "-inf", "-1e400", "some", ""]
    values.append(f"{allowed.least:g}" if allowed.above else f"{allowed.least - 1:g}")
    if allowed.most < math.inf:
        values.append(str(int(allowed.most) + 1))
    return values


def needed(program: str, command: str) -> list[str]:
    argv = [*{"fit-autoencoder": ["image"], "sample": ["nowhere"], "plan": ["1000"]}.get(command, [])]
    argv += [] if command == "plan" else ["nowhere"]
    for option in PROGRAMS[program].commands[command].params:
        if option.param_type_name == "option" and option.required:
            argv += [option.opts[0], "made/none.png" if command == "sample" else "made/none.lance"]
    return argv


@pytest.fixture
def refused(tmp_path, monkeypatch, capsys):
    """A function that expects exit code 2, one line of error and nothing written, and returns the line."""

    def run(program: str, *argv: str) -> str:
        monkeypatch.chdir(tmp_path)
        before = sorted(tmp_path.rglob("*"))
        monkeypatch.setattr(sys, "argv", [program, *argv])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            MAINS[program]()
        out, err = capsys.readouterr()
        *status, line = err.splitlines()
        assert (ended.value.code, out) == (2, ""), err
        assert line.startswith("error: "), err
        assert all(each.startswith(f"{program} {argv[0]}: ") for each in status), err
        assert sorted(tmp_path.rglob("*")) == before, "something was written"
        return line

    return run


@every_numeric_option
def test_a_number_out_of_range_is_refused_before_anything_is_read(refused, program, command, option, allowed):
    assert allowed is not None, "annotate it with a range"
    flag = option.opts[0]
    assert option.default is None or isinstance(option.default, str) or option.default in allowed
    for value in outside(allowed):
        # No status line: the command has not even begun.
        line = refused(program, command, *needed(program, command), f"{flag}={value}")
        if option.name == "desc_scale" and command == "build-index" and value in ("some", ""):
            assert flag in line
            continue  # a number or auto
        assert line.startswith(f"error: {flag} "), line
        assert str(allowed) in line, line
        if value not in ("", "-1e400"):
            assert value.removeprefix("+") in line, line


def test_numbers_at_the_ends_of_ranges_are_parsed():
    for program, command, option, allowed in NUMERIC:
        values = [f"{allowed.least + 1 if allowed.above and allowed.most > 1 else max(allowed.least, 1):g}"]
        values += [str(int(allowed.most))] if allowed.most < math.inf else []
        for value in values:
            argv = [*needed(program, command), f"{option.opts[0]}={value}"]
            PROGRAMS[program].commands[command].make_context(command, argv)


@pytest.mark.parametrize(
    "config",
    [
        EncodeConfig(shards=(), image_encoder="a", text_encoder="b", image_size=32),
        RuntimeConfig(),
        BuildConfig(),
        FitConfig(),
        FitRuntimeConfig(),
        ImageAutoencoderConfig(),
        TextAutoencoderConfig(),
        EvaluationConfig(num_inference_steps=[1]),
    ],
    ids=lambda config: type(config).__module__ + type(config).__name__,
)
def test_configs_refuse_the_same(config):
    ranges = dict(ranges_of(type(config)))
    numbers = [each.name for each in dataclasses.fields(config) if type(getattr(config, each.name)) in (int, float)]
    assert set(numbers) - {"desc_scale"} <= set(ranges), "annotate it with a range"
    for name, allowed in ranges.items():
        hint = get_type_hints(type(config))[name]
        if hint is int or int in getattr(hint, "__args__", ()):
            values = [allowed.least - 1, *([allowed.most + 1] if allowed.most < math.inf else [])]
        else:
            values = [float(allowed.least - 1), math.nan, math.inf]
        for value in values:
            changed = [value] if isinstance(getattr(config, name), list) else value
            with pytest.raises(OptionError, match=f"^--{name.replace('_', '-')} .* is out of range: use "):
                dataclasses.replace(config, **{name: changed})


def test_ranges_in_words():
    assert [str(each) for each in (COUNT, FRACTION, POSITIVE, Range(0, 1, above=True))] == [
        "1 or more",
        "a number from 0 to 1",
        "a number above 0",
        "a number above 0 and at most 1",
    ]
    with pytest.raises(OptionError, match=r"^--n 4294967296 is out of range: use 1 or more, at most 2147483647$"):
        COUNT.check("--n", 2**32)
    with pytest.raises(OptionError, match=r"^--n '' is out of range"):
        COUNT.check("--n", [])
    COUNT.check("--n", None)
    check_ranges(FitConfig())


# Where a command writes, and on which device.

OUT = [
    *(("trainer", "fit", ["nowhere.lance"]), ("trainer", "evaluate", ["nowhere"]), ("trainer", "compare", ["nowhere"])),
    *(("trainer", "fit-autoencoder", ["image", "nowhere"]), ("trainer", "fit-autoencoder", ["text", "nowhere"])),
]


@pytest.mark.parametrize(("program", "command", "argv"), OUT, ids=[f"{c}-{a[0]}" for _, c, a in OUT])
def test_out_must_be_a_folder_that_can_be_written(refused, tmp_path, program, command, argv):
    (tmp_path / "file").write_text("mine")
    assert "--out file is a file" in refused(program, command, *argv, "--out", "file")
    line = refused(program, command, *argv, "--out", "file/below")
    assert "--out file/below" in line
    assert "is a file" in line
    assert (tmp_path / "file").read_text() == "mine"
    long = "x" * 300
    assert f"--out {long} cannot be written" in refused(program, command, *argv, "--out", long)


def test_demo_data_and_sample_check_where_they_write(refused, tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "a.png").mkdir()
    assert "is a file" in refused("pipeline", "demo-data", "file")
    assert "is a folder" in refused("trainer", "sample", "nowhere", "a cat", "--out", "a.png")
    assert "is a file" in refused("trainer", "sample", "nowhere", "a cat", "--out", "file/a.png")


def test_a_read_only_folder_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("os.access", lambda path, mode: False)  # root may write anywhere
    for check in (check_folder, check_file):
        with pytest.raises(OptionError, match=r"is read-only: use another folder$"):
            check(tmp_path / "a" / "b")


DEVICES = [
    (program, name)
    for program, group in PROGRAMS.items()
    for name, command in group.commands.items()
    if any(option.name == "device" for option in command.params)
]


@pytest.mark.parametrize(("program", "command"), DEVICES)
@pytest.mark.parametrize("device", ["nope", "cuda:99", "cpu:x", ""])
def test_a_device_that_does_not_exist_is_refused(refused, program, command, device):
    line = refused(program, command, *needed(program, command), f"--device={device}")
    assert line.startswith(f"error: --device {device}".rstrip())
    assert line.endswith(": use auto, cpu, cuda, cuda:N or mps")


# Secrets.

SECRET = "wJalrXUtnFEMI/K7MDENG+planted"


def test_secrets_are_not_shown_and_not_pickled():
    storage = Storage.of([f"aws_secret_access_key={SECRET}", f"azure_storage_sas_token={SECRET}", "region=eu"])
    runtime = RuntimeConfig(storage=storage)
    assert "planted" not in repr(storage) + str(storage) + repr(runtime)
    assert b"planted" not in pickle.dumps(runtime)
    assert pickle.loads(pickle.dumps(runtime)).storage == storage


def test_local_workers_inherit_secrets_and_others_are_told_what_to_set(tmp_path):
    storage = Storage.of([f"aws_secret_access_key={SECRET}"])
    path = tmp_path / "storage.pickle"
    path.write_bytes(pickle.dumps(storage))
    code = f"import pickle; print(dict(pickle.load(open({str(path)!r}, 'rb')).options)['aws_secret_access_key'])"
    environments = (None, {"PATH": "", "AWS_SECRET_ACCESS_KEY": "own"}, {"PATH": ""})
    inherited, usual, none = (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=each, cwd=tmp_path.cwd())
        for each in environments
    )
    assert inherited.stdout.strip() == SECRET
    assert usual.stdout.strip() == "own"
    assert re.search(r"lacks the secret --storage-option aws_secret_access_key.*set AWS_SECRET_ACCESS_KEY", none.stderr)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("aws_regoin=eu-west-1", r"'aws_regoin' is unknown: did you mean aws_region\? use one of aws_access_key_id, "),
        ("azure_storage_acount_key=x", r"did you mean azure_storage_account_key\? use one of azure_storage_account"),
        (f"{SECRET}=", r"\(not shown\) is unknown"),
        (SECRET, r"\(not shown\) is not of the form name=value: for instance aws_region=eu-west-1"),
        ("region", "'region' is not of the form name=value"),
        ("=x", "is not of the form name=value"),
    ],
)
def test_unknown_storage_options_are_refused_without_their_value(option, message):
    with pytest.raises(OptionError, match=message) as caught:
        Storage.of([option])
    assert "planted" not in str(caught.value)


def test_storage_options_are_checked_by_every_command_that_takes_them(refused):
    taking = [
        (program, name)
        for program, group in PROGRAMS.items()
        for name, command in group.commands.items()
        if any(option.name == "storage_option" for option in command.params)
    ]
    assert {name for _, name in taking} >= {"encode", "build-index", "inspect", "fit", "fit-autoencoder", "evaluate"}
    for program, command in taking:
        line = refused(program, command, *needed(program, command), "--storage-option", "aws_regoin=x")
        assert "--storage-option 'aws_regoin' is unknown: did you mean aws_region?" in line


@pytest.mark.slow
def test_a_secret_is_in_no_output_report_log_or_graph(tmp_path, shapes, image_encoder, text_encoder, monkeypatch):
    """With the real script and worker processes: a run that succeeds, and one whose workers end in a traceback."""
    folders = {"TMPDIR": str(tmp_path / "tmp")}
    (tmp_path / "tmp").mkdir()
    secret = ["--storage-option", f"aws_secret_access_key={SECRET}", "--storage-option", "aws_access_key_id=key"]
    argv = ["pipeline", "encode", shapes, "--table", "t.lance", "--image-size", "32", "--num-workers", "2", *secret]
    argv = [*argv, "--image-encoder", image_encoder, "--text-encoder", text_encoder]
    script = Path(sys.executable).parent
    bug = "import pipeline.encode.shard as s; s.decode_image = None; from pipeline.cli import main; main()"
    for command in ([script / "pipeline"], [sys.executable, "-c", bug]):
        arguments = [*command, *argv[1:]]
        if command[0] == sys.executable:
            arguments[arguments.index("t.lance")] = "u.lance"
            arguments[arguments.index("2")] = "1"
        environment = {**os.environ, **folders}
        done = subprocess.run(list(map(str, arguments)), capture_output=True, text=True, cwd=tmp_path, env=environment)
        assert done.returncode == (0 if command[0] != sys.executable else 1), done.stderr
        assert ("Traceback" in done.stderr) == (command[0] == sys.executable)
        assert "planted" not in done.stdout + done.stderr
    read = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert len(read) > 10
    assert not any(b"planted" in content for content in read)


def test_a_secret_is_in_no_job_graph(tmp_path, shapes, encode_shapes, monkeypatch):
    """Neither as it is nor as Beam packs it."""
    import apache_beam as beam

    from pipeline.encode.graph import EncodeToFragments
    from pipeline.encode.job import EncodeJob

    jobs = []
    create = EncodeJob.create
    monkeypatch.setattr(EncodeJob, "create", lambda *given: jobs.append(create(*given)) or jobs[0])
    storage = Storage.of([f"aws_secret_access_key={SECRET}"])
    encode_shapes(shapes, tmp_path / "t.lance", dry_run=True, storage=storage)
    assert dict(jobs[0].runtime.storage.options)["aws_secret_access_key"] == SECRET
    assert "planted" not in repr(jobs[0])
    graph = beam.Pipeline()
    graph | beam.Create(list(map(str, shapes.glob("*.tar")))) | EncodeToFragments(jobs[0])
    proto = graph.to_runner_api()
    payloads = [each.spec.payload for each in proto.components.transforms.values()] + [proto.SerializeToString()]
    for payload in payloads:
        unpacked = [payload]
        for text in re.findall(rb"[A-Za-z0-9+/=_-]{40,}", payload):
            for unpack in (bz2.decompress, zlib.decompress, bytes):
                try:
                    unpacked.append(unpack(base64.b64decode(text)))
                except (OSError, ValueError, zlib.error):
                    continue
        assert not any(b"planted" in each for each in unpacked)
    assert any(b"EncodeJob" in payload or len(payload) > 200 for payload in payloads)
