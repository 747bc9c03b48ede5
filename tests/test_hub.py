"""Hub ids take the libraries' own way: here through a local hub cache, without a network."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from trainer.config import FitConfig
from trainer.fit import fit

REVISION = "0" * 40


@pytest.fixture
def hub(tmp_path):
    """A function that puts a folder into a hub cache under a name, and the environment that reads from it."""
    cache = tmp_path / "cache"

    def put(name: str, folder, subfolder: str = "") -> None:
        repository = cache / f"models--{name.replace('/', '--')}"
        (repository / "refs").mkdir(parents=True, exist_ok=True)
        (repository / "refs" / "main").write_text(REVISION)
        shutil.copytree(folder, repository / "snapshots" / REVISION / subfolder, dirs_exist_ok=True)

    environment = os.environ | {"HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return put, environment


def run(code: str, environment) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_encoders_open_by_hub_id_and_subfolder(hub, image_encoder, text_encoder):
    put, environment = hub
    put("org/pipeline", image_encoder, "vae")
    put("org/words", text_encoder)
    code = """
from pipeline.encoders import DiffusersAutoencoder, TransformersTextEncoder
print(DiffusersAutoencoder("org/pipeline/vae").ref.digest)
print(TransformersTextEncoder("org/words").encode(["a small red circle"]).shape)
"""
    digest, shape = run(code, environment).splitlines()
    assert len(digest) == 64
    assert shape == "(1, 16)"


def test_what_the_hub_does_not_give_is_one_line(hub):
    code = """
from index.errors import CoalescerError
from pipeline.encoders import DiffusersAutoencoder, TransformersTextEncoder
from trainer.sampler import CoalescerPipeline
for opener in (DiffusersAutoencoder, TransformersTextEncoder, CoalescerPipeline.from_pretrained):
    try:
        opener("org/none")
    except CoalescerError as error:
        print(error)
"""
    lines = run(code, hub[1]).splitlines()
    assert len(lines) == 3
    assert all("org/none" in line and "hub" in line for line in lines)


def test_a_run_is_sampled_by_hub_id(hub, indexed, tmp_path):
    put, environment = hub
    fit(indexed, FitConfig(size="tiny", images=64, batch_size=32), tmp_path / "run")
    put("org/run", tmp_path / "run")
    script = Path(sys.executable).parent / "trainer"
    done = subprocess.run(
        [script, "sample", "org/run", "a small red circle", "--out", "a.png", "--num", "2"],
        capture_output=True,
        text=True,
        env=environment,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "a.png").exists()
