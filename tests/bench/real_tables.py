"""Tables of real images, made by the commands that a user types, once per folder."""

import shutil
import subprocess
import sys
from pathlib import Path

from index.table.table import Table, open_table

RUN = "import sys; from {0}.cli import main; main()"


def mnist(data: Path, work: Path) -> Table:
    """Encode 60,000 digits with ten captions to latents of 32 entries; the images are kept."""
    shards = sorted(map(str, (data / "mnist").glob("train-*.parquet")))
    image = ["--latent-channels", "2", "--steps", "2000", "--batch-size", "32", "--limit", "20000"]
    return _encoded(work / "mnist.lance", shards, 32, image, ["--steps", "300"])


def emoji(data: Path, work: Path) -> Table:
    """Encode 3,513 emoji, nearly all with a caption of their own, to latents of 128 entries."""
    image = ["--latent-channels", "8", "--steps", "2000", "--batch-size", "32"]
    return _encoded(work / "emoji.lance", [str(data / "noto-emoji")], 32, image, ["--size", "small"])


def copy(table: Table, uri: Path) -> Table:
    """Copy a table, to lay the copy out differently."""
    shutil.rmtree(uri, ignore_errors=True)
    shutil.copytree(table.uri, uri)
    return open_table(uri)


def _encoded(table: Path, source: list[str], image_size: int, image: list[str], text: list[str]) -> Table:
    """Train both autoencoders with their options and encode the source, unless the table exists."""
    if not table.exists():
        models = table.with_suffix(".models")
        size = ["--image-size", str(image_size)]
        if not (models / "image").exists():
            _call("trainer", "fit-autoencoder", "image", *source, "--out", str(models / "image"), *size, *image)
        if not (models / "text").exists():
            _call("trainer", "fit-autoencoder", "text", *source, "--out", str(models / "text"), *text)
        encoders = ["--image-encoder", str(models / "image"), "--text-encoder", str(models / "text")]
        _call("pipeline", "encode", *source, "--table", str(table), *encoders, *size, "--keep-images")
    return open_table(table)


def _call(program: str, *args: str) -> None:
    """Run one of our commands with its output on standard error."""
    subprocess.run([sys.executable, "-c", RUN.format(program), *args], check=True, stdout=sys.stderr)
