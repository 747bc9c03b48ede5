"""run_beam: options are checked before the work, and failures of engines are told from those of our own code."""

import socket
import tempfile
from pathlib import Path

import apache_beam as beam
import pytest

from index.errors import OptionError, TableError
from pipeline.beam.engine import check_engine, engine_failure
from pipeline.beam.index_segments import beam_builder
from pipeline.beam.runner import run_beam
from pipeline.config import RuntimeConfig

DASK = "apache_beam.runners.dask.dask_runner.DaskRunner"


def runtime_of(*options: str) -> RuntimeConfig:
    return RuntimeConfig(beam_options=options)


@pytest.fixture
def silent_port():
    """A local port at which nothing listens."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield taken.getsockname()[1]


@pytest.fixture
def log_folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("name", ["Nope", "os.path", "os.nothing", "nopkg.Runner", ""])
def test_an_unknown_runner_is_refused_with_those_that_there_are(name):
    with pytest.raises(OptionError, match=rf"^--runner {name} is unknown: use one of .*FlinkRunner, FnApiRunner"):
        check_engine(runtime_of(f"--runner={name}"))
    with pytest.raises(OptionError, match="is unknown"):
        beam_builder(runtime_of(f"--runner={name}"), "auto")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--direct_num_workers=x"], "argument --direct_num_workers: invalid int value: 'x': options of Beam follow"),
        (["--direct_worker=2"], "--direct_worker=2 is no option of FnApiRunner"),
        (["--runner=PortableRunner"], r"needs the address of a job service: add -- --job_endpoint=HOST:PORT"),
        (["--runner=PortableRunner", "--job_endpoint=here"], "--job_endpoint=here is not an address: use HOST:PORT"),
    ],
)
def test_options_of_beam_are_checked(options, message):
    with pytest.raises(OptionError, match=message):
        check_engine(runtime_of(*options))


def test_an_engine_that_does_not_answer_is_named(silent_port):
    with pytest.raises(OptionError, match=rf"--job_endpoint=localhost:{silent_port} does not answer \(.*refused\)"):
        check_engine(runtime_of("--runner=PortableRunner", f"--job_endpoint=localhost:{silent_port}"))
    pytest.importorskip("distributed", reason="Dask is not installed: pip install dask distributed")
    address = f"--dask_client_address=tcp://127.0.0.1:{silent_port}"
    with pytest.raises(OptionError, match=rf"{address} does not answer"):
        check_engine(runtime_of(f"--runner={DASK}", address))
    with pytest.raises(OptionError, match="--dask_npartition=3 is no option of DaskRunner"):
        check_engine(runtime_of(f"--runner={DASK}", "--dask_npartition=3"))


def test_work_is_spread_on_dask_unless_the_user_says_how():
    pytest.importorskip("distributed", reason="Dask is not installed: pip install dask distributed")
    assert check_engine(runtime_of(f"--runner={DASK}")).get_all_options()["npartitions"] == 32
    given = check_engine(runtime_of(f"--runner={DASK}", "--dask_partition_size=2")).get_all_options()
    assert (given["npartitions"], given["partition_size"]) == (None, 2)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (RuntimeError("Pipeline j failed in state FAILED: Traceback\n ...\nOSError: gone"), "OSError: gone"),
        (RuntimeError("Pipeline j failed in state FAILED: KeyError: 1 [while running 'Step']"), None),
        (ConnectionResetError("by peer"), "ConnectionResetError: by peer"),
        (RuntimeError("ConnectionError: hub [while running 'Step']"), None),
        (KeyError("ours"), None),
        (AssertionError(), None),
    ],
)
def test_failures_of_engines_are_told_from_our_own(error, reason):
    assert engine_failure(error) == reason


def run(step, **arguments):
    run_beam(
        lambda pipeline: pipeline | beam.Create([1]) | beam.Map(step),
        RuntimeConfig(),
        "t.lance",
        memory_advice="less",
        **arguments,
    )


def raise_bug(_):
    raise KeyError("bug")


def refuse(_):
    raise TableError("no: do that")


def test_a_bug_keeps_its_traceback_and_names_the_log(log_folder):
    with pytest.raises(Exception, match="bug") as raised:
        run(raise_bug)
    (log,) = log_folder.glob("beam-*.log")
    assert raised.value.__notes__ == [f"log of Beam's workers: {log}"]


def test_an_error_of_the_user_leaves_no_log(log_folder):
    with pytest.raises(TableError, match=r"^no: do that$"):
        run(refuse)
    assert not list(log_folder.iterdir())


def test_an_engine_that_ends_is_one_line_that_says_how_to_resume(log_folder):
    with pytest.raises(
        TableError, match=r"^t.lance is not finished: .* stopped \(ConnectionError: gone\): see .* rerun the same"
    ):
        run_beam(fail_to_start, RuntimeConfig(), "t.lance", memory_advice="less")


def fail_to_start(_):
    raise ConnectionError("gone")
