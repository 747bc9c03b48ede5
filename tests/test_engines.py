"""Beam runners other than the local one, each with services in processes of their own, write the same table.

An engine that dies ends the command in one line with exit code 2, and the same command again finishes the table.
"""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import lance
import psutil
import pytest
from synthetic_tables import random_table

from index.table.storage import Storage
from index.table.table import Table, open_table
from pipeline.beam.layout import Layout
from pipeline.demo.shapes import write_demo_data

pytestmark = pytest.mark.slow

BIN = Path(sys.executable).parent
# A job server starts its workers as `python`. One thread each, so that sums are added in the same order.
ENVIRONMENT = {**os.environ, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
DASK = "apache_beam.runners.dask.dask_runner.DaskRunner"
PRISM = Path(os.environ.get("PRISM", Path(__file__).parents[2] / "shared" / "bin" / "prism"))
SAMPLES, SHARDS = 2000, 40
"""Of a source that is long enough for a kill in the middle."""


@dataclass
class Engine:
    """A running engine, and what `pipeline encode` needs to use it."""

    options: list[str]
    service: subprocess.Popen
    worker: Callable[[], psutil.Process]
    """Returns a process that does the work."""


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


@dataclass
class Dask:
    """A Dask scheduler with two single-threaded workers."""

    scheduler: subprocess.Popen
    address: str
    client: object
    workers: list[subprocess.Popen]


@pytest.fixture
def dask(tmp_path) -> Iterator[Dask]:
    """A Dask scheduler with two single-threaded workers, and a client of it."""
    distributed = pytest.importorskip("distributed", reason="Dask is not installed: pip install dask distributed")
    file = tmp_path / "scheduler.json"
    listen = ("--host", "127.0.0.1", "--port", "0", "--no-dashboard", "--scheduler-file", file)
    worker_options = ("--nthreads", "1", "--no-nanny", "--no-dashboard", "--local-directory", tmp_path)
    with contextlib.ExitStack() as stack:
        scheduler = stack.enter_context(
            service(tmp_path / "scheduler.log", "-m", "distributed.cli.dask_scheduler", *listen)
        )
        address = wait_for(scheduler, file, r'"address": "(tcp://[^"]+)"')
        workers = []
        for name in ("one", "two"):
            argv = ("-m", "distributed.cli.dask_worker", address, "--name", name, *worker_options)
            workers.append(stack.enter_context(service(tmp_path / f"{name}.log", *argv)))
        client = stack.enter_context(distributed.Client(address, set_as_default=False))
        client.wait_for_workers(2, timeout=60)
        yield Dask(scheduler, address, client, workers)


@pytest.fixture
def start_encode(image_encoder, text_encoder, tmp_path):
    """A function that starts `pipeline encode` of a source into engine.lance."""

    def start(source: Path, *options: str) -> subprocess.Popen:
        argv = [BIN / "pipeline", "encode", source, "--table", "engine.lance", "--image-size", 32, "--batch-size", 32]
        argv += ["--image-encoder", image_encoder, "--text-encoder", text_encoder]
        argv += ["--val-fraction", 0.2, "--keep-images", *options]
        return subprocess.Popen(
            list(map(str, argv)),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=tmp_path,
            stdin=subprocess.DEVNULL,
            env=ENVIRONMENT,
        )

    return start


@pytest.fixture
def encode_on(shapes, start_encode, tmp_path):
    """A function that runs `pipeline encode` with a Beam runner and returns the table."""

    def run(runner: str, *beam_options: str) -> Table:
        process = start_encode(shapes, "--runner", runner, "--", *beam_options)
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
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


def test_dask_with_two_workers(encoded, content, encode_on, dask):
    table = encode_on(DASK, f"--dask_client_address={dask.address}", "--dask_partition_size=1")
    assert content(table) == content(encoded)

    def has_loaded_encoders() -> bool:
        return "diffusers" in sys.modules

    assert list(dask.client.run(has_loaded_encoders).values()) == [True, True]


# Transforms on Dask, whose Beam runner drops what `finish_bundle` emits and does nothing at `Reshuffle`.


def run_on_dask(dask: Dask, code: str, *arguments: object) -> str:
    """Run `build(pipeline, *arguments)` of `code` in a process of its own, as functions of tests are not importable."""
    program = f"""{code}
import json, sys
import apache_beam as beam
from apache_beam.options.pipeline_options import PipelineOptions
options = ["--runner={DASK}", "--dask_client_address={dask.address}", "--dask_npartitions=8"]
pipeline = beam.Pipeline(options=PipelineOptions(options))
build(pipeline, *json.loads(sys.argv[1]))
pipeline.run().wait_until_finish()
"""
    argv = [sys.executable, "-c", program, json.dumps(list(map(str, arguments)))]
    done = subprocess.run(argv, capture_output=True, text=True, env=ENVIRONMENT, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("batches", [0, 1, 8, 50])
def test_write_lance_commits_all_rows_on_dask(dask, tmp_path, batches):
    code = """
def build(pipeline, uri, batches):
    import apache_beam as beam
    import pyarrow as pa
    from pipeline.beam.write_lance import WriteLance
    schema = pa.schema([("number", pa.int64())])
    def batch_of(start):
        return pa.RecordBatch.from_pydict({"number": list(range(start, start + 10))}, schema=schema)
    starts = [10 * batch for batch in range(int(batches))]
    pipeline | beam.Create(starts) | beam.Map(batch_of) | WriteLance(uri, schema)
"""
    run_on_dask(dask, code, tmp_path / "t.lance", batches)
    dataset = lance.dataset(str(tmp_path / "t.lance"))
    assert sorted(dataset.to_table()["number"].to_pylist()) == list(range(10 * batches))
    assert dataset.version == 1


def test_vectors_are_laid_out_by_all_workers_of_dask(dask, tmp_path):
    table = random_table(tmp_path / "t.lance", 240, fragments=24)
    Layout(table.meta.geometry).write(str(tmp_path / "layout.json"), Storage())
    code = """
def build(pipeline, uri, folder):
    import apache_beam as beam, os, time
    from index.table.table import open_table
    from pipeline.beam.gather import Barrier
    from pipeline.beam.layout import LayOutVectors
    from pipeline.beam.rewrite_vectors import TableFragments
    fragments = TableFragments(open_table(uri), folder)
    def who(element):
        time.sleep(0.1)
        open(f"{folder}/by-{os.getpid()}", "a").write("x")
    (
        pipeline | beam.Create(range(50)) | Barrier() | beam.FlatMap(lambda n: [(i, 0) for i in range(n - 26)])
        | LayOutVectors(fragments) | beam.Map(who)
    )
"""
    run_on_dask(dask, code, table.uri, tmp_path)
    laid_out = [len(path.read_text()) for path in tmp_path.glob("by-*")]
    assert sum(laid_out) == 24
    assert len(laid_out) == 2
    assert len(list(tmp_path.glob("[0-9]*.json"))) == 24


# Engines that die.


@pytest.fixture(scope="module")
def many_shapes(tmp_path_factory) -> Path:
    """A source that is long enough for a kill in the middle."""
    out = tmp_path_factory.mktemp("many_shapes")
    write_demo_data(out, num_samples=SAMPLES, image_size=32, seed=1, samples_per_shard=SAMPLES // SHARDS)
    return out


@pytest.fixture
def engine(request, tmp_path) -> Engine:
    """An engine by its name."""
    with contextlib.ExitStack() as stack:
        if request.param == "dask":
            dask = request.getfixturevalue("dask")
            options = ["--runner", DASK, "--", f"--dask_client_address={dask.address}"]
            yield Engine(options, dask.scheduler, lambda: psutil.Process(dask.workers[0].pid))
            return
        if request.param == "prism":
            if not PRISM.exists():
                pytest.skip(f"{PRISM} is absent: PRISM names another place")
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
            argv = (
                "-c",
                f"import os; os.execv({str(PRISM)!r}, ['prism', '--job_port', '{port}', '--serve_http=false'])",
            )
            service_process = stack.enter_context(service(tmp_path / "engine.log", *argv))
            wait_for(service_process, tmp_path / "engine.log", r"(Serving|JobManagement|erving JobManagement)")
        else:
            argv = ("-m", "apache_beam.runners.portability.local_job_service_main", "--port_file", tmp_path / "port")
            service_process = stack.enter_context(service(tmp_path / "engine.log", *argv))
            port = wait_for(service_process, tmp_path / "port", r"^(\d+)$")
        pool_argv = ("-m", "apache_beam.runners.worker.worker_pool_main", "--service_port=0")
        pool = stack.enter_context(service(tmp_path / "pool.log", *pool_argv))
        address = wait_for(pool, tmp_path / "pool.log", r"servicer at port: (\S+)")
        options = ["--runner", "PortableRunner", "--", f"--job_endpoint=localhost:{port}"]
        options += ["--environment_type=EXTERNAL", f"--environment_config={address}"]
        yield Engine(options, service_process, lambda: psutil.Process(pool.pid).children(recursive=True)[-1])


def finish(process: subprocess.Popen) -> None:
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors


@pytest.mark.parametrize(
    ("engine", "victim"),
    [
        ("dask", "service"),
        ("job_service", "service"),
        ("job_service", "worker"),
        ("prism", "service"),
        ("prism", "worker"),
    ],
    indirect=["engine"],
)
def test_an_append_whose_engine_dies_is_not_finished_and_resumes(
    engine, victim, shapes, many_shapes, start_encode, tmp_path
):
    finish(start_encode(shapes))
    version = open_table(tmp_path / "engine.lance").version
    process = start_encode(many_shapes, "--append", *engine.options)
    while len(list(tmp_path.glob("engine.encode/*/*.json"))) < 4:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    (engine.service if victim == "service" else engine.worker()).kill()
    output, errors = process.communicate(timeout=300)
    *before, line = errors.splitlines()
    assert (process.returncode, output) == (2, ""), errors
    assert re.match(r"error: .*engine\.lance is not finished: .* rerun the same command to resume", line)
    assert "Traceback" not in errors
    assert len(before) <= 2
    assert list(tmp_path.glob("engine.encode/*/*.json")), "checkpoints were deleted"
    assert open_table(tmp_path / "engine.lance").version == version
    finish(start_encode(many_shapes, "--append"))
    ids = open_table(tmp_path / "engine.lance").column("id", split=None)
    assert len(ids) == len(set(ids)) == 360 + SAMPLES


def test_dask_does_the_work_of_a_dead_worker_again(dask, many_shapes, start_encode, tmp_path):
    process = start_encode(many_shapes, "--runner", DASK, "--", f"--dask_client_address={dask.address}")
    while len(list(tmp_path.glob("engine.encode/*/*.json"))) < 4:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    dask.workers[0].kill()
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    ids = open_table(tmp_path / "engine.lance").column("id", split=None)
    assert len(ids) == len(set(ids)) == SAMPLES
