"""Encoding: every sample becomes a row or a reject with a reason, and the table does not depend on the workers."""

import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from index.errors import EncoderError, OptionError, SourceError
from index.table.table import rejects_uri
from pipeline.beam.log import LOGGERS
from pipeline.config import EncodeConfig
from pipeline.demo.shapes import write_demo_data
from pipeline.encoders.image import DiffusersAutoencoder
from pipeline.encoders.text import TransformersTextEncoder
from pipeline.filters import Filters
from pipeline.images import decode_image
from pipeline.sources.listing import list_shards
from pipeline.sources.read import read_samples
from pipeline.sources.sample import Sample


def test_rows_hold_the_outputs_of_the_encoders(encoded, shapes, image_encoder, text_encoder):
    samples = {s.key: s for shard in list_shards([str(shapes)]) for s in read_samples(shard) if isinstance(s, Sample)}
    rows = encoded.dataset().to_table().to_pylist()
    assert {row["key"] for row in rows} == samples.keys()
    chosen = rows[::37]
    pixels = np.stack([decode_image(samples[row["key"]].image, 32).pixels for row in chosen])
    latents = DiffusersAutoencoder(image_encoder).encode(pixels).reshape(len(chosen), -1)
    texts = TransformersTextEncoder(text_encoder).encode([row["caption"] for row in chosen])
    for row, latent, text in zip(chosen, latents, texts, strict=True):
        sample = samples[row["key"]]
        assert row["caption"] == sample.caption.decode()
        assert row["meta"] == sample.meta.decode()
        assert row["image"] == sample.image
        assert (row["width"], row["height"], row["shard"]) == (32, 32, sample.shard)
        assert np.allclose(row["latent"], latent, rtol=2e-3, atol=2e-3)
        assert np.allclose(row["text"], text, rtol=2e-3, atol=2e-3)
    assert len({row["id"] for row in rows}) == len(rows)
    heldout_fraction = np.mean([row["split"] == "heldout" for row in rows])
    assert 0.1 < heldout_fraction < 0.3


def test_a_table_without_rejects_has_an_empty_rejects_table(encoded):
    import lance

    rejects = lance.dataset(rejects_uri(encoded.uri))
    assert (rejects.count_rows(), rejects.schema.names) == (0, ["key", "shard", "reason", "detail"])


def test_report_and_log_of_a_run(encoded):
    report = encoded.report("encode")
    assert (report["rows"], report["rejected"], report["filtered"], report["shards"]) == (360, 0, 0, 3)
    assert (report["success_rate"], report["num_workers"]) == (1, 1)
    assert report["image_encoder"]["digest"] == encoded.meta.image_encoder.digest
    assert report["seconds_by_step"].keys() == {"read", "decode", "wait", "encode", "write"}
    assert report["versions"]["apache-beam"]
    ticks = [json.loads(line) for line in encoded.log("encode").read_text().splitlines()]
    assert (ticks[-1]["done"], ticks[-1]["total"], ticks[-1]["shards"]) == (360, 360, "3/3")
    assert {"rate", "eta", "rejected", "success_rate"} <= ticks[-1].keys()


@pytest.mark.slow
def test_two_worker_processes_give_the_same_table(content, encoded, shapes, encode_shapes, tmp_path):
    table = encode_shapes(shapes, tmp_path / "two.lance", num_workers=2, keep_images=True).table
    assert content(table) == content(encoded)
    assert table.meta.geometry.same_as(encoded.meta.geometry)


def test_moments_equal_those_of_one_pass_over_the_training_rows(encoded):
    text, latent = (encoded.column(name).astype(np.float64) for name in ("text", "latent"))
    moments = encoded.meta.moments
    assert moments.count == len(text) < 360
    assert np.allclose(moments.latent_mean, latent.mean(0), rtol=0, atol=1e-6)
    assert np.allclose(np.square(moments.latent_std), latent.var(0), rtol=0, atol=1e-6)
    each = text / np.linalg.norm(text, axis=1, keepdims=True)
    pairwise = np.square(each[:, None] - each[None]).sum(-1)
    assert moments.text_distance == pytest.approx(np.sqrt(pairwise.mean()), abs=1e-6)


def test_limit_reads_the_first_samples(content, encoded, shapes, encode_shapes, tmp_path):
    table = encode_shapes(shapes, tmp_path / "t.lance", limit=130).table
    keys = {row["key"] for row in content(table)}
    assert keys == {f"{number:08d}" for number in range(130)}


def test_image_bytes_are_not_stored_by_default(shapes, encode_shapes, tmp_path):
    schema = encode_shapes(shapes, tmp_path / "t.lance", limit=20).table.dataset().schema
    assert "image" not in schema.names
    assert schema.field("vector").type == pa.list_(pa.float16(), 56)


def test_an_empty_source_is_refused(tmp_path, encode_shapes):
    with tarfile.open(tmp_path / "empty.tar", "w"):
        pass
    with pytest.raises(SourceError, match="no samples"):
        encode_shapes(tmp_path / "empty.tar", tmp_path / "t.lance")
    assert not (tmp_path / "t.lance").exists()


def test_encoding_in_this_process_leaves_it_as_it_was(shapes, encode_shapes, tmp_path, three_threads):
    import logging
    import warnings

    import torch
    from PIL import Image

    def state():
        levels = {name: logging.getLogger(name).level for name in LOGGERS}
        drawn = np.random.get_state()[1].tolist(), torch.random.get_rng_state().tolist()
        limits = Image.MAX_IMAGE_PIXELS, Image.core.get_block_size()
        return torch.get_num_threads(), drawn, limits, levels, list(warnings.filters)

    before = state()
    encode_shapes(shapes, tmp_path / "t.lance", limit=20, dry_run=True)
    assert state() == before
    encode_shapes(shapes, tmp_path / "t.lance", limit=20)
    assert state() == before


def test_a_dry_run_writes_nothing_and_returns_the_plan(shapes, encode_shapes, tmp_path):
    plan = encode_shapes(shapes, tmp_path / "t.lance", dry_run=True).report
    assert (plan["shards"], plan["samples"], plan["trial_rows"]) == (3, 360, 8)
    assert (plan["latent_shape"], plan["text_dim"], plan["device"]) == ([2, 4, 4], 16, "cpu")
    assert plan["bytes_needed"] < plan["bytes_free"]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"desc_scale": 1.0}, "--desc-scale 1 "),
        ({"geometry": "torus"}, "--geometry 'torus' is unknown: use one of sphere"),
        ({"dtype": "int8"}, "--dtype 'int8' is unknown: use one of float32"),
        ({"val_fraction": 1.5}, "--val-fraction 1.5 is out of range: use a number from 0 to 1"),
        ({"max_reject_rate": -0.1}, "--max-reject-rate -0.1 is out of range: use a number from 0 to 1"),
        ({"image_size": 4}, "--image-size 4 is out of range: use a number from 8 to 16384"),
        ({"limit": 0}, "--limit 0 is out of range: use 1 or more"),
    ],
)
def test_options_are_checked_before_sources(encode_shapes, tmp_path, options, message):
    with pytest.raises(OptionError, match=message):
        encode_shapes("nowhere.tar", tmp_path / "t.lance", **options)
    assert not list(tmp_path.iterdir())


def test_options_by_name_become_a_config():
    options = {
        "image_encoder": "vae",
        "text_encoder": "clip",
        "image_size": 64,
        "min_image_size": 100,
        "dedup": "image",
    }
    config = EncodeConfig.from_options(options)
    assert (config.image_encoder, config.image_size, config.val_fraction) == ("vae", 64, 0.05)
    assert config.filters == Filters(min_image_size=100, dedup="image")
    assert config.settings.items() >= options.items()
    with pytest.raises(TypeError, match="no_such_option"):
        EncodeConfig.from_options({**options, "no_such_option": 1})


def test_a_missing_encoder_is_named(shapes, encode_shapes, tmp_path):
    with pytest.raises(EncoderError, match="no folder nowhere"):
        encode_shapes(shapes, tmp_path / "t.lance", image_encoder="nowhere")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_photos_and_digits_encode(encode_shapes, tmp_path):
    """Emoji and handwritten digits in the layouts of img2dataset and of Hugging Face."""
    data = Path(__file__).parents[2] / "shared" / "data"
    if not data.is_dir():
        pytest.skip("the real image sets are not next to this checkout")
    for name, shard in (("noto-emoji", "00000.tar"), ("mnist", "test-00000.parquet"), ("nlvr", "00000.tar")):
        result = encode_shapes(data / name / shard, tmp_path / f"{name}.lance", limit=100)
        assert (result.report["rows"], result.report["rejected"]) == (100, 0)
        shutil.rmtree(result.table.uri)


@pytest.mark.parametrize("layout", ["parquet", "text files", "metadata.csv", "saved", "hub"])
def test_every_source_layout_encodes_to_the_same_rows(layout, shapes, encode_shapes, content, tmp_path):
    import datasets

    samples = [sample for sample in read_samples(str(shapes / "00000.tar")) if isinstance(sample, Sample)][:20]
    source = tmp_path / "source"
    source.mkdir()
    rows = [{"image": {"bytes": s.image, "path": None}, "text": s.caption.decode()} for s in samples]
    table = datasets.Dataset.from_list(rows).cast_column("image", datasets.Image(decode=False))
    if layout in ("parquet", "hub"):
        table.to_parquet(source / "train-00000-of-00001.parquet")
    elif layout == "saved":
        table.save_to_disk(source)
    else:
        for number, sample in enumerate(samples):
            (source / f"{number:04d}.png").write_bytes(sample.image)
            if layout == "text files":
                (source / f"{number:04d}.txt").write_bytes(sample.caption)
        if layout == "metadata.csv":
            lines = [f'{number:04d}.png,"{sample.caption.decode()}"' for number, sample in enumerate(samples)]
            (source / "metadata.csv").write_text("\n".join(["file_name,text", *lines]))
    name = f"hf:{source}" if layout == "hub" else source
    encoded = content(encode_shapes(name, tmp_path / "t.lance", val_fraction=0.0, keep_images=True).table)
    assert {(row["image"], row["caption"]) for row in encoded} == {(s.image, s.caption.decode()) for s in samples}


def test_image_and_caption_columns_can_be_named(shapes, encode_shapes, content, tmp_path):
    import pyarrow.parquet as pq

    (sample,) = (s for s in read_samples(str(shapes / "00000.tar")) if s.key == "00000000")
    columns = {"photo_a": [sample.image], "photo_b": [b"?"], "alt": ["words"], "caption": ["other words"]}
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    options = {"image_key": "photo_a", "caption_key": "alt", "val_fraction": 0.0}
    (row,) = content(encode_shapes(tmp_path / "a.parquet", tmp_path / "t.lance", **options).table)
    assert row["caption"] == "words"
    with pytest.raises(SourceError, match="'title' is not a column: choose one of photo_a, photo_b"):
        encode_shapes(tmp_path / "a.parquet", tmp_path / "u.lance", caption_key="title")


def test_demo_data_of_another_size_is_scaled(content, image_encoder, text_encoder, encode_shapes, tmp_path):
    write_demo_data(tmp_path / "large", num_samples=10, image_size=48, seed=1)
    rows = content(encode_shapes(tmp_path / "large", tmp_path / "t.lance", val_fraction=0.0).table)
    assert {(row["width"], row["height"]) for row in rows} == {(48, 48)}
