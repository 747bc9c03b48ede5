"""Ctrl-C and SIGTERM end every command quietly with 130 and 143, and leave what the next run resumes."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from index.table.table import open_table
from pipeline.demo.shapes import write_demo_data

pytestmark = pytest.mark.slow

SAMPLES, SHARDS = 2000, 40
COMMAND = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs ignore it
from {}.cli import main
main()
"""
SIGNALS = [(signal.SIGINT, 130), (signal.SIGTERM, 143)]


class Command:
    """A command in a process group of its own, with a folder for its temporary files."""

    def __init__(self, folder: Path, *argv: object) -> None:
        self.temporary = folder / "tmp"
        self.temporary.mkdir(exist_ok=True)
        program, *arguments = map(str, argv)
        self.process = subprocess.Popen(
            [sys.executable, "-c", COMMAND.format(program), *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=folder,
            env={**os.environ, "TMPDIR": str(self.temporary), "OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )

    def wait_for(self, condition) -> None:
        while not condition():
            assert self.process.poll() is None, self.process.communicate()
            time.sleep(0.05)

    def stop(self, number: int, *, group: bool = False) -> tuple[int, str, str]:
        """Send a signal and return the exit code and what was printed, once no process of the command is left."""
        children = psutil.Process(self.process.pid).children(recursive=True)
        (os.killpg if group else os.kill)(self.process.pid, number)
        output, errors = self.process.communicate(timeout=60)
        _, alive = psutil.wait_procs(children, timeout=10)
        assert not alive, [process.cmdline() for process in alive]
        assert not list(self.temporary.glob("beam-*")), "logs were left"
        return self.process.returncode, output, errors


@pytest.fixture(scope="module")
def many_shapes(tmp_path_factory) -> Path:
    """A source that is long enough for a signal in the middle."""
    out = tmp_path_factory.mktemp("many_shapes")
    write_demo_data(out, num_samples=SAMPLES, image_size=32, seed=1, samples_per_shard=SAMPLES // SHARDS)
    return out


@pytest.mark.parametrize(
    ("number", "code", "num_workers", "group"),
    [
        (signal.SIGINT, 130, 1, False),
        (signal.SIGINT, 130, 2, True),  # Ctrl-C on a terminal
        (signal.SIGINT, 130, 2, False),
        (signal.SIGTERM, 143, 1, False),
        (signal.SIGTERM, 143, 2, False),
    ],
)
def test_encode_ends_and_resumes(many_shapes, image_encoder, text_encoder, tmp_path, number, code, num_workers, group):
    argv = ["pipeline", "encode", many_shapes, "--table", "t.lance", "--image-size", 32, "--batch-size", 8]
    argv += ["--image-encoder", image_encoder, "--text-encoder", text_encoder, "--num-workers", num_workers]
    command = Command(tmp_path, *argv)
    command.wait_for(lambda: len(list(tmp_path.glob("t.encode/**/*.json"))) >= 4)
    status = "pipeline encode: listing the shards and loading the encoders\n"
    assert command.stop(number, group=group) == (code, "", status)
    again = Command(tmp_path, *argv).process
    _, errors = again.communicate(timeout=300)
    assert again.returncode == 0, errors
    ids = open_table(tmp_path / "t.lance").column("id", split=None)
    assert len(ids) == len(set(ids)) == SAMPLES


@pytest.mark.parametrize(("number", "code"), SIGNALS)
def test_build_index_ends_and_is_built_again(encoded, tmp_path, number, code):
    table = shutil.copytree(encoded.uri, tmp_path / "t.lance")
    argv = ["pipeline", "build-index", table, "--index-type", "ivf_rq", "--desc-scale", 3, "--num-workers", 2]
    command = Command(tmp_path, *argv)
    command.wait_for(lambda: (tmp_path / "t.plan.json").exists())
    returned, output, errors = command.stop(number)
    assert (returned, output) == (code, "")
    assert "error" not in errors
    assert "Traceback" not in errors
    assert not (tmp_path / "t.plan.json").exists()
    again = Command(tmp_path, *argv).process
    _, errors = again.communicate(timeout=300)
    assert again.returncode == 0, errors
    assert open_table(table, indexed=True).meta.index is not None


def test_build_index_whose_worker_dies_is_one_line_and_is_built_again(encoded, tmp_path):
    table = shutil.copytree(encoded.uri, tmp_path / "t.lance")
    argv = ["pipeline", "build-index", table, "--index-type", "ivf_rq", "--num-workers", 2]
    command = Command(tmp_path, *argv)

    def workers():
        with contextlib.suppress(psutil.Error):
            children = psutil.Process(command.process.pid).children(recursive=True)
            return [child for child in children if "sdk_worker_main" in " ".join(child.cmdline())]
        return []

    command.wait_for(workers)
    workers()[-1].kill()
    _, errors = command.process.communicate(timeout=300)
    assert command.process.returncode == 2, errors
    line = errors.splitlines()[-1]
    assert line.startswith(f"error: {table} is not finished: a worker process died")
    assert "rerun the same command to resume, with fewer --num-workers" in line
    assert "Traceback" not in errors
    again = Command(tmp_path, *argv).process
    _, errors = again.communicate(timeout=300)
    assert again.returncode == 0, errors


@pytest.mark.parametrize(("number", "code"), SIGNALS)
def test_fit_and_evaluate_end_quietly(indexed, tmp_path, number, code):
    argv = ["trainer", "fit", indexed.uri, "--out", "run", "--size", "tiny", "--batch-size", 32]
    command = Command(tmp_path, *argv, "--images", 10_000_000, "--checkpoint-seconds", 0.5)
    command.wait_for(lambda: list(tmp_path.glob("run/checkpoints/step-*")))
    returned, output, errors = command.stop(number)
    assert (returned, output) == (code, "")
    assert errors == f"trainer fit: opening {indexed.uri}\n"
    shutil.rmtree(tmp_path / "run")
    trained = Command(tmp_path, *argv, "--images", 640).process
    _, errors = trained.communicate(timeout=300)
    assert trained.returncode == 0, errors
    command = Command(tmp_path, "trainer", "evaluate", "run", "--out", "report", "--num-inference-steps", 64)
    command.wait_for(lambda: (tmp_path / "report" / "log.jsonl").exists())
    returned, output, errors = command.stop(number)
    assert (returned, output) == (code, "")
    assert "Traceback" not in errors
