"""How much of the encoders' own speed `pipeline encode` reaches, and whether its memory grows with the pictures.

On the same JPEG pictures of 256 pixels, encoded at 128, in one run:
  a  the bare autoencoder and text model on decoded batches in memory, one torch thread
  b  `pipeline encode --num-workers 1`, from the first shard to the published table
  c  `pipeline encode --num-workers 2`, the start of the workers included; `midway` is the rate from a fifth of the
     pictures to four fifths, without it
  two_bare  the models alone in two processes at once: what this machine's second core is worth
Prints JSON, medians over the rounds.

    python tests/bench/bench_encode.py [--pictures 1000] [--rounds 3]
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

SIZE, SHARD, BATCH = 128, 125, 64


def write_pictures(folder: Path, count: int) -> None:
    """Smooth random JPEG pictures with captions of eight random words, 125 to a shard."""
    from PIL import Image

    folder.mkdir()
    for first in range(0, count, SHARD):
        with tarfile.open(folder / f"{first // SHARD:05d}.tar", "w") as tar:
            for number in range(first, min(first + SHARD, count)):
                rng = np.random.default_rng([7, number])
                rough = Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8))
                data = io.BytesIO()
                rough.resize((256, 256), Image.Resampling.BICUBIC).save(data, "jpeg", quality=90)
                caption = " ".join(f"word{word}" for word in rng.integers(0, 400, 8))
                for ending, content in (("jpg", data.getvalue()), ("txt", caption.encode())):
                    member = tarfile.TarInfo(f"{number:08d}.{ending}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))


def save_encoders(folder: Path) -> tuple[str, str]:
    """AutoencoderTiny as published (taesd's shape) and a BERT of four layers, with random weights."""
    import torch
    from diffusers import AutoencoderTiny
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    torch.manual_seed(0)
    image, text = folder / "image", folder / "text"
    AutoencoderTiny().save_pretrained(image)
    words = {word: place for place, word in enumerate(["[PAD]", "[UNK]", *(f"word{n}" for n in range(400))])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    BertModel(
        BertConfig(
            vocab_size=len(words), hidden_size=256, num_hidden_layers=4, num_attention_heads=4, intermediate_size=1024
        )
    ).save_pretrained(text)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(text)
    return str(image), str(text)


def bare(source: Path, image: str, text: str, count: int) -> float:
    """Images per second of the models alone."""
    import torch
    from diffusers import AutoencoderTiny
    from transformers import AutoTokenizer, BertModel

    from pipeline.images import decode_image
    from pipeline.sources.listing import list_shards
    from pipeline.sources.read import read_samples
    from pipeline.sources.sample import decode_caption

    torch.set_num_threads(1)
    pictures, captions = [], []
    for shard in list_shards([str(source)]):
        for sample in read_samples(shard):
            pictures.append(decode_image(sample.image, SIZE).pixels)
            captions.append(decode_caption(sample.caption))
            if len(pictures) == count:
                break
        else:
            continue
        break
    autoencoder, model = AutoencoderTiny.from_pretrained(image).eval(), BertModel.from_pretrained(text).eval()
    tokenizer = AutoTokenizer.from_pretrained(text)

    def encode(first: int) -> None:
        pixels = torch.from_numpy(np.stack(pictures[first : first + BATCH])).permute(0, 3, 1, 2).float() / 127.5 - 1
        autoencoder.encode(pixels).latents.numpy()
        model(**tokenizer(captions[first : first + BATCH], padding=True, return_tensors="pt")).last_hidden_state.numpy()

    with torch.inference_mode():
        encode(0)
        began = time.perf_counter()
        for first in range(0, count, BATCH):
            encode(first)
        return count / (time.perf_counter() - began)


def models_alone(command: list[str], processes: int) -> list[float]:
    """Images per second of each of some processes that run `bare` at once."""
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


def encode(source: Path, table: Path, image: str, text: str, workers: int) -> dict[str, float]:
    """Rates and the largest process of one `pipeline encode`."""
    command = [sys.executable, "-c", RUN, "encode", str(source), "--table", str(table), "--image-size", str(SIZE)]
    command += ["--image-encoder", image, "--text-encoder", text, "--num-workers", str(workers), "--device", "cpu"]
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
    """Measure in turns, so that a busy neighbor slows all alike; medians over the rounds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pictures", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--bare", type=Path, nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.bare:
        source, image, text = given.bare
        print(bare(source, str(image), str(text), min(given.pictures, 512)))
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_pictures(folder / "all", given.pictures)
        write_pictures(folder / "quarter", given.pictures // 4)
        image, text = save_encoders(folder)
        command = [sys.executable, __file__, "--pictures", str(given.pictures), "--bare"]
        alone = [*command, str(folder / "all"), image, text]
        models, both, one, two = [], [], [], []
        for number in range(given.rounds):
            models += models_alone(alone, 1)
            both.append(sum(models_alone(alone, 2)))
            one.append(encode(folder / "all", folder / f"one{number}.lance", image, text, 1))
            two.append(encode(folder / "all", folder / f"two{number}.lance", image, text, 2))
        small = encode(folder / "quarter", folder / "quarter.lance", image, text, 1)
    a, b, c = statistics.median(models), *(statistics.median(run["rate"] for run in runs) for runs in (one, two))
    midway = [statistics.median(run["midway"] for run in runs) for runs in (one, two)]
    peak = statistics.median(run["peak_mib"] for run in one)
    result = {
        "machine": machine(),
        "pictures": given.pictures,
        "rounds": given.rounds,
        "images_per_second": {"a_bare": a, "b_one_worker": b, "c_two_workers": c},
        "b_of_a": b / a,
        "c_of_b": c / b,
        "midway": {"b_of_a": midway[0] / a, "c_of_b": midway[1] / midway[0]},
        "two_bare_of_a": statistics.median(both) / a,
        "peak_mib": {"quarter": small["peak_mib"], "all": peak},
        "memory_of_four_times_the_pictures": peak / small["peak_mib"],
        "seconds_by_step": one[-1]["seconds_by_step"],
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
