"""Tables of real pictures, made as a user makes them, once in a folder."""

import shutil
import subprocess
import sys
from pathlib import Path

from index.table.table import Table, open_table

RUN = "import sys; from {0}.cli import main; main()"


def mnist(data: Path, work: Path) -> Table:
    """60,000 digits in 32 latent numbers, with ten captions; the pictures are kept."""
    pictures = sorted(map(str, (data / "mnist").glob("train-*.parquet")))
    image = ["--latent-channels", "2", "--steps", "2000", "--batch-size", "32", "--limit", "20000"]
    return _encoded(work / "mnist.lance", pictures, 32, image, ["--steps", "300"])


def emoji(data: Path, work: Path) -> Table:
    """3,513 emoji in 128 latent numbers, nearly every caption another one."""
    image = ["--latent-channels", "8", "--steps", "2000", "--batch-size", "32"]
    return _encoded(work / "emoji.lance", [str(data / "noto-emoji")], 32, image, ["--size", "small"])


def copy(table: Table, uri: Path) -> Table:
    """The same table elsewhere, to be laid out otherwise."""
    shutil.rmtree(uri, ignore_errors=True)
    shutil.copytree(table.uri, uri)
    return open_table(uri)


def _encoded(table: Path, source: list[str], size: int, image: list[str], text: list[str]) -> Table:
    if not table.exists():
        models = table.with_suffix(".models")
        picture_size = ["--image-size", str(size)]
        if not (models / "image").exists():
            _call("trainer", "fit-autoencoder", "image", *source, "--out", str(models / "image"), *picture_size, *image)
        if not (models / "text").exists():
            _call("trainer", "fit-autoencoder", "text", *source, "--out", str(models / "text"), *text)
        encoders = ["--image-encoder", str(models / "image"), "--text-encoder", str(models / "text")]
        _call("pipeline", "encode", *source, "--table", str(table), *encoders, *picture_size, "--keep-images")
    return open_table(table)


def _call(program: str, *given: str) -> None:
    """Run one of our commands; what it prints goes to standard error."""
    subprocess.run([sys.executable, "-c", RUN.format(program), *given], check=True, stdout=sys.stderr)
