"""Devices are chosen by the worker, and weights are loaded only to encode."""

import pytest
import torch

from index.errors import OptionError
from index.table.table import Table
from pipeline.config import EncodeConfig, RuntimeConfig
from pipeline.encode import job as job_module
from pipeline.encode import measured
from pipeline.encode.run import encode_dataset
from pipeline.encoders.devices import default_dtype, worker_device, worker_number
from pipeline.sources.listing import list_shards


@pytest.fixture
def gpus(monkeypatch):
    """A function that simulates a machine with some GPUs."""

    def simulate(count: int) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch, "empty", lambda *_, device: None)

    return simulate


def test_worker_i_takes_gpu_i_mod_n(gpus):
    gpus(4)
    assert [worker_device("auto", i) for i in range(6)] == [f"cuda:{i % 4}" for i in range(6)]
    assert [worker_device(name, 6) for name in ("cuda", "cuda:3", "cpu")] == ["cuda:2", "cuda:3", "cpu"]
    gpus(1)
    assert [worker_device("auto", i) for i in range(2)] == ["cuda", "cuda"]
    assert [default_dtype(name) for name in ("cuda:1", "cuda", "cpu", "mps")] == ["bfloat16"] * 2 + ["float32"] * 2


def test_workers_are_numbered_as_beam_names_them(monkeypatch):
    monkeypatch.delenv("WORKER_ID", raising=False)
    assert worker_number() == 0
    for name, number in (("worker_3", 3), ("worker_12", 12), ("0-7", 7), ("elsewhere", 0)):
        monkeypatch.setenv("WORKER_ID", name)
        assert worker_number() == number


@pytest.fixture
def loads(monkeypatch):
    """The encoders that are loaded from now on."""
    measured.free_encoders()
    loaded = []
    for name in ("DiffusersAutoencoder", "TransformersTextEncoder"):
        cls = getattr(measured, name)
        monkeypatch.setattr(
            measured, name, lambda *given, cls=cls, **options: loaded.append(cls.__name__) or cls(*given, **options)
        )
    yield loaded
    measured.free_encoders()


def count(loads: list[str]) -> int:
    number = len(loads)
    loads.clear()
    measured.free_encoders()
    return number


@pytest.mark.slow
def test_weights_are_loaded_once_to_encode_and_never_to_do_nothing(
    shapes, encode_shapes, tmp_path, loads, changed_encoder, monkeypatch
):
    encode_shapes(shapes, tmp_path / "t.lance", dry_run=True)
    assert count(loads) == 2
    with monkeypatch.context() as patch:
        patch.setattr(Table, "write_report", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            encode_shapes(shapes, tmp_path / "t.lance")
    assert count(loads) == 2
    assert encode_shapes(shapes, tmp_path / "t.lance").already_complete  # only its report was missing
    assert encode_shapes(shapes, tmp_path / "t.lance").already_complete
    assert encode_shapes(shapes, tmp_path / "t.lance", dry_run=True).already_complete
    assert encode_shapes(shapes, tmp_path / "t.lance", append=True).already_complete
    assert count(loads) == 0
    with pytest.raises(Exception, match=r"weights of --image-encoder"):
        encode_shapes(shapes, tmp_path / "t.lance", image_encoder=changed_encoder)
    assert count(loads) == 2


@pytest.mark.slow
def test_a_driver_without_cuda_sends_work_to_workers_and_they_refuse(image_encoder, text_encoder, shapes, monkeypatch):
    """The check of the device is the worker's, on an engine whose workers are elsewhere."""
    monkeypatch.setattr("pipeline.beam.workers.works_in", lambda _: "elsewhere")
    config = EncodeConfig(
        shards=tuple(list_shards([str(shapes)])), image_encoder=image_encoder, text_encoder=text_encoder, image_size=32
    )
    with pytest.raises(OptionError, match=r"^worker on \S+: --device cuda cannot be used"):
        encode_dataset(config, RuntimeConfig(device="cuda"), str(shapes.parent / "cuda.lance"))


@pytest.mark.slow
def test_automatic_precision_is_one_for_a_run(shapes, encode_shapes, tmp_path, monkeypatch):
    write = job_module.write_once
    monkeypatch.setattr(
        job_module, "write_once", lambda *given: write(*given) | {"dtype": "bfloat16", "device": "cuda", "host": "gpu1"}
    )
    with pytest.raises(OptionError, match=r"is float32 on cpu, and this run has begun in bfloat16, on cuda of gpu1"):
        encode_shapes(shapes, tmp_path / "t.lance", dtype="auto")
    monkeypatch.setattr(job_module, "write_once", write)
    job_module._precision.cache_clear()
    assert encode_shapes(shapes, tmp_path / "t.lance", dtype="auto").report["dtype"] == "float32"


@pytest.mark.slow
def test_the_driver_frees_models_that_only_workers_need(shapes, encode_shapes, tmp_path):
    encode_shapes(shapes, tmp_path / "t.lance", num_workers=2)
    assert measured._load_encoders.cache_info().currsize == 0
