"""Small real inputs that many tests need: drawn shapes, encoders saved to disk, an encoded and an indexed table."""

import io
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from index.build.build_index import BuildConfig, build_index
from index.table.storage import Storage
from index.table.table import Table, open_table, rejects_uri
from pipeline.config import RuntimeConfig
from pipeline.demo.shapes import write_demo_data
from pipeline.encode.plan import plan_encode
from pipeline.encode.run import encode_dataset

torch.set_num_threads(1)

SAMPLES, IMAGE_SIZE = 360, 32
COLORS = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 220)}


@pytest.fixture(scope="session")
def shapes(tmp_path_factory) -> Path:
    """360 captioned shapes in three shards."""
    out = tmp_path_factory.mktemp("shapes")
    write_demo_data(out, num_samples=SAMPLES, image_size=IMAGE_SIZE, seed=0, samples_per_shard=120)
    return out


@pytest.fixture(scope="session")
def image_encoder(tmp_path_factory) -> str:
    """A small AutoencoderKL of 2x4x4 latents, saved as diffusers saves it."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("image_encoder")
    AutoencoderKL(
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=2,
        norm_num_groups=4,
        mid_block_add_attention=False,
    ).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def changed_encoder(image_encoder, tmp_path_factory) -> str:
    """The same autoencoder with one weight changed."""
    folder = tmp_path_factory.mktemp("changed") / "image_encoder"
    shutil.copytree(image_encoder, folder)
    path = folder / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    weights["encoder.conv_in.bias"] += 1
    save_file(weights, path, {"format": "pt"})
    return str(folder)


@pytest.fixture(scope="session")
def tokenizer():
    """A word-level tokenizer of the shapes' vocabulary."""
    from pipeline.demo.shapes import all_scenes
    from trainer.autoencoders.text import TextAutoencoderConfig, train_tokenizer

    captions = [scene.caption for _, scene in zip(range(2000), all_scenes(), strict=False)]
    return train_tokenizer(captions, TextAutoencoderConfig(vocab_size=200))


@pytest.fixture(scope="session")
def text_encoder(tmp_path_factory, tokenizer) -> str:
    """A small BERT of 16 dimensions with its tokenizer, saved as transformers saves it."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("text_encoder")
    shape = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=48,
    )
    BertModel(shape).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def encode_shapes(image_encoder, text_encoder):
    """A function that encodes a source into a table with the small encoders."""

    def run(source, table, *, num_workers: int = 1, dry_run: bool = False, storage=None, part=None, **options):
        runtime = RuntimeConfig(
            num_workers=num_workers, batch_size=32, device="cpu", storage=storage or Storage(), part=part
        )
        options = {
            "image_encoder": image_encoder,
            "text_encoder": text_encoder,
            "image_size": IMAGE_SIZE,
            "val_fraction": 0.2,
        } | options
        sources = [str(each) for each in (source if isinstance(source, list) else [source])]
        config = plan_encode(sources, options, runtime)
        return encode_dataset(config, runtime, str(table), dry_run=dry_run, sources=sources)

    return run


@pytest.fixture(scope="session")
def encoded(tmp_path_factory, shapes, encode_shapes) -> Table:
    """The shapes as a table without an index; do not change it."""
    return encode_shapes(shapes, tmp_path_factory.mktemp("db") / "shapes.lance", keep_images=True).table


@pytest.fixture(scope="session")
def indexed(tmp_path_factory, shapes, encode_shapes) -> Table:
    """The shapes as a table with an IVF_RQ index; do not change it."""
    table = encode_shapes(shapes, tmp_path_factory.mktemp("db") / "indexed.lance").table
    return build_index(open_table(table.uri), BuildConfig(index_type="ivf_rq", target_recall=0.95)).table


@pytest.fixture(scope="session")
def content():
    """A function that returns all rows of a table, sorted by id."""

    def read(table: Table) -> list[dict]:
        return sorted(table.dataset().to_table().to_pylist(), key=lambda row: row["id"])

    return read


@pytest.fixture(scope="session")
def rejects():
    """A function that returns all rows of a table's rejects."""

    def read(table: Table) -> list[dict]:
        import lance

        return lance.dataset(rejects_uri(table.uri), storage_options=table.storage.lance).to_table().to_pylist()

    return read


@pytest.fixture(scope="session")
def write_tar():
    """A function that writes members to a tar in their order."""

    def write(path: Path, members: list[tuple[str, bytes]]) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(path, "w") as tar:
            for name, data in members:
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
        return path

    return write


@pytest.fixture
def three_threads():
    """Torch with another number of threads than anything of ours chooses."""
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def colored(tmp_path_factory, write_tar, encode_shapes):
    """A table of noisy images in three colors, which are their captions; the image bytes are kept."""
    folder, rng, members = tmp_path_factory.mktemp("colored"), np.random.default_rng(0), []
    for number in range(240):
        name, color = list(COLORS.items())[number % 3]
        noise = rng.integers(-20, 21, size=(8, 8, 3)).repeat(4, 0).repeat(4, 1)
        data = io.BytesIO()
        Image.fromarray((np.array(color) + noise).clip(0, 255).astype(np.uint8)).save(data, "png")
        members += [(f"{number:03}.png", data.getvalue()), (f"{number:03}.txt", name.encode())]
    source = write_tar(folder / "00000.tar", members)
    table = encode_shapes(source, folder / "colored.lance", keep_images=True, val_fraction=0.25).table
    return build_index(open_table(table.uri), BuildConfig(index_type="none")).table
