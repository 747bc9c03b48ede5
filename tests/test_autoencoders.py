"""Autoencoders learn a little in a few steps, and are saved as ordinary encoders."""

import json

import numpy as np
import pytest
import torch

from index.errors import OptionError, SourceError
from pipeline.encoders.image import DiffusersAutoencoder
from pipeline.encoders.text import TransformersTextEncoder
from trainer.autoencoders import data
from trainer.autoencoders.data import load_captions, load_images
from trainer.autoencoders.image import ImageAutoencoderConfig, fit_image_autoencoder, psnr
from trainer.autoencoders.text import TextAutoencoderConfig, fit_text_autoencoder, train_tokenizer


@pytest.mark.slow
def test_image_autoencoder_learns_and_is_an_ordinary_diffusers_folder(shapes, tmp_path):
    report = fit_image_autoencoder([str(shapes)], ImageAutoencoderConfig(steps=150), tmp_path)
    images = load_images([str(shapes)], 32, val_fraction=0.05, limit=10**6)
    assert report["heldout_images"] == len(images.heldout)
    assert report["train_images"] + report["heldout_images"] == 360
    encoder = DiffusersAutoencoder(str(tmp_path))
    latent = encoder.encode(images.heldout)
    assert list(latent.shape[1:]) == report["latent_shape"] == [2, 4, 4]
    error = np.square(encoder.decode(latent) / 255.0 - images.heldout / 255.0).mean((1, 2, 3))
    assert np.mean(-10 * np.log10(error)) == pytest.approx(report["psnr_db"], abs=0.1)
    mean = images.train.mean(0)
    baseline = np.mean(-10 * np.log10(np.square((images.heldout - mean) / 255.0).mean((1, 2, 3))))
    assert report["psnr_db"] > baseline + 0.3
    assert json.loads((tmp_path / "config.json").read_text())["_class_name"] == "AutoencoderKL"
    assert (tmp_path / "tensorboard").is_dir()


def test_psnr_is_its_formula():
    class Brighter(torch.nn.Module):
        """An autoencoder whose reconstructions are one gray level of 255 too bright."""

        def encode(self, x):
            return type("E", (), {"latent_dist": type("D", (), {"mode": staticmethod(lambda: x)})})

        def decode(self, z):
            return type("S", (), {"sample": z + 2 / 255})

    pixels = np.full((3, 4, 4, 3), 100, np.uint8)
    assert psnr(Brighter(), pixels) == pytest.approx(20 * np.log10(255), rel=1e-5)


@pytest.mark.slow
def test_text_autoencoder_learns_and_is_an_ordinary_transformers_folder(shapes, tmp_path):
    report = fit_text_autoencoder([str(shapes)], TextAutoencoderConfig(steps=150, batch_size=32), tmp_path)
    assert 0.5 < report["token_accuracy"] <= 1
    assert report["caption_accuracy"] <= report["token_accuracy"]
    encoder = TransformersTextEncoder(str(tmp_path))
    assert encoder.ref.class_name == "BertModel"
    rows = encoder.encode(["a small red circle above a large blue square", "a large blue square"])
    assert rows.shape == (2, report["text_dim"])
    assert not np.allclose(rows[0], rows[1], atol=1e-2)


def test_a_tokenizer_is_the_same_each_time():
    """Including ties in the counts, of which these words have many."""
    words = [f"{a}{b}ing {b}{a}ed, {a}" for a in "abcdefgh" for b in "ijklmnop"]
    once, *others = (train_tokenizer(words, TextAutoencoderConfig(vocab_size=120)).get_vocab() for _ in range(10))
    assert all(other == once for other in others)


def test_same_seed_same_weights(shapes, tmp_path):
    digests = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        fit_text_autoencoder([str(shapes)], TextAutoencoderConfig(steps=3, seed=seed), tmp_path / name)
        digests.append(TransformersTextEncoder(str(tmp_path / name)).ref.digest)
    assert digests[0] == digests[1] != digests[2]


def test_images_are_read_up_to_a_limit_and_a_memory_bound(shapes, monkeypatch):
    def count(limit):
        split = load_images([str(shapes)], 32, val_fraction=0.2, limit=limit)
        return len(split.train) + len(split.heldout)

    assert count(50) == 50
    monkeypatch.setattr(data, "MAX_BYTES", 3 * 32 * 32 * 70)
    assert count(10**6) == 70


def test_equal_captions_are_in_one_split(shapes):
    train, heldout = load_captions([str(shapes)], val_fraction=0.3, limit=10**6)
    assert not set(train) & set(heldout)
    assert len(train) == len(set(train))
    assert 0.15 < len(heldout) / (len(train) + len(heldout)) < 0.45


def test_images_are_split_as_a_table_is(encoded, shapes):
    images = load_images([str(shapes)], 32, val_fraction=0.2, limit=10**6)
    assert len(images.heldout) == encoded.dataset().count_rows("split = 'heldout'")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"image_size": 72},
            "--image-size 72 is not --latent-size 4 times .*: use for instance --image-size 32",
        ),
        ({"image_size": 8, "latent_size": 8}, "--image-size 8 is not"),
        ({"image_size": 0}, "--image-size 0 is out of range"),
        ({"size": "huge"}, "--size 'huge' is unknown: choose one of tiny, small, base, large"),
        ({"latent_size": 0}, "--latent-size 0 is out of range"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(options, message):
    with pytest.raises(OptionError, match=message):
        ImageAutoencoderConfig(**options)
    with pytest.raises(OptionError, match="--size"):
        TextAutoencoderConfig(size="huge")


def test_levels_follow_the_image_size():
    assert ImageAutoencoderConfig(image_size=32).block_out_channels == (8, 16, 32, 64)
    assert ImageAutoencoderConfig(image_size=64).block_out_channels == (8, 16, 32, 64, 64)
    assert ImageAutoencoderConfig(image_size=64, latent_size=8, size="small").block_out_channels == (16, 32, 64, 128)


def test_a_source_without_images_is_refused(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"caption": ["only words"] * 5}), tmp_path / "words.parquet")
    with pytest.raises(SourceError, match="no training images"):
        load_images([str(tmp_path / "words.parquet")], 32, val_fraction=0.1, limit=10)
    train, heldout = load_captions([str(tmp_path / "words.parquet")], val_fraction=0.0, limit=10)
    assert (train, heldout) == (["only words"], [])
    report = fit_text_autoencoder(
        [str(tmp_path / "words.parquet")], TextAutoencoderConfig(steps=1, val_fraction=0.0), tmp_path / "out"
    )
    assert (report["token_accuracy"], report["heldout_captions"]) == (None, 0)
