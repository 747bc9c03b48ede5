"""Autoencoders learn a little in a few steps, from sources of any size, and are saved as ordinary encoders."""

import contextlib
import json
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from killed_runs import KILL_9, Killed, KillSwitch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import trainer.autoencoders.run as run_module
import trainer.autoencoders.text as text_module
import trainer.loop as loop_module
from index.errors import OptionError, RunError, SourceError
from pipeline.encoders.image import DiffusersAutoencoder
from pipeline.encoders.text import TransformersTextEncoder
from pipeline.rejects import Rejected, RejectReason
from pipeline.sources.listing import list_shards
from pipeline.sources.sample import ReadOptions, Sample
from trainer.autoencoders import data
from trainer.autoencoders.data import Batches, Position, Samples
from trainer.autoencoders.image import (
    ImageAutoencoderConfig,
    fit_image_autoencoder,
    image_samples,
    latent_statistics,
    psnr,
)
from trainer.autoencoders.run import check_is_new
from trainer.autoencoders.text import TextAutoencoderConfig, caption_samples, fit_text_autoencoder, train_tokenizer
from trainer.autoencoders.train import TrainRuntime

CPU = TrainRuntime(device="cpu")
EVERY_STEP = TrainRuntime(device="cpu", checkpoint_seconds=0.0, keep_checkpoints=100)
TIMED = ("seconds", "captions_per_second", "images_per_second", "waiting_fraction")
FITS = {"image": (fit_image_autoencoder, ImageAutoencoderConfig), "text": (fit_text_autoencoder, TextAutoencoderConfig)}
WEIGHTS = {"image": "diffusion_pytorch_model.safetensors", "text": "model.safetensors"}


def images_of(source, **options):
    """The first window of a source's images."""
    config = ImageAutoencoderConfig(steps=10**6, **options)
    return image_samples(list_shards([str(source)]), config, ReadOptions()).read_first()


def captions_of(source, **options):
    config = TextAutoencoderConfig(steps=10**6, **options)
    return caption_samples(list_shards([str(source)]), config, ReadOptions()).read_first()


def scalars(out: Path, tag: str) -> dict[int, float]:
    """What TensorBoard shows of a metric, by images or captions trained on."""
    return {event.step: event.value for event in events(out).Scalars(tag)}


def events(out: Path) -> EventAccumulator:
    accumulator = EventAccumulator(str(out / "training" / "tensorboard"))
    return accumulator.Reload()


@pytest.mark.slow
def test_image_autoencoder_learns_and_is_an_ordinary_diffusers_folder(shapes, tmp_path):
    from diffusers import AutoencoderKL

    config = ImageAutoencoderConfig(steps=150, val_fraction=0.3)
    report = fit_image_autoencoder([str(shapes)], config, tmp_path, runtime=CPU)
    images = images_of(shapes, val_fraction=0.3)
    heldout = np.stack(images.heldout)
    assert report["heldout_images"] == len(heldout)
    assert report["train_images"] + report["heldout_images"] == 360
    encoder = DiffusersAutoencoder(str(tmp_path))
    latent = encoder.encode(heldout)
    assert list(latent.shape[1:]) == report["latent_shape"] == [2, 4, 4]
    decoded = encoder.decode(latent)
    error = np.square(decoded / 255.0 - heldout / 255.0).mean((1, 2, 3))
    assert np.mean(-10 * np.log10(error)) == pytest.approx(report["psnr_db"], abs=0.1)
    mean = np.stack(images.train).mean(0)
    baseline = np.mean(-10 * np.log10(np.square((heldout - mean) / 255.0).mean((1, 2, 3))))
    assert report["psnr_db"] > baseline + 0.3
    # Latents of images that were not trained on are near zero mean and unit variance; decoding inverts that.
    by_channel = latent.transpose(1, 0, 2, 3).reshape(2, -1)
    assert np.abs(by_channel.mean(1)).max() < 0.15
    assert np.abs(by_channel.var(1) - 1).max() < 0.2
    model = AutoencoderKL.from_pretrained(tmp_path).eval()
    assert not np.allclose(model.config.latents_std, 1, atol=1e-3)
    with torch.no_grad():
        raw = model.encode(torch.from_numpy(heldout).permute(0, 3, 1, 2) / 127.5 - 1).latent_dist.mode()
        image = ((model.decode(raw).sample + 1) * 127.5).round().clamp(0, 255).permute(0, 2, 3, 1).numpy()
    assert np.abs(decoded - image).max() <= 1
    shown = scalars(tmp_path, "psnr_db")
    assert shown[150 * config.batch_size] == pytest.approx(report["psnr_db"], abs=1e-3)
    assert "reconstructions" in events(tmp_path).Tags()["images"]
    page = (tmp_path / "training" / "index.html").read_text()
    assert f"{report['psnr_db']:.4g}" in page
    assert "data:image/png" in page


def test_psnr_is_its_formula():
    class Brighter(torch.nn.Module):
        """An autoencoder whose reconstructions are one gray level of 255 too bright."""

        def encode(self, x):
            return type("E", (), {"latent_dist": type("D", (), {"mode": staticmethod(lambda: x)})})

        def decode(self, z):
            return type("S", (), {"sample": z + 2 / 255})

    pixels = list(np.full((3, 4, 4, 3), 100, np.uint8))
    assert psnr(Brighter(), pixels) == pytest.approx(20 * np.log10(255), rel=1e-5)


def test_latent_statistics_are_those_of_all_latents_in_whatever_batches():
    class Same(torch.nn.Module):
        def encode(self, x):
            return type("E", (), {"latent_dist": type("D", (), {"mode": staticmethod(lambda: x)})})

    pixels = np.random.default_rng(0).integers(0, 100, (230, 32, 32, 3), dtype=np.uint8)
    pixels[..., 2] = 7
    mean, std = latent_statistics(Same(), list(pixels))
    signal = pixels / 127.5 - 1
    assert np.allclose(mean, signal.mean((0, 1, 2)), atol=1e-5)
    assert np.allclose(std[:2], signal.std((0, 1, 2))[:2], atol=1e-5)
    assert 0 < std[2] < 1e-3  # a channel without variance does not make latents infinite


@pytest.mark.slow
def test_text_autoencoder_learns_and_is_an_ordinary_transformers_folder(shapes, tmp_path):
    config = TextAutoencoderConfig(steps=150, batch_size=32)
    report = fit_text_autoencoder([str(shapes)], config, tmp_path, runtime=CPU)
    assert 0.5 < report["token_accuracy"] <= 1
    assert report["caption_accuracy"] <= report["token_accuracy"]
    encoder = TransformersTextEncoder(str(tmp_path))
    assert encoder.ref.class_name == "BertModel"
    rows = encoder.encode(["a small red circle above a large blue square", "a large blue square"])
    assert rows.shape == (2, report["text_dim"])
    assert not np.allclose(rows[0], rows[1], atol=1e-2)
    assert scalars(tmp_path, "token_accuracy")[150 * 32] == pytest.approx(report["token_accuracy"], abs=1e-5)
    heldout = captions_of(shapes).heldout
    assert heldout[0] in (tmp_path / "training" / "index.html").read_text()


def test_a_tokenizer_is_the_same_each_time():
    """Including ties in the counts, of which these words have many."""
    words = [f"{a}{b}ing {b}{a}ed, {a}" for a in "abcdefgh" for b in "ijklmnop"]
    once, *others = (train_tokenizer(words, TextAutoencoderConfig(vocab_size=120)).get_vocab() for _ in range(10))
    assert all(other == once for other in others)


def test_same_seed_same_weights(shapes, tmp_path):
    digests = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        fit_text_autoencoder([str(shapes)], TextAutoencoderConfig(steps=3, seed=seed), tmp_path / name, runtime=CPU)
        digests.append(TransformersTextEncoder(str(tmp_path / name)).ref.digest)
    assert digests[0] == digests[1] != digests[2]


# Sources of any size


@pytest.fixture
def numbers(monkeypatch):
    """Seven shards of 0 to 9 numbers each, read as samples; every tenth is not valid."""
    shards = {f"shard{i}": range(10 * i, 10 * i + (3 * i) % 10) for i in range(7)}
    opened = []

    def read(shard, options):
        opened.append(shard)
        for number in shards[shard]:
            yield Sample(str(number), shard, None, str(number).encode(), b"{}")

    def decode(sample):
        number = int(sample.caption)
        if number % 10 == 5:
            raise Rejected(RejectReason.MISSING_IMAGE, "")
        return number, bytes([number * 37 % 256] * 16)

    monkeypatch.setattr(data, "read_samples", read)

    def make(**options):
        settings = {"window": 4, "val_fraction": 0.2} | options
        return Samples(kind="numbers", shards=list(shards), decode=decode, **settings)

    make.valid = [number for shard in shards.values() for number in shard if number % 10 != 5]
    make.opened = opened
    return make


def windows_of(samples, count, begin=None):
    source = samples.read_from(samples.read_first(), begin or Position())
    return [next(source) for _ in range(count)]


def test_windows_hold_each_sample_once_an_epoch_and_no_more_than_they_may(numbers):
    windows = windows_of(numbers(), 30)
    assert max(len(window.train) + len(window.heldout) for window in windows) == 4
    for epoch in (0, 1):
        read = [number for each in windows if each.begin.epoch == epoch for number in (*each.train, *each.heldout)]
        assert sorted(read) == numbers.valid
    ends = [each.end.distinct for each in windows if each.begin.epoch == 1]
    assert set(ends) == {sum(len(each.train) for each in windows if each.begin.epoch == 0)}


def test_windows_are_the_same_from_wherever_reading_begins(numbers):
    windows = windows_of(numbers(), 20)
    for skipped in range(20):
        assert windows_of(numbers(), 20 - skipped, windows[skipped].begin) == windows[skipped:]


def test_a_source_of_one_window_is_read_once(numbers):
    windows = windows_of(numbers(window=100), 5)
    assert all(window is windows[0] for window in windows)
    assert windows[0].is_whole
    assert len(numbers.opened) == 7


def test_the_seed_decides_the_order_of_shards(numbers):
    first, same, other = ([each.train for each in windows_of(numbers(seed=seed), 7)] for seed in (0, 0, 1))
    assert first == same != other


@pytest.mark.parametrize("limit", [7, 30])
def test_a_limit_takes_the_first_samples_in_every_epoch(numbers, limit):
    windows = windows_of(numbers(limit=limit, val_fraction=0.0), 20)
    for epoch in (0, 1):
        read = [number for each in windows if each.begin.epoch == epoch for number in each.train]
        assert read == numbers.valid[:limit]


def drawn(samples, steps, start=0, position=None):
    """Batches from a step on, with the position after each."""
    batches = Batches(samples, batch_size=3, steps=steps, seed=1)
    position = position or {}
    return [(step, batch, batches.position(step + 1)) for step, batch in batches.read(start, position)]


@pytest.mark.parametrize("window", [4, 100])
def test_batches_are_the_same_from_whatever_step_training_resumes(numbers, window):
    whole = drawn(numbers(window=window), 40)
    assert [step for step, _, _ in whole] == list(range(40))
    for step, _, position in whole[:-1]:
        assert drawn(numbers(window=window), 40, step + 1, json.loads(json.dumps(position))) == whole[step + 1 :]


def test_batches_draw_each_training_sample_once_a_window_but_to_fill_the_last(numbers):
    samples = numbers(window=100)
    train = samples.read_first().train
    steps = -(-len(train) // 3)
    batches = [batch for _, batch, _ in drawn(samples, 2 * steps)]
    once, again = ([item for batch in part for item in batch] for part in (batches[:steps], batches[steps:]))
    assert sorted(once[: len(train)]) == sorted(again[: len(train)]) == sorted(train)
    assert once != again
    assert all(len(batch) == 3 for batch in batches)


def test_a_source_smaller_than_a_batch_is_drawn_several_times(numbers):
    ((_, batch, _),) = drawn(numbers(limit=1, val_fraction=0.0), 1)
    assert batch == [numbers.valid[0]] * 3


def test_a_source_that_is_gone_ends_training(numbers, monkeypatch):
    samples = numbers()
    first = samples.read_first()
    monkeypatch.setattr(data, "read_samples", lambda shard, options: iter(()))
    with pytest.raises(SourceError, match="the numbers of the source are gone: bring them back and resume"):
        list(samples.read_from(first, first.end))


def test_windows_fit_into_memory_and_are_not_much_larger_than_what_is_drawn(shapes, monkeypatch):
    monkeypatch.setattr(data, "MAX_BYTES", 3 * 32 * 32 * 70)
    window = images_of(shapes)
    assert len(window.train) + len(window.heldout) == 70
    assert data.window_of(1, 15) == data.MIN_SAMPLES
    assert data.window_of(10**9, 15) == 1


def test_equal_captions_are_in_one_split(shapes):
    captions = captions_of(shapes, val_fraction=0.3)
    assert not set(captions.train) & set(captions.heldout)
    assert len(captions.train) == len(set(captions.train))
    assert 0.15 < len(captions.heldout) / (len(captions.train) + len(captions.heldout)) < 0.45


def test_images_are_split_as_a_table_is(encoded, shapes):
    assert len(images_of(shapes, val_fraction=0.2).heldout) == encoded.dataset().count_rows("split = 'heldout'")


def test_shards_that_cannot_be_read_are_warned_of(shapes, tmp_path, capsys):
    copy = shutil.copytree(shapes, tmp_path / "copy")
    shards = sorted(copy.glob("*.tar"))
    shards[1].write_bytes(b"not a tar")
    captions_of(copy)
    assert capsys.readouterr().err.count(f"warning: {shards[1]} is left out from here on") == 1


# Runs


def small(kind: str, **options):
    """A config whose run takes batches from two windows."""
    return FITS[kind][1](**{"steps": 8, "batch_size": 16} | options | ({"image_size": 16} if kind == "image" else {}))


def fit(kind, source, out, config=None, *, resume=False, runtime=EVERY_STEP):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "MAX_BYTES", data.CAPTION_BYTES * 100)
        return FITS[kind][0]([str(source)], config or small(kind), out, resume=resume, runtime=runtime)


def report_of(out: Path) -> dict:
    report = json.loads((out / "report.json").read_text())
    return {name: value for name, value in report.items() if name not in TIMED}


def assert_same_run(kind, run: Path, other: Path) -> None:
    a, b = (load_file(each / WEIGHTS[kind]) for each in (run, other))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert report_of(run) == report_of(other)
    names = {path.name for path in run.iterdir()}
    assert names == {path.name for path in other.iterdir()}
    for name in [*(names - {"report.json", "training"}), "training/index.html"]:
        assert (run / name).read_bytes() == (other / name).read_bytes(), name
    assert not [*other.rglob("*.tmp")]


@pytest.mark.slow
@pytest.mark.parametrize("kind", FITS)
def test_a_run_resumes_from_any_checkpoint_to_the_same_bits(kind, shapes, tmp_path, monkeypatch):
    fit(kind, shapes, tmp_path / "whole")
    save = loop_module.save_checkpoint
    for last in (1, 4, 5, 7, 8):

        def save_and_die(out, step, *arguments, last=last, **options):
            save(out, step, *arguments, **options)
            if step == last:
                raise Killed

        out = tmp_path / f"killed{last}"
        monkeypatch.setattr(loop_module, "save_checkpoint", save_and_die)
        with pytest.raises(Killed):
            fit(kind, shapes, out)
        monkeypatch.undo()
        assert not (out / "config.json").exists()
        fit(kind, shapes, out, resume=True)
        assert_same_run(kind, tmp_path / "whole", out)
        assert len(set(scalars(out, "loss").values())) > 0


@pytest.mark.slow
def test_a_run_can_be_finished_whichever_write_it_was_killed_at(shapes, tmp_path):
    """Every seventh of the writes of a run of two steps, and all that move the model into its folder."""
    switch, config = KillSwitch(), small("text", steps=2, limit=40)
    fit("text", shapes, tmp_path / "whole", config)
    switch.watch(f"{tmp_path}/counted/")
    fit("text", shapes, tmp_path / "counted", config)
    writes = list(switch.writes)
    switch.rest()
    for moment in ("settings.json", "step-000000002", "model.tmp/config.json", "index.html", "report.json"):
        assert moment in " ".join(writes)
    moved = [at for at, write in enumerate(writes) if "os.rename" in write and "model.tmp" in write]
    assert len(moved) == 4
    for at in sorted({*range(0, len(writes), 7), *moved, *range(len(writes) - 8, len(writes))}):
        out = tmp_path / "run"
        switch.watch(f"{out}/", at=at)
        with pytest.raises(Killed):
            fit("text", shapes, out, config)
        switch.rest()
        begun, ended = (out / "training/settings.json").exists(), (out / "report.json").exists()
        if not ended:
            fit("text", shapes, out, config, resume=begun)
        assert_same_run("text", tmp_path / "whole", out)
        shutil.rmtree(out)


@pytest.mark.slow
@pytest.mark.parametrize("place", ["step-000000003.tmp", "model.tmp/config.json", "report.json.tmp"])
def test_kill_9_is_finished_by_resume_without_further_options(shapes, tmp_path, place):
    """In another folder, too: sources are kept by their full path."""
    options = ["--steps", "3", "--batch-size", "8", "--checkpoint-seconds", "0", "--device", "cpu", "--limit", "40"]
    arguments = ["fit-autoencoder", "text", shapes.name, "--out", str(tmp_path / "run"), *options]
    command = [sys.executable, "-c", KILL_9, *arguments, place]
    killed = subprocess.run(command, capture_output=True, text=True, cwd=shapes.parent)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    command = [sys.executable, "-m", "trainer.cli", "fit-autoencoder", "--resume", "--out", "run"]
    code = [sys.executable, "-c", "from trainer.cli import main; main()", *command[3:]]
    subprocess.run(code, check=True, capture_output=True, cwd=tmp_path)
    config = TextAutoencoderConfig(steps=3, batch_size=8, limit=40)
    fit_text_autoencoder([str(shapes)], config, tmp_path / "whole", runtime=EVERY_STEP)
    assert_same_run("text", tmp_path / "whole", tmp_path / "run")


@pytest.mark.slow
def test_all_samples_are_trained_on_whatever_fits_into_memory(shapes, tmp_path):
    """Four windows of one epoch, and none is left out."""
    captions = captions_of(shapes)
    report = fit("text", shapes, tmp_path / "run", small("text", steps=30, batch_size=16))
    assert report["train_captions"] >= len(captions.train)
    assert report["heldout_captions"] < len(captions.heldout)
    assert report["left_out"] == {}


def test_what_is_there_already_is_refused_with_what_to_type(shapes, image_encoder, tmp_path):
    config = small("text", steps=1)
    fit("text", shapes, tmp_path / "run", config)
    with pytest.raises(RunError, match=r"run holds a model already: use another --out"):
        fit("text", shapes, tmp_path / "run", config)
    with pytest.raises(RunError, match=r"run is already trained for 1 steps: use another --out"):
        fit("text", shapes, tmp_path / "run", config, resume=True)
    with pytest.raises(RunError, match="holds a model already"):
        check_is_new(Path(image_encoder))
    (tmp_path / "run" / "report.json").unlink()
    with pytest.raises(RunError, match=r"run holds an autoencoder in training: add --resume to go on"):
        fit("text", shapes, tmp_path / "run", config)
    with pytest.raises(RunError, match=r"is trained with --steps 1, not 2: leave the option out to resume it"):
        fit("text", shapes, tmp_path / "run", replace(config, steps=2), resume=True)
    with pytest.raises(RunError, match=r"is trained with kind text, not image"):
        fit("image", shapes, tmp_path / "run", resume=True)
    with pytest.raises(RunError, match=r"is not an autoencoder in training .* image\|text SOURCE --out"):
        fit("image", shapes, tmp_path / "nothing", resume=True)


def test_several_processes_are_refused(shapes, tmp_path, monkeypatch):
    @contextlib.contextmanager
    def open_two(*arguments, **options):
        yield SimpleNamespace(num_processes=2)

    monkeypatch.setattr(run_module, "open_accelerator", open_two)
    with pytest.raises(OptionError, match="trains in one process: start it without `accelerate launch`"):
        fit("text", shapes, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_no_convenience_ends_a_run(shapes, tmp_path, monkeypatch):
    def fail(*arguments, **options):
        raise ValueError("no page")

    monkeypatch.setattr(text_module, "table", fail)
    report = fit("text", shapes, tmp_path / "run", small("text", steps=2))
    assert report["left_out"] == {"previews": "ValueError: no page", "index.html": "ValueError: no page"}
    assert TransformersTextEncoder(str(tmp_path / "run")).ref.class_name == "BertModel"


def test_a_run_that_diverges_is_ended_with_a_line(shapes, tmp_path):
    config = small("text", learning_rate=1e30)
    with pytest.raises(RunError, match=r"the loss is .* at step .*: train a new run with a lower --learning-rate"):
        fit("text", shapes, tmp_path / "run", config)


@pytest.mark.slow
@pytest.mark.parametrize("kind", FITS)
def test_both_train_in_bfloat16_with_float32_weights(kind, shapes, tmp_path):
    report = fit(kind, shapes, tmp_path / "run", small(kind, steps=3, dtype="bfloat16"))
    assert np.isfinite(report["loss"])
    assert {each.dtype for each in load_file(tmp_path / "run" / WEIGHTS[kind]).values()} == {torch.float32}
    full = fit(kind, shapes, tmp_path / "full", small(kind, steps=3, dtype="float32"))
    assert report["loss"] != full["loss"]
    assert report["loss"] == pytest.approx(full["loss"], rel=0.1)


def test_training_leaves_the_generators_of_the_process_as_they_were(shapes, tmp_path):
    torch.manual_seed(5)
    expected = torch.randn(4)
    torch.manual_seed(5)
    fit("text", shapes, tmp_path / "run", small("text", steps=2))
    assert torch.equal(torch.randn(4), expected)


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
        ({"dtype": "float16"}, "--dtype 'float16' is unknown: choose one of auto, float32, bfloat16"),
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
        images_of(tmp_path / "words.parquet")
    captions = captions_of(tmp_path / "words.parquet", val_fraction=0.0)
    assert (captions.train, captions.heldout) == (["only words"], [])
    report = fit("text", tmp_path / "words.parquet", tmp_path / "out", small("text", steps=1, val_fraction=0.0))
    assert (report["token_accuracy"], report["heldout_captions"]) == (None, 0)
