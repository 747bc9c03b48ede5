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

import apache_beam as beam
import lance
import psutil
import pytest
from synthetic_tables import random_table

from index.errors import TableError
from index.table.storage import Storage
from index.table.table import Table, open_table
from pipeline.beam import runner
from pipeline.beam.layout import Layout
from pipeline.config import RuntimeConfig
from pipeline.demo.shapes import write_demo_data
from pipeline.encoders.devices import worker_number

pytestmark = pytest.mark.slow

BIN = Path(sys.executable).parent
# A job server starts its workers as `python`. One thread each, so that sums are added in the same order.
ENVIRONMENT = {**os.environ, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
DASK = "apache_beam.runners.dask.dask_runner.DaskRunner"
PRISM = Path(os.environ.get("PRISM", Path(__file__).parents[2] / "shared" / "bin" / "prism"))
SAMPLES, SHARDS = 2000, 40
"""Of a source that is long enough for kills in the middle."""
FIRST_HALF = "000[01]?.tar"
SHARDS_BETWEEN_KILLS = 3
Run = tuple[list[str], list[Callable[[], None]]]
"""Options of a command, and what is killed while it runs."""


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

    def run(name: str, *beam_options: str) -> Table:
        process = start_encode(shapes, "--runner", name, "--", *beam_options)
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
        assert not list(tmp_path.glob("*.encode")), "checkpoints were not deleted"
        return open_table(tmp_path / "engine.lance")

    return run


def test_a_job_service_with_the_worker_in_the_command_itself(encoded, content, encode_on, job_service):
    table = encode_on("PortableRunner", f"--job_endpoint={job_service}", "--environment_type=LOOPBACK")
    assert content(table) == content(encoded)


def test_dask_with_two_workers(encoded, content, encode_on, dask):
    table = encode_on(DASK, f"--dask_client_address={dask.address}", "--dask_partition_size=1")
    assert content(table) == content(encoded)

    def has_loaded_encoders() -> bool:
        return "diffusers" in sys.modules

    assert list(dask.client.run(has_loaded_encoders).values()) == [True, True]


# Transforms on Dask, whose Beam runner drops what `finish_bundle` emits and does nothing at `Reshuffle`.


@pytest.mark.slow
def test_workers_of_dask_are_numbered_for_the_gpus_of_their_machine(dask):
    addresses = {each["name"]: address for address, each in dask.client.scheduler_info(n_workers=-1)["workers"].items()}
    numbers = {
        name: dask.client.submit(worker_number, workers=[address], pure=False).result(timeout=60)
        for name, address in addresses.items()
    }
    assert numbers == {"one": 0, "two": 1}


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


def test_a_dask_scheduler_whose_workers_are_all_dead_is_not_waited_for_forever(dask, tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "DASK_POLL_MILLISECONDS", 500)
    for worker in dask.workers:
        _stop(worker)
    runtime = RuntimeConfig(beam_options=(f"--runner={DASK}", f"--dask_client_address={dask.address}"))
    with pytest.raises(TableError, match=r"t\.lance is not finished: .*the scheduler has no workers.*rerun the same"):
        runner.run_beam(
            lambda pipeline: pipeline | beam.Create([1]) | beam.Map(str), runtime, "t.lance", memory_advice="none"
        )


# Engines that die.


@pytest.fixture(scope="module")
def many_shapes(tmp_path_factory) -> Path:
    """A source that is long enough for kills in the middle."""
    out = tmp_path_factory.mktemp("many_shapes")
    write_demo_data(out, num_samples=SAMPLES, image_size=32, seed=1, samples_per_shard=SAMPLES // SHARDS)
    return out


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, many_shapes, encode_shapes, content) -> list[list[dict]]:
    """The rows of a new table of the first half of the shards, and those after an append of the others."""
    uri = tmp_path_factory.mktemp("undisturbed") / "t.lance"
    new = content(encode_shapes(many_shapes / FIRST_HALF, uri, keep_images=True).table)
    return [new, content(encode_shapes(many_shapes / "*.tar", uri, keep_images=True, append=True).table)]


class JobService:
    """Beam's job service or Prism, at a port that it keeps, and a worker pool."""

    def __init__(self, folder: Path, stack: contextlib.ExitStack, *, prism: bool) -> None:
        self.folder, self.stack, self.prism = folder, stack, prism
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        argv = ("-m", "apache_beam.runners.worker.worker_pool_main", "--service_port=0")
        self.pool = stack.enter_context(service(folder / "pool.log", *argv))
        self.pool_address = wait_for(self.pool, folder / "pool.log", r"servicer at port: (\S+)")
        self.start()

    def start(self) -> None:
        if self.prism:
            call = ["prism", "--job_port", str(self.port), "--serve_http=false"]
            argv = ("-c", f"import os; os.execv({str(PRISM)!r}, {call!r})")
        else:
            argv = ("-m", "apache_beam.runners.portability.local_job_service_main", "--port", self.port)
        self.service = self.stack.enter_context(service(self.folder / "service.log", *argv))
        wait_until_answers(self.port, self.service)

    def runs(self) -> Iterator[Run]:
        """Yield the options of each command and what is killed in it: a worker, the service with each environment."""
        in_command = ["--runner", "PortableRunner", "--", f"--job_endpoint=localhost:{self.port}"]
        in_pool = [*in_command, "--environment_type=EXTERNAL", f"--environment_config={self.pool_address}"]
        yield in_pool, [self.kill_workers]
        yield in_pool, [self.service.kill]
        self.kill_workers()  # one without its service may finish all shards before the next command starts
        self.start()
        yield [*in_command, "--environment_type=LOOPBACK"], [self.service.kill]
        self.start()
        yield in_pool, []

    def kill_workers(self) -> None:
        for process in psutil.Process(self.pool.pid).children(recursive=True):
            process.kill()


class DaskCluster:
    """A Dask scheduler with two workers and a third one below a nanny."""

    def __init__(self, folder: Path, stack: contextlib.ExitStack) -> None:
        self.folder, self.stack = folder, stack
        self.start()

    def start(self) -> None:
        file = self.folder / "scheduler.json"
        file.unlink(missing_ok=True)
        listen = ("--host", "127.0.0.1", "--port", "0", "--no-dashboard", "--scheduler-file", file)
        argv = ("-m", "distributed.cli.dask_scheduler", *listen)
        self.scheduler = self.stack.enter_context(service(self.folder / "scheduler.log", *argv))
        self.address = wait_for(self.scheduler, file, r'"address": "(tcp://[^"]+)"')
        names = {"one": "--no-nanny", "two": "--no-nanny", "three": "--nanny"}
        self.workers = [self._start_worker(name, nanny) for name, nanny in names.items()]
        for name in names:
            log = self.folder / f"{name}.log"
            wait_for(self.scheduler, log, r"(Registered to)")

    def _start_worker(self, name: str, nanny: str) -> subprocess.Popen:
        options = ("--nthreads", "1", nanny, "--no-dashboard", "--local-directory", self.folder)
        argv = ("-m", "distributed.cli.dask_worker", self.address, *options)
        return self.stack.enter_context(service(self.folder / f"{name}.log", *argv))

    def runs(self) -> Iterator[Run]:
        """Yield the options of each command and what is killed in it; the workers' shards are done by the others."""
        dask = ["--runner", DASK, "--"]
        worker, _, nanny = self.workers
        yield [*dask, f"--dask_client_address={self.address}"], [worker.kill, nanny.kill, self.scheduler.kill]
        for process in self.workers:
            _stop(process)
        self.start()
        yield [*dask, f"--dask_client_address={self.address}"], []


def wait_until_answers(port: int, process: subprocess.Popen, *, timeout: float = 60) -> None:
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(OSError):
            return socket.create_connection(("localhost", port), 1).close()
        time.sleep(0.1)
    raise AssertionError(f"nothing listens at port {port}; exit code {process.poll()}")


@pytest.fixture
def engine(request, tmp_path) -> Iterator[JobService | DaskCluster]:
    """An engine by its name."""
    with contextlib.ExitStack() as stack:
        if request.param == "dask":
            pytest.importorskip("distributed", reason="Dask is not installed: pip install dask distributed")
            yield DaskCluster(tmp_path, stack)
            return
        if request.param == "prism" and not PRISM.exists():
            pytest.skip(f"{PRISM} is absent: PRISM names another place")
        yield JobService(tmp_path, stack, prism=request.param == "prism")


@pytest.mark.parametrize("engine", ["dask", "job_service", "prism"], indirect=True)
def test_an_engine_is_killed_on_a_new_table_and_on_an_append(
    engine, many_shapes, undisturbed, start_encode, content, tmp_path
):
    """Each kill of a service ends the command in one line; the same command finishes with the undisturbed table."""
    version = None
    for source, more, expected in zip((FIRST_HALF, "*.tar"), ([], ["--append"]), undisturbed, strict=True):
        for options, kills in engine.runs():
            finished = len(finished_shards(tmp_path))
            process = start_encode(many_shapes / source, *more, *options)
            for kill in kills:
                finished = wait_for_shards(process, tmp_path, finished + SHARDS_BETWEEN_KILLS)
                kill()
            output, errors = process.communicate(timeout=300)
            if not kills:
                assert process.returncode == 0, errors
                break
            *before, line = errors.splitlines()
            assert (process.returncode, output) == (2, ""), errors
            assert re.match(r"error: .*engine\.lance is not finished: .* rerun the same command to resume", line)
            assert "Traceback" not in errors
            assert len(before) <= 2
            assert finished <= len(finished_shards(tmp_path)), "checkpoints were deleted"
            assert version == (open_table(tmp_path / "engine.lance").version if version else None)
        table = open_table(tmp_path / "engine.lance")
        assert content(table) == expected
        assert not list(tmp_path.glob("*.encode")), "checkpoints were not deleted"
        version = table.version


def finished_shards(folder: Path) -> list[Path]:
    return list(folder.glob("engine.encode/*/*.json"))


def wait_for_shards(process: subprocess.Popen, folder: Path, count: int) -> int:
    """Wait until `count` shards have checkpoints, and return how many have."""
    while len(finished_shards(folder)) < count:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)
    return len(finished_shards(folder))
