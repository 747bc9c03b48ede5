"""Encoding: every sample a row or a reject with its reason, the same table however the work was done."""

import io
import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from index.errors import EncoderError, OptionError, SourceError, TableError
from index.table import open_table
from pipeline.demo import write_demo_data
from pipeline.encode import encode
from pipeline.encoders import DiffusersAutoencoder, TransformersTextEncoder
from pipeline.images import decode_image
from pipeline.rows import EncodeConfig, RunConfig
from pipeline.sink import mark_of, rejects_uri
from pipeline.sources import Sample, list_shards, read_samples


def content(uri: str) -> list[dict]:
    rows = open_table(uri).dataset().to_table().to_pylist()
    return sorted(rows, key=lambda row: row["id"])


def test_rows_are_what_the_encoders_say(encoded, shapes, image_encoder, text_encoder):
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
        assert row["meta"] == sample.meta
        assert row["image"] == sample.image
        assert (row["width"], row["height"], row["shard"]) == (32, 32, sample.shard)
        assert np.allclose(row["latent"], latent, rtol=2e-3, atol=2e-3)
        assert np.allclose(row["text"], text, rtol=2e-3, atol=2e-3)
    assert len({row["id"] for row in rows}) == len(rows)
    share = np.mean([row["split"] == "heldout" for row in rows])
    assert 0.1 < share < 0.3


def test_a_table_without_rejects_has_an_empty_rejects_table(encoded):
    import lance

    rejects = lance.dataset(rejects_uri(encoded.uri))
    assert (rejects.count_rows(), rejects.schema.names) == (0, ["key", "shard", "reason", "detail"])


def test_the_report_says_what_was_done(encoded):
    report = json.loads((encoded.reports / "encode.json").read_text())
    assert (report["rows"], report["rejects"], report["shards"]) == (360, 0, 3)
    assert report["image_encoder"]["digest"] == encoded.meta.image_encoder.digest
    assert report["seconds_by_step"].keys() == {"read", "decode", "encode", "write"}
    ticks = [json.loads(line) for line in (encoded.reports / "encode.jsonl").read_text().splitlines()]
    assert (ticks[-1]["done"], ticks[-1]["total"], ticks[-1]["shards"]) == (360, 360, "3/3")
    assert {"rate", "eta", "rejects"} <= ticks[-1].keys()


def test_two_worker_processes_give_the_same_table(encoded, shapes, encode_shapes, tmp_path):
    table = encode_shapes(shapes, tmp_path / "two.lance", workers=2, keep_images=True).table
    assert content(table.uri) == content(encoded.uri)
    assert table.meta.geometry.same_as(encoded.meta.geometry)


def test_the_same_command_again_does_nothing(shapes, encode_shapes, tmp_path):
    first = encode_shapes(shapes, tmp_path / "t.lance")
    again = encode_shapes(shapes, tmp_path / "t.lance")
    assert again.done_before
    assert again.table.version == first.table.version
    assert not list(tmp_path.glob("t.encode*"))


def test_a_run_stopped_between_commit_and_report_is_finished(shapes, encode_shapes, tmp_path, monkeypatch):
    from pipeline import encode as module

    with monkeypatch.context() as patch:
        patch.setattr(module, "_report", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            encode_shapes(shapes, tmp_path / "t.lance")
    again = encode_shapes(shapes, tmp_path / "t.lance")
    assert (again.done_before, again.report["rows"], again.table.version) == (True, 360, 1)
    assert not list(tmp_path.glob("t.encode*"))


def test_changed_options_are_refused_and_named(shapes, encode_shapes, tmp_path):
    encode_shapes(shapes, tmp_path / "t.lance")
    with pytest.raises(TableError, match="another desc_scale"):
        encode_shapes(shapes, tmp_path / "t.lance", desc_scale=5.0)


def test_a_stopped_run_goes_on_where_it_was(encoded, shapes, encode_shapes, tmp_path, monkeypatch):
    from pipeline import rows, sink

    last = list_shards([str(shapes)])[-1]
    opened = []
    whole = rows.EncodeJob.open

    def broken(self, shard):
        opened.append(shard)
        if shard == last:
            raise KeyError("pulled the plug")
        return whole(self, shard)

    monkeypatch.setattr(rows.EncodeJob, "open", broken)
    with pytest.raises(Exception, match="pulled the plug"):
        encode_shapes(shapes, tmp_path / "t.lance", keep_images=True)
    with pytest.raises(TableError, match="no table at"):
        open_table(tmp_path / "t.lance")
    finished = [shard for shard in opened if shard != last]
    marks = next((tmp_path / "t.encode").iterdir())
    assert all(sink.mark_of(str(marks), shard).exists() for shard in finished)

    again = []
    monkeypatch.setattr(rows.EncodeJob, "open", lambda self, shard: (again.append(shard), whole(self, shard))[1])
    table = encode_shapes(shapes, tmp_path / "t.lance", keep_images=True).table
    assert set(again) == set(list_shards([str(shapes)])) - set(finished)
    assert content(table.uri) == content(encoded.uri)


def test_a_mark_is_never_half_written(tmp_path):
    mark = mark_of(str(tmp_path), "shard")
    assert mark.parent == tmp_path
    assert mark_of(str(tmp_path), "other") != mark


@pytest.fixture
def bad_source(tmp_path, shapes) -> Path:
    """Good samples with bad ones among them; returns the folder."""
    good = next(iter(read_samples(str(shapes / "00000.tar"))))
    members = {}
    for number in range(8):
        members |= {f"good{number}.png": good.image + bytes(number), f"good{number}.txt": b"a small red circle"}
    members |= {
        "truncated.png": good.image[:60],
        "truncated.txt": b"x",
        "html.jpg": b"<html>",
        "html.txt": b"x",
        "lonely.txt": b"no picture",
        "silent.png": good.image,
        "blank.png": good.image,
        "blank.txt": b"  ",
        "latin.png": good.image,
        "latin.txt": b"caf\xe9",
    }
    folder = tmp_path / "source"
    folder.mkdir()
    with tarfile.open(folder / "00000.tar", "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    whole = (shapes / "00001.tar").read_bytes()
    (folder / "00001.tar").write_bytes(whole[: len(whole) // 2])
    return folder


def test_bad_samples_stand_in_the_rejects_table(bad_source, encode_shapes, tmp_path):
    import lance

    result = encode_shapes(bad_source, tmp_path / "t.lance")
    rejects = lance.dataset(rejects_uri(result.table.uri)).to_table().to_pylist()
    found = {row["key"]: row["reason"] for row in rejects}
    assert found == {
        "truncated": "unreadable_image",
        "html": "unreadable_image",
        "lonely": "missing_image",
        "silent": "missing_caption",
        "blank": "empty_caption",
        "latin": "caption_not_utf8",
        "": "broken_shard",
    }
    assert all(row["shard"] and row["detail"] for row in rejects)
    assert result.report["rejects"] == 7
    assert result.report["rejects_by_reason"]["unreadable_image"] == 2
    assert {row["key"] for row in content(result.table.uri)} >= {f"good{n}" for n in range(8)}


def test_too_many_rejects_stop_the_run_before_publishing(bad_source, encode_shapes, tmp_path):
    with pytest.raises(SourceError, match=r"7 of .*unreadable_image 2.*--max-reject-share"):
        encode_shapes(bad_source, tmp_path / "t.lance", max_reject_share=0.01)
    with pytest.raises(TableError, match="no table at"):
        open_table(tmp_path / "t.lance")
    # Allowing more goes on from what was encoded.
    assert encode_shapes(bad_source, tmp_path / "t.lance", max_reject_share=0.5).report["rejects"] == 7


def test_latents_that_are_not_finite_are_rejected(shapes, encode_shapes, tmp_path, monkeypatch):
    import lance

    whole = DiffusersAutoencoder.encode

    def broken(self, pixels):
        latent = whole(self, pixels)
        if len(latent) > 4:
            latent[1] = np.nan
            latent[2] = 0
            latent[3] = 1e6
        return latent

    monkeypatch.setattr(DiffusersAutoencoder, "encode", broken)
    result = encode_shapes(shapes, tmp_path / "t.lance", limit=32)
    rejects = lance.dataset(rejects_uri(result.table.uri)).to_table().to_pylist()
    assert [row["reason"] for row in rejects] == ["bad_latent"] * 3
    assert sorted(row["detail"] for row in rejects) == ["all zero", *["not finite in float16"] * 2]
    assert result.report["rows"] == 29


def test_limit_reads_the_first_samples(encoded, shapes, encode_shapes, tmp_path):
    table = encode_shapes(shapes, tmp_path / "t.lance", limit=130).table
    keys = {row["key"] for row in content(table.uri)}
    assert keys == {f"{number:08d}" for number in range(130)}


def test_other_storage_of_images_is_left_out_by_default(shapes, encode_shapes, tmp_path):
    schema = encode_shapes(shapes, tmp_path / "t.lance", limit=20).table.dataset().schema
    assert "image" not in schema.names
    assert schema.field("vector").type == pa.list_(pa.float16(), 56)


def test_an_empty_source_is_refused(tmp_path, encode_shapes):
    with tarfile.open(tmp_path / "empty.tar", "w"):
        pass
    with pytest.raises(SourceError, match="no samples"):
        encode_shapes(tmp_path / "empty.tar", tmp_path / "t.lance")
    assert not (tmp_path / "t.lance").exists()


def test_a_dry_run_writes_nothing(shapes, image_encoder, text_encoder, tmp_path):
    config = EncodeConfig(
        shards=tuple(list_shards([str(shapes)])),
        image_encoder=image_encoder,
        text_encoder=text_encoder,
        image_size=32,
    )
    result = encode(config, RunConfig(), str(tmp_path / "t.lance"), dry_run=True)
    assert result.report == {"shards": 3, "latent_shape": [2, 4, 4], "text_width": 16}
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"desc_scale": 1.0}, "--desc-scale 1 "),
        ({"geometry": "torus"}, "--geometry 'torus'"),
        ({"heldout_share": 1.5}, "--heldout-share 1.5"),
        ({"max_reject_share": -0.1}, "--max-reject-share -0.1"),
        ({"limit": 0}, "--limit 0"),
    ],
)
def test_options_are_checked_first(shapes, encode_shapes, tmp_path, options, said):
    with pytest.raises(OptionError, match=said):
        encode_shapes(shapes, tmp_path / "t.lance", **options)
    assert not list(tmp_path.iterdir())


def test_an_encoder_that_is_not_there_is_said(shapes, text_encoder, tmp_path):
    config = EncodeConfig(
        shards=tuple(list_shards([str(shapes)])), image_encoder="nowhere", text_encoder=text_encoder, image_size=32
    )
    with pytest.raises(EncoderError, match="no folder nowhere"):
        encode(config, RunConfig(), str(tmp_path / "t.lance"))
    assert not list(tmp_path.iterdir())


def test_real_pictures_encode(encode_shapes, tmp_path):
    """Emoji and handwritten digits in the layouts of img2dataset and of Hugging Face."""
    data = Path(__file__).parents[2] / "shared" / "data"
    if not data.is_dir():
        pytest.skip("the real picture sets are not beside this checkout")
    for name, shard in (("noto-emoji", "00000.tar"), ("mnist", "test-00000.parquet"), ("nlvr", "00000.tar")):
        result = encode_shapes(data / name / shard, tmp_path / f"{name}.lance", limit=100)
        assert (result.report["rows"], result.report["rejects"]) == (100, 0)
        shutil.rmtree(result.table.uri)


def test_demo_data_of_another_size_is_scaled(image_encoder, text_encoder, encode_shapes, tmp_path):
    write_demo_data(tmp_path / "large", samples=10, size=48, seed=1)
    rows = content(encode_shapes(tmp_path / "large", tmp_path / "t.lance", heldout_share=0.0).table.uri)
    assert {(row["width"], row["height"]) for row in rows} == {(48, 48)}
