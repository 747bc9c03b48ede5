"""Beam runners other than the local one, each with services in processes of their own, write the same table."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from index.table.table import Table, open_table

pytestmark = pytest.mark.slow

BIN = Path(sys.executable).parent
# A job server starts its workers as `python`. One thread each, so that sums are added in the same order.
ENVIRONMENT = {**os.environ, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
DASK = "apache_beam.runners.dask.dask_runner.DaskRunner"


@contextlib.contextmanager
def service(log: Path, *argv: object) -> Iterator[subprocess.Popen]:
    """Run a process and its children while the block runs; its output goes to `log`."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, *map(str, argv)],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            cwd=log.parent,
            env=ENVIRONMENT,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        _stop(process)


def _stop(process: subprocess.Popen) -> None:
    for signal_number in (signal.SIGTERM, signal.SIGKILL):  # the second is for workers that outlive their pool
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal_number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(10)


def wait_for(process: subprocess.Popen, file: Path, pattern: str, *, timeout: float = 60) -> str:
    """Return the first group of `pattern` as soon as it matches a file that the process writes."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        if file.exists() and (match := re.search(pattern, file.read_text())):
            return match[1]
        if process.poll() is not None:
            break
        time.sleep(0.1)
    logs = "\n".join(path.read_text() for path in file.parent.glob("*.log"))
    raise AssertionError(f"no {pattern!r} in {file}; exit code {process.poll()}; all logs:\n{logs}")


@pytest.fixture(scope="module")
def job_service(tmp_path_factory) -> Iterator[str]:
    """The address of a running Beam job service."""
    folder = tmp_path_factory.mktemp("job_service")
    argv = ("-m", "apache_beam.runners.portability.local_job_service_main", "--port_file", folder / "port")
    with service(folder / "service.log", *argv) as process:
        yield "localhost:" + wait_for(process, folder / "port", r"^(\d+)$")


@pytest.fixture
def worker_pool(tmp_path) -> Iterator[str]:
    """The address of a running Beam worker pool, which starts a process for each worker."""
    log = tmp_path / "pool.log"
    with service(log, "-m", "apache_beam.runners.worker.worker_pool_main", "--service_port=0") as process:
        yield wait_for(process, log, r"servicer at port: (\S+)")
    assert "Starting worker with command" in log.read_text()


@pytest.fixture
def dask_client(tmp_path):
    """A client of a Dask scheduler with two single-threaded workers."""
    distributed = pytest.importorskip("distributed", reason="Dask is not installed: pip install dask distributed")
    file = tmp_path / "scheduler.json"
    listen = ("--host", "127.0.0.1", "--port", "0", "--no-dashboard", "--scheduler-file", file)
    worker_options = ("--nthreads", "1", "--no-nanny", "--no-dashboard", "--local-directory", tmp_path)
    with contextlib.ExitStack() as stack:
        scheduler = stack.enter_context(
            service(tmp_path / "scheduler.log", "-m", "distributed.cli.dask_scheduler", *listen)
        )
        address = wait_for(scheduler, file, r'"address": "(tcp://[^"]+)"')
        for name in ("one", "two"):
            argv = ("-m", "distributed.cli.dask_worker", address, "--name", name, *worker_options)
            stack.enter_context(service(tmp_path / f"{name}.log", *argv))
        client = stack.enter_context(distributed.Client(address, set_as_default=False))
        client.wait_for_workers(2, timeout=60)
        yield client


@pytest.fixture
def encode_on(shapes, image_encoder, text_encoder, tmp_path):
    """A function that runs `pipeline encode` with a Beam runner and returns the table."""

    def run(runner: str, *beam_options: str) -> Table:
        argv = [BIN / "pipeline", "encode", shapes, "--table", "engine.lance", "--runner", runner]
        argv += ["--image-encoder", image_encoder, "--text-encoder", text_encoder, "--image-size", 32]
        argv += ["--val-fraction", 0.2, "--keep-images", "--batch-size", 32, "--", *beam_options]
        result = subprocess.run(
            list(map(str, argv)),
            capture_output=True,
            text=True,
            cwd=tmp_path,
            stdin=subprocess.DEVNULL,
            env=ENVIRONMENT,
            timeout=120,
        )
        assert result.returncode == 0, result.stderr
        assert not list(tmp_path.glob("*.encode")), "checkpoints were not deleted"
        return open_table(tmp_path / "engine.lance")

    return run


def test_a_job_service_with_the_worker_in_the_command_itself(encoded, content, encode_on, job_service):
    table = encode_on("PortableRunner", f"--job_endpoint={job_service}", "--environment_type=LOOPBACK")
    assert content(table) == content(encoded)


def test_a_job_service_with_a_worker_in_a_process_of_its_own(encoded, content, encode_on, job_service, worker_pool):
    environment = ("--environment_type=EXTERNAL", f"--environment_config={worker_pool}")
    table = encode_on("PortableRunner", f"--job_endpoint={job_service}", *environment)
    assert content(table) == content(encoded)


def test_dask_with_two_workers(encoded, content, encode_on, dask_client):
    address = dask_client.scheduler.address
    table = encode_on(DASK, f"--dask_client_address={address}", "--dask_partition_size=1")
    assert content(table) == content(encoded)

    def has_loaded_encoders() -> bool:
        return "diffusers" in sys.modules

    assert list(dask_client.run(has_loaded_encoders).values()) == [True, True]
