"""`trainer`: from a table to weights to images. A skin: parse, build a config, call one function."""

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from index.terminal import print_columns, print_table, run

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    add_completion=False,
    pretty_exceptions_enable=False,
    help=__doc__.split(". A")[0] + ".",
)

SourceArgument = Annotated[
    list[str],
    typer.Argument(help="Shards: files, folders, globs or brace patterns of .tar or .parquet.", show_default=False),
]
SeedOption = Annotated[int, typer.Option(help="Same seed, same result.")]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps ...")]
RunArgument = Annotated[Path, typer.Argument(help="A run folder, or for sampling a hub id.", show_default=False)]
StepsOption = Annotated[str, typer.Option(help="Step counts to measure, with commas.")]
SamplesOption = Annotated[
    int | None, typer.Option(help="Pictures for each step count.", show_default="2000, at most 4 for a held-out row")
]
ClipOption = Annotated[Path | None, typer.Option(help="Folder of a CLIPModel: adds its score.", show_default=False)]
InceptionOption = Annotated[
    Path | None,
    typer.Option(help="TorchScript file of an Inception network that you trust: adds FID and KID.", show_default=False),
]


def main() -> None:
    """Entry point of the `trainer` script."""
    run(app)


@app.command("fit-autoencoder")
def fit_autoencoder(
    kind: Annotated[str, typer.Argument(help="image or text.", show_default=False)],
    source: SourceArgument,
    out: Annotated[Path, typer.Option(help="Folder for the autoencoder.", show_default=False)],
    size: Annotated[str, typer.Option(help="tiny, small, base or large.")] = "tiny",
    steps: Annotated[int | None, typer.Option(help="Training steps.", show_default="1200 image, 1400 text")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Samples per step.", show_default="16 image, 64 text")] = None,
    image_size: Annotated[int, typer.Option(help="Side of the square pictures, in pixels (image).")] = 32,
    latent_size: Annotated[int, typer.Option(help="Side of the latent grid (image).")] = 4,
    latent_channels: Annotated[int, typer.Option(help="Channels of the latent (image).")] = 2,
    val_fraction: Annotated[float, typer.Option(help="Share kept from training, for measuring.")] = 0.05,
    limit: Annotated[int | None, typer.Option(help="Read only the first N samples.")] = None,
    seed: SeedOption = 0,
) -> None:
    """Train an image or a text autoencoder on a source's own pictures or captions.

    trainer fit-autoencoder image data/shapes --out models/image --image-size 32

    trainer fit-autoencoder text data/shapes --out models/text
    """
    from index.errors import OptionError
    from index.table.storage import write_json
    from trainer.autoencoders.image import ImageAutoencoderConfig, fit_image_autoencoder
    from trainer.autoencoders.text import TextAutoencoderConfig, fit_text_autoencoder

    given: dict[str, Any] = {"steps": steps, "batch_size": batch_size, "limit": limit}
    hyperparameters = {name: value for name, value in given.items() if value is not None}
    hyperparameters |= {"size": size, "val_fraction": val_fraction, "seed": seed}
    if kind == "image":
        shape: dict[str, Any] = {
            "image_size": image_size,
            "latent_size": latent_size,
            "latent_channels": latent_channels,
        }
        report = fit_image_autoencoder(source, ImageAutoencoderConfig(**hyperparameters, **shape), out)
    elif kind == "text":
        report = fit_text_autoencoder(source, TextAutoencoderConfig(**hyperparameters), out)
    else:
        raise OptionError(f"there is no {kind!r} autoencoder: choose image or text")
    write_json(out / "report.json", report)
    print_table(str(out), report)


@app.command()
def fit(
    table: Annotated[str, typer.Argument(help="The table, DB/NAME.lance.", show_default=False)],
    out: Annotated[Path, typer.Option(help="The run folder.", show_default=False)],
    objective: Annotated[
        str,
        typer.Option(
            help="coalescer, endpoint, flow_matching, rectified_flow, mean_flow, shortcut, consistency or imle."
        ),
    ] = "coalescer",
    preset: Annotated[str, typer.Option(help="coalescer: default or paper.")] = "default",
    coupling: Annotated[str, typer.Option(help="nearest or independent pairs.")] = "nearest",
    network: Annotated[str, typer.Option(help="mlp, transformer (of patches), or auto.")] = "auto",
    size: Annotated[str, typer.Option(help="tiny, small, base or large.")] = "small",
    num_tokens: Annotated[
        int | None, typer.Option(help="Token states that a transformer reads.", show_default="77")
    ] = None,
    images: Annotated[int, typer.Option(help="Targets to draw in all.")] = 1_000_000,
    batch_size: Annotated[int, typer.Option(help="Targets per step.")] = 256,
    learning_rate: Annotated[float | None, typer.Option(help="Highest learning rate.", show_default="by size")] = None,
    seed: SeedOption = 0,
    search: Annotated[str, typer.Option(help="ann (LanceDB) or exact (on the device).")] = "ann",
    dial: Annotated[
        list[str] | None,
        typer.Option(help="NAME=VALUE for the objective, such as p=0.5; repeat it.", show_default=False),
    ] = None,
    condition: Annotated[
        str, typer.Option(help="Tell the network the close pair's description or the query.")
    ] = "retrieved",
    jitter: Annotated[float, typer.Option(help="Noise on what is asked for, as a share of its length.")] = 0.0,
    reuse: Annotated[
        int | None, typer.Option(help="Steps that each drawn target serves.", show_default="as needed not to wait")
    ] = None,
    num_neighbors: Annotated[int, typer.Option(help="Draw each pair from so many of the nearest.")] = 1,
    temperature: Annotated[float, typer.Option(help="Of that draw, in squared distance.")] = 1.0,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    gradient_accumulation_steps: Annotated[
        int, typer.Option(help="Parts that a batch is computed in, to save memory.")
    ] = 1,
    compile: Annotated[bool, typer.Option("--compile", help="Use torch.compile.")] = False,
    checkpoint_seconds: Annotated[float, typer.Option(help="Time between checkpoints.")] = 120.0,
    keep_checkpoints: Annotated[int, typer.Option(help="Checkpoints to keep.")] = 2,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the run's last checkpoint.")] = False,
    device: DeviceOption = "auto",
) -> None:
    """Train a network on nearest-neighbor targets drawn from a table.

    trainer fit db/shapes.lance --out runs/shapes

    trainer fit db/shapes.lance --out runs/paper --preset paper --images 2000000
    """
    from index.table.table import open_table
    from trainer.config import FitConfig, RuntimeConfig
    from trainer.fit import fit as run_fit
    from trainer.objectives.hyperparameters import parse_hyperparameters

    config = FitConfig(
        objective=objective,
        preset=preset,
        coupling=coupling,
        network=network,
        size=size,
        num_tokens=num_tokens,
        images=images,
        batch_size=batch_size,
        learning_rate=learning_rate,
        seed=seed,
        search=search,
        reuse=reuse,
        num_neighbors=num_neighbors,
        temperature=temperature,
        dtype=dtype,
        condition=condition,
        jitter=jitter,
        hyperparameters=parse_hyperparameters(dial or []),
    )
    runtime = RuntimeConfig(
        device=device,
        gradient_accumulation_steps=gradient_accumulation_steps,
        compile=compile,
        checkpoint_seconds=checkpoint_seconds,
        keep_checkpoints=keep_checkpoints,
    )
    result = run_fit(open_table(table, indexed=True), config, out, resume=resume, runtime=runtime)
    if int(os.environ.get("RANK", 0)) == 0:
        print_table(str(out), result)


@app.command()
def sample(
    run: RunArgument,
    caption: Annotated[list[str], typer.Argument(help="One or more captions.", show_default=False)],
    out: Annotated[Path, typer.Option(help="The PNG to write.", show_default=False)],
    steps: Annotated[int, typer.Option(help="Network evaluations per picture.")] = 2,
    num: Annotated[int, typer.Option(help="Pictures per caption.")] = 4,
    seed: SeedOption = 0,
    guidance: Annotated[float, typer.Option(help="1 follows the caption as trained, more exaggerates it.")] = 1.0,
    redraws: Annotated[int, typer.Option(help="Further points to try; the surest is kept.")] = 0,
    device: DeviceOption = "auto",
) -> None:
    """Turn captions into pictures.

    trainer sample runs/shapes "a small red circle left of a large blue square" --out circle.png

    trainer sample runs/shapes "a large black triangle above a small green square" --out triangle.png --steps 4 --num 8
    """
    from index.errors import OptionError
    from index.table.storage import write_json
    from trainer.grid import draw_grid
    from trainer.sampler import CoalescerPipeline

    if out.suffix != ".png":
        raise OptionError(f"--out {out} is no PNG: give a name that ends in .png")
    pipeline = CoalescerPipeline.from_pretrained(run, device=device)
    samples = pipeline(
        caption,
        num_inference_steps=steps,
        num_images_per_prompt=num,
        seed=seed,
        guidance_scale=guidance,
        redraws=redraws,
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    draw_grid(samples.images, samples.prompts, columns=num if num > 1 and len(caption) > 1 else 8).save(out)
    sure = [None if value != value else value for value in samples.confidence.tolist()]  # JSON has no NaN
    made = [{"caption": c, "confidence": s} for c, s in zip(samples.prompts, sure, strict=True)]
    write_json(out.with_suffix(".json"), {"run": str(run), "seed": seed, "steps": steps, "images": made})
    print(f"{out}: {len(samples.images)} pictures in {steps} steps, confidences in {out.with_suffix('.json')}")


@app.command()
def evaluate(
    run: RunArgument,
    steps: StepsOption = "1,2,4,8",
    out: Annotated[Path | None, typer.Option(help="Folder for the report.", show_default="RUN/report")] = None,
    samples: SamplesOption = None,
    clip: ClipOption = None,
    inception: InceptionOption = None,
    seed: SeedOption = 0,
    device: DeviceOption = "auto",
) -> None:
    """Measure a run against held-out rows, beside its floors; nothing is downloaded.

    trainer evaluate runs/shapes

    trainer evaluate runs/shapes --steps 2 --samples 5000 --out reports/shapes
    """
    from trainer.evaluation.evaluate import evaluate as run_evaluate
    from trainer.evaluation.exam import ExamConfig
    from trainer.evaluation.report import lines_of

    place = out or run / "report"
    config = ExamConfig(
        steps=_numbers(steps), samples=samples, seed=seed, clip=clip, inception=inception, device=device
    )
    report = run_evaluate(run, config, place)
    print_columns(str(run), lines_of(report))
    print(f"page: {place / 'index.html'}")


@app.command()
def compare(
    runs: Annotated[list[Path], typer.Argument(help="Run folders.", show_default=False)],
    out: Annotated[Path, typer.Option(help="Folder for the page.", show_default=False)],
    steps: StepsOption = "1,2,4,8,32",
    caption: Annotated[list[str] | None, typer.Option(help="A caption to show from every run; repeat it.")] = None,
    samples: SamplesOption = None,
    clip: ClipOption = None,
    inception: InceptionOption = None,
    seed: SeedOption = 0,
    device: DeviceOption = "auto",
) -> None:
    """Put several runs on one table into one table and one page; runs that differ by their seed are one line.

    trainer compare runs/coalescer runs/flow --out reports/both --caption "a small red circle above a large blue square"

    trainer compare runs/a-seed0 runs/a-seed1 runs/b-seed0 runs/b-seed1 --out reports/ab --steps 1,2
    """
    from trainer.evaluation.compare import compare as run_compare
    from trainer.evaluation.comparison_page import columns_of
    from trainer.evaluation.exam import ExamConfig

    config = ExamConfig(
        steps=_numbers(steps), samples=samples, seed=seed, clip=clip, inception=inception, device=device
    )
    report = run_compare(runs, config, out, captions=caption or [])
    for name, lines in columns_of(report).items():
        print_columns(name, lines)
    print(f"page: {out / 'index.html'}")


def _numbers(given: str) -> list[int]:
    from index.errors import OptionError

    try:
        return [int(part) for part in given.split(",")]
    except ValueError:
        raise OptionError(f"--steps {given!r} is no list of numbers: give for instance 1,2,4,8") from None
