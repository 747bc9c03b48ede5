"""Loading encoders and runs by hub id, from a local hub cache and without a network."""

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
    """Return a function that puts a folder into a hub cache under a hub id, and the environment to read from it."""
    cache = tmp_path / "cache"

    def put(name: str, folder, subfolder: str = "") -> None:
        repository = cache / f"models--{name.replace('/', '--')}"
        (repository / "refs").mkdir(parents=True, exist_ok=True)
        (repository / "refs" / "main").write_text(REVISION)
        shutil.copytree(folder, repository / "snapshots" / REVISION / subfolder, dirs_exist_ok=True)

    environment = os.environ | {"HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return put, environment


def run(code: str, environment) -> str:
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert process.returncode == 0, process.stderr
    return process.stdout


@pytest.mark.slow
def test_encoders_are_loaded_by_hub_id_and_subfolder(hub, image_encoder, text_encoder):
    put, environment = hub
    put("org/pipeline", image_encoder, "vae")
    put("org/text", text_encoder)
    code = """
from pipeline.encoders.image import DiffusersAutoencoder
from pipeline.encoders.text import TransformersTextEncoder
print(DiffusersAutoencoder("org/pipeline/vae").ref.digest)
print(TransformersTextEncoder("org/text").encode(["a small red circle"]).shape)
"""
    digest, shape = run(code, environment).splitlines()
    assert len(digest) == 64
    assert shape == "(1, 16)"


@pytest.mark.slow
def test_a_missing_repository_is_a_one_line_error(hub):
    code = """
from index.errors import CoalescerError
from pipeline.encoders.image import DiffusersAutoencoder
from pipeline.encoders.text import TransformersTextEncoder
from trainer.sampler import CoalescerPipeline
for load in (DiffusersAutoencoder, TransformersTextEncoder, CoalescerPipeline.from_pretrained):
    try:
        load("org/none")
    except CoalescerError as error:
        print(error)
"""
    lines = run(code, hub[1]).splitlines()
    assert len(lines) == 3
    assert all("org/none is not in the cache" in line and "HF_HUB_OFFLINE is set: unset it" in line for line in lines)


@pytest.mark.slow
def test_images_are_sampled_by_the_hub_id_of_a_run(hub, indexed, tmp_path):
    put, environment = hub
    fit(indexed, FitConfig(size="tiny", images=64, batch_size=32), tmp_path / "run")
    put("org/run", tmp_path / "run")
    script = Path(sys.executable).parent / "trainer"
    process = subprocess.run(
        [script, "sample", "org/run", "a small red circle", "--out", "a.png", "--num-images-per-prompt", "2"],
        capture_output=True,
        text=True,
        env=environment,
        cwd=tmp_path,
    )
    assert process.returncode == 0, process.stderr
    assert (tmp_path / "a.png").exists()
