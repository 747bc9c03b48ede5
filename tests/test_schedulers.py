"""The drivers of docs/clusters.md run the parts of an encode run as tasks of Spark and of Ray."""

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from index.table.table import open_table
from pipeline.demo.shapes import write_demo_data

pytestmark = pytest.mark.slow

DOCUMENT = Path(__file__).parent.parent / "docs" / "clusters.md"
PIPELINE = [sys.executable, "-c", "from pipeline.cli import main; main()"]
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": str(DOCUMENT.parent.parent),
    "PYSPARK_PYTHON": sys.executable,
    "OMP_NUM_THREADS": "1",
    "SPARK_LOCAL_IP": "127.0.0.1",
    "RAY_USAGE_STATS_ENABLED": "0",
}


def driver(library: str, folder: Path) -> Path:
    """The driver for a library, as the document has it, as a file."""
    blocks = re.findall(r"^```python\n(.*?)^```", DOCUMENT.read_text(), flags=re.DOTALL | re.MULTILINE)
    (code,) = [block for block in blocks if f"import {library}" in block or f"from {library}" in block]
    path = folder / f"{library}_driver.py"
    path.write_text(code)
    return path


@pytest.fixture
def spark_master(tmp_path) -> Iterator[str]:
    """The address of a standalone master with one worker of two cores."""
    pyspark = pytest.importorskip("pyspark", reason="Spark is not installed: pip install pyspark")
    start = Path(pyspark.__file__).parent / "bin" / "spark-class"
    deploy, log, processes = "org.apache.spark.deploy", tmp_path / "master.log", []

    def launch(name: str, *options: str) -> None:
        argv = [str(start), f"{deploy}.{name}", "--host", "127.0.0.1", "--webui-port", "0", *options]
        with (tmp_path / f"{name.rpartition('.')[2].lower()}.log").open("wb") as output:
            processes.append(subprocess.Popen(argv, stdout=output, stderr=output, env=ENVIRONMENT, cwd=tmp_path))

    launch("master.Master", "--port", "0")
    try:
        deadline = time.monotonic() + 60
        while not (found := re.search(r"Starting Spark master at (spark://\S+)", log.read_text())):
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
        launch("worker.Worker", "--cores", "2", "--memory", "1g", "--work-dir", str(tmp_path / "work"), found[1])
        yield found[1]
    finally:
        for process in reversed(processes):
            process.terminate()
            process.wait(30)


@pytest.fixture
def run_driver(tmp_path, image_encoder, text_encoder):
    """A function that runs a driver, and checks that its table is that of one command."""

    def run(library: str, address: str) -> None:
        source = tmp_path / "source"
        write_demo_data(source, num_samples=120, image_size=32, seed=0, samples_per_shard=20)
        argv = [*PIPELINE, "encode", str(source), "--image-size", "32", "--image-encoder", image_encoder]
        argv += ["--text-encoder", text_encoder, "--device", "cpu", "--table"]
        subprocess.run([*argv, str(tmp_path / "one.lance")], check=True, env=ENVIRONMENT, capture_output=True)
        done = subprocess.run(
            [sys.executable, str(driver(library, tmp_path)), address, "2", *argv, str(tmp_path / "parts.lance")],
            env=ENVIRONMENT,
            capture_output=True,
            text=True,
            timeout=400,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        assert "[0, 0]" in done.stdout
        one, parts = (open_table(tmp_path / f"{name}.lance").dataset().to_table() for name in ("one", "parts"))
        assert parts.num_rows == 120
        assert parts.equals(one.replace_schema_metadata(parts.schema.metadata))

    return run


def test_parts_as_tasks_of_a_spark_cluster(spark_master, run_driver):
    run_driver("pyspark", spark_master)


def test_parts_as_tasks_of_ray(run_driver):
    pytest.importorskip("ray", reason="Ray is not installed: pip install ray")
    run_driver("ray", "local")
