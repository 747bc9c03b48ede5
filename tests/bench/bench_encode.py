"""Measure `pipeline encode` against the encoders alone, and its peak memory as the number of images grows.

All on the same JPEG images of 256 pixels, encoded at 128, in one run:
  a  the autoencoder and the text model alone on decoded batches in memory, one torch thread
  b  `pipeline encode --num-workers 1`, from the first shard to the published table
  c  `pipeline encode --num-workers 2`, including the start of the workers; `midway` is the rate between one fifth and
     four fifths of the images, which excludes it
  two_models  the models alone in two processes at once: the speedup that the machine's second core allows
Prints JSON with medians over the rounds.

    python tests/bench/bench_encode.py [--num-images 1000] [--rounds 3]
"""

import argparse
import io
import json
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np
from machine import machine

IMAGE_SIZE, IMAGES_PER_SHARD, BATCH_SIZE = 128, 125, 64


def write_images(folder: Path, count: int) -> None:
    """Write smooth random JPEG images with captions of eight random words, 125 per shard."""
    from PIL import Image

    folder.mkdir()
    for first in range(0, count, IMAGES_PER_SHARD):
        with tarfile.open(folder / f"{first // IMAGES_PER_SHARD:05d}.tar", "w") as tar:
            for number in range(first, min(first + IMAGES_PER_SHARD, count)):
                rng = np.random.default_rng([7, number])
                rough = Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8))
                data = io.BytesIO()
                rough.resize((256, 256), Image.Resampling.BICUBIC).save(data, "jpeg", quality=90)
                caption = " ".join(f"word{word}" for word in rng.integers(0, 400, 8))
                for extension, content in (("jpg", data.getvalue()), ("txt", caption.encode())):
                    member = tarfile.TarInfo(f"{number:08d}.{extension}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))


def save_encoders(folder: Path) -> tuple[str, str]:
    """Save AutoencoderTiny in its default size (that of taesd) and a BERT of four layers, with random weights."""
    import torch
    from diffusers import AutoencoderTiny
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    torch.manual_seed(0)
    image, text = folder / "image", folder / "text"
    AutoencoderTiny().save_pretrained(image)
    vocabulary = {word: token for token, word in enumerate(["[PAD]", "[UNK]", *(f"word{n}" for n in range(400))])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    BertModel(
        BertConfig(
            vocab_size=len(vocabulary),
            hidden_size=256,
            num_hidden_layers=4,
            num_attention_heads=4,
            intermediate_size=1024,
        )
    ).save_pretrained(text)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(text)
    return str(image), str(text)


def models_rate(source: Path, image: str, text: str, count: int) -> float:
    """Return images per second of the models alone."""
    import torch
    from diffusers import AutoencoderTiny
    from transformers import AutoTokenizer, BertModel

    from pipeline.images import decode_image
    from pipeline.sources.listing import list_shards
    from pipeline.sources.read import read_samples
    from pipeline.sources.sample import decode_caption

    torch.set_num_threads(1)
    images, captions = [], []
    for shard in list_shards([str(source)]):
        for sample in read_samples(shard):
            images.append(decode_image(sample.image, IMAGE_SIZE).pixels)
            captions.append(decode_caption(sample.caption))
            if len(images) == count:
                break
        else:
            continue
        break
    autoencoder, model = AutoencoderTiny.from_pretrained(image).eval(), BertModel.from_pretrained(text).eval()
    tokenizer = AutoTokenizer.from_pretrained(text)

    def encode(first: int) -> None:
        pixels = torch.from_numpy(np.stack(images[first : first + BATCH_SIZE])).permute(0, 3, 1, 2).float() / 127.5 - 1
        autoencoder.encode(pixels).latents.numpy()
        tokens = tokenizer(captions[first : first + BATCH_SIZE], padding=True, return_tensors="pt")
        model(**tokens).last_hidden_state.numpy()

    with torch.inference_mode():
        encode(0)
        start = time.perf_counter()
        for first in range(0, count, BATCH_SIZE):
            encode(first)
        return count / (time.perf_counter() - start)


def models_rates(command: list[str], processes: int) -> list[float]:
    """Return images per second of each of several processes that run `models_rate` at once."""
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(processes)]
    return [float(process.communicate()[0]) for process in running]


RUN = """
import json, resource, sys
from pipeline.cli import main
try:
    main()
finally:
    peak = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    print(json.dumps({"peak_kib": peak}))
"""


def encode(source: Path, table: Path, image: str, text: str, num_workers: int) -> dict[str, float]:
    """Return rates, times by step and the peak memory of the largest process of one `pipeline encode`."""
    command = [sys.executable, "-c", RUN, "encode", str(source), "--table", str(table), "--image-size", str(IMAGE_SIZE)]
    command += ["--image-encoder", image, "--text-encoder", text, "--num-workers", str(num_workers), "--device", "cpu"]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    report = json.loads((table.parent / f"{table.stem}.reports/encode.json").read_text())
    lines = (table.parent / f"{table.stem}.reports/encode.jsonl").read_text().splitlines()
    ticks = [json.loads(line) for line in lines]
    one, four = (next(tick for tick in ticks if tick["done"] >= fifths * report["rows"] / 5) for fifths in (1, 4))
    return {
        "rate": report["images_per_second"],
        "midway": (four["done"] - one["done"]) / (four["seconds"] - one["seconds"]),
        "peak_mib": json.loads(out.splitlines()[-1])["peak_kib"] / 1024,
        "seconds_by_step": report["seconds_by_step"],
    }


def main() -> None:
    """Measure in turns, so that other load on the machine slows all alike, and print medians over the rounds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-images", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--models-alone", type=Path, nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.models_alone:
        source, image, text = arguments.models_alone
        print(models_rate(source, str(image), str(text), min(arguments.num_images, 512)))
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_images(folder / "all", arguments.num_images)
        write_images(folder / "quarter", arguments.num_images // 4)
        image, text = save_encoders(folder)
        command = [sys.executable, __file__, "--num-images", str(arguments.num_images), "--models-alone"]
        command += [str(folder / "all"), image, text]
        models, two_models, one_worker, two_workers = [], [], [], []
        for number in range(arguments.rounds):
            models += models_rates(command, 1)
            two_models.append(sum(models_rates(command, 2)))
            one_worker.append(encode(folder / "all", folder / f"one{number}.lance", image, text, 1))
            two_workers.append(encode(folder / "all", folder / f"two{number}.lance", image, text, 2))
        quarter = encode(folder / "quarter", folder / "quarter.lance", image, text, 1)
    a = statistics.median(models)
    b, c = (statistics.median(run["rate"] for run in runs) for runs in (one_worker, two_workers))
    midway = [statistics.median(run["midway"] for run in runs) for runs in (one_worker, two_workers)]
    peak = statistics.median(run["peak_mib"] for run in one_worker)
    result = {
        "machine": machine(),
        "num_images": arguments.num_images,
        "rounds": arguments.rounds,
        "images_per_second": {"a_models_alone": a, "b_one_worker": b, "c_two_workers": c},
        "b_of_a": b / a,
        "c_of_b": c / b,
        "midway": {"b_of_a": midway[0] / a, "c_of_b": midway[1] / midway[0]},
        "two_models_of_a": statistics.median(two_models) / a,
        "peak_mib": {"quarter": quarter["peak_mib"], "all": peak},
        "memory_of_four_times_the_images": peak / quarter["peak_mib"],
        "seconds_by_step": one_worker[-1]["seconds_by_step"],
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
