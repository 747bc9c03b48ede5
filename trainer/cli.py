"""`trainer`: from an indexed table to weights to images.

Each command parses its options, builds a config and calls one function. Heavy imports stand inside the commands, after
their status line, so that `--help` answers at once.
"""

import os
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from index.options import (
    Command,
    DeviceOption,
    ImageEncoderOption,
    ImageSizeOption,
    JitterOption,
    JsonOption,
    LimitOption,
    NeighborsOption,
    OptionalSourceArgument,
    SeedOption,
    StorageOption,
    TemperatureOption,
    TextEncoderOption,
    ValFractionOption,
    check_file,
    check_folder,
    make_app,
    parse_integers,
)
from index.ranges import COUNT, COUNT_FROM_0, NOT_NEGATIVE, POSITIVE, TOTAL, Range
from index.terminal import print_columns, print_json, print_status, print_table, run

Size = Literal["tiny", "small", "base", "large"]
Autoencoder = Literal["image", "text"]
Objective = Literal[
    "coalescer", "endpoint", "flow_matching", "rectified_flow", "mean_flow", "shortcut", "consistency", "imle"
]
Preset = Literal["default", "paper"]
Coupling = Literal["nearest", "independent"]
Network = Literal["auto", "mlp", "transformer"]
Search = Literal["ann", "exact"]
Condition = Literal["retrieved", "query"]
Dtype = Literal["auto", "float32", "bfloat16"]

RunArgument = Annotated[
    Path, typer.Argument(metavar="RUN", help="Folder that `trainer fit` or `trainer export` wrote, or hub id.")
]
CheckpointSecondsOption = Annotated[
    float, NOT_NEGATIVE, typer.Option(metavar="SECONDS", help="Time between checkpoints.")
]
KeepCheckpointsOption = Annotated[int, COUNT, typer.Option(metavar="N", help="Number of checkpoints to keep.")]
ResumeOption = Annotated[bool, typer.Option("--resume", help="Go on with a run; of the options only --out is needed.")]
StepsOption = Annotated[
    Any, COUNT, typer.Option(metavar="N,N,...", parser=parse_integers, help="Numbers of sampling steps to measure.")
]
SamplesOption = Annotated[
    int | None,
    COUNT,
    typer.Option(metavar="N", help="Images for each number of steps.", show_default="2000, at most 4 per held-out row"),
]
ClipOption = Annotated[Path | None, typer.Option(metavar="DIR", help="Folder of a CLIPModel: adds the CLIP score.")]
InceptionOption = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="TorchScript Inception network from a source you trust: adds FID and KID."),
]

app = make_app("From an indexed table to weights to images.")


def main() -> None:
    """Entry point of the `trainer` script."""
    run(app)


@app.command("fit-autoencoder", cls=Command)
def fit_autoencoder(
    ctx: typer.Context,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for the autoencoder.")],
    kind: Annotated[
        Autoencoder | None, typer.Argument(metavar="image|text", help="Which autoencoder to train.")
    ] = None,
    source: OptionalSourceArgument = None,
    size: Annotated[Size, typer.Option(help="Model size.")] = "tiny",
    steps: Annotated[
        int | None,
        COUNT,
        typer.Option(metavar="N", help="Training steps.", show_default="1200 for image, 1400 for text"),
    ] = None,
    batch_size: Annotated[
        int | None, COUNT, typer.Option(metavar="N", help="Samples per step.", show_default="16 for image, 64 for text")
    ] = None,
    learning_rate: Annotated[
        float | None, POSITIVE, typer.Option(help="Peak learning rate.", show_default="0.005 for image, 0.002 for text")
    ] = None,
    image_size: ImageSizeOption = 32,
    latent_size: Annotated[int, COUNT, typer.Option(help="Image: side of the latent grid.")] = 4,
    latent_channels: Annotated[int, COUNT, typer.Option(help="Image: channels of the latent.")] = 2,
    val_fraction: ValFractionOption = 0.05,
    limit: LimitOption = None,
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16"],
        typer.Option(help="Data type that the model computes in; weights stay float32. auto: bfloat16 on CUDA."),
    ] = "auto",
    checkpoint_seconds: CheckpointSecondsOption = 120.0,
    keep_checkpoints: KeepCheckpointsOption = 2,
    resume: ResumeOption = False,
    seed: SeedOption = 0,
    device: DeviceOption = "auto",
    storage_option: StorageOption = None,
    as_json: JsonOption = False,
) -> None:
    """Train an image or a text autoencoder on a source.

    Examples:
      trainer fit-autoencoder image data/shapes --out models/image --image-size 32
      trainer fit-autoencoder text data/shapes --out models/text
      trainer fit-autoencoder --resume --out models/image
    """
    print_status(f"trainer fit-autoencoder: opening {', '.join(source or [str(out)])}")
    check_folder(out)
    from index.errors import OptionError
    from index.table.storage import Storage
    from trainer.autoencoders.image import ImageAutoencoderLoop
    from trainer.autoencoders.run import PAGE, names_of, read_settings, resumed_config
    from trainer.autoencoders.run import fit_autoencoder as run_fit
    from trainer.autoencoders.text import TextAutoencoderLoop
    from trainer.autoencoders.train import TRAINING, AutoencoderLoop, TrainRuntime

    typed = _typed(ctx)
    if resume and source:
        raise OptionError(f"--resume goes on with what {out} was trained on: leave out {', '.join(source)}")
    if not resume and (kind is None or not source):
        raise OptionError("type image or text and a SOURCE, or add --resume to go on with the training in --out")
    settings = read_settings(out) if resume else {"kind": kind, "runtime": {}}
    loops: dict[str, type[AutoencoderLoop[Any]]] = {"image": ImageAutoencoderLoop, "text": TextAutoencoderLoop}
    loop_class = loops[kind or settings["kind"]]
    options = {name: value for name, value in (typed if resume else ctx.params).items() if value is not None}
    fitted = {name: value for name, value in options.items() if name in names_of(loop_class.config_class)}
    config = resumed_config(loop_class, out, fitted) if resume else loop_class.config_class(**fitted)
    computed = settings["runtime"] | {name: options[name] for name in names_of(TrainRuntime) if name in options}
    runtime = TrainRuntime(**computed, storage=Storage.of(storage_option or ()))
    report = run_fit(loop_class, source or [], config, out, resume=resume, runtime=runtime)
    _print_result(str(out), report, as_json)
    if not as_json:
        print(f"\npage: {out / TRAINING / PAGE}")


@app.command(cls=Command)
def fit(
    ctx: typer.Context,
    out: Annotated[Path, typer.Option(metavar="RUN", help="Run folder to write.")],
    table: Annotated[
        str | None,
        typer.Argument(
            metavar="TABLE",
            help="Table, DB/NAME.lance or an object-store URI; to resume, only if it was moved.",
        ),
    ] = None,
    objective: Annotated[Objective, typer.Option(help="Training objective.")] = "coalescer",
    preset: Annotated[
        Preset, typer.Option(help="Hyperparameters of the objective; paper is for coalescer alone.")
    ] = "default",
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="Hyperparameter of the objective. May be repeated."),
    ] = None,
    coupling: Annotated[Coupling, typer.Option(help="How noise is paired with images.")] = "nearest",
    network: Annotated[
        Network, typer.Option(help="Architecture; auto is a transformer for latents of 16 rows or more.")
    ] = "auto",
    size: Annotated[Size, typer.Option(help="Model size.")] = "small",
    num_tokens: Annotated[
        int | None,
        COUNT_FROM_0,
        typer.Option(metavar="N", help="Token embeddings that a transformer attends to.", show_default="77"),
    ] = None,
    images: Annotated[
        int, TOTAL, typer.Option(metavar="N", help="Training length in images (targets), over all steps.")
    ] = (1_000_000),
    batch_size: Annotated[int, COUNT, typer.Option(metavar="N", help="Images per training step.")] = 256,
    learning_rate: Annotated[
        float | None, POSITIVE, typer.Option(help="Peak learning rate.", show_default="by network and size")
    ] = None,
    ema_window: Annotated[
        float,
        Range(0, 1, above=True),
        typer.Option(help="Window of the averaged weights, as a fraction of the training so far."),
    ] = 0.1,
    init: Annotated[
        str | None,
        typer.Option(metavar="RUN", help="Start from the weights of another run.", show_default="fresh weights"),
    ] = None,
    seed: SeedOption = 0,
    search: Annotated[Search, typer.Option(help="LanceDB index, or exact search on the device.")] = "ann",
    condition: Annotated[
        Condition, typer.Option(help="Condition on the caption of the retrieved pair or of the query.")
    ] = "retrieved",
    jitter: JitterOption = 0.0,
    reuse: Annotated[
        int | None,
        COUNT,
        typer.Option(
            metavar="N", help="Steps that use each retrieved pair.", show_default="by network and index, at most 16"
        ),
    ] = None,
    num_neighbors: NeighborsOption = 1,
    temperature: TemperatureOption = 1.0,
    targets: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Targets that `pipeline draw-targets` has drawn, by name or path; none to search again.",
            show_default="search while training",
        ),
    ] = None,
    dtype: Annotated[
        Dtype,
        typer.Option(help="Data type that the network computes in; auto is bfloat16 on CUDA. Weights stay float32."),
    ] = "auto",
    gradient_accumulation_steps: Annotated[
        int, COUNT, typer.Option(metavar="N", help="Micro-batches per training step, to save memory.")
    ] = 1,
    compile: Annotated[bool, typer.Option("--compile", help="Compile the network with torch.compile.")] = False,
    gradient_checkpointing: Annotated[
        bool | None,
        typer.Option(help="Recompute activations to save memory.", show_default="for --size large on a GPU"),
    ] = None,
    checkpoint_seconds: CheckpointSecondsOption = 120.0,
    keep_checkpoints: KeepCheckpointsOption = 2,
    resume: ResumeOption = False,
    image_encoder: ImageEncoderOption = None,
    text_encoder: TextEncoderOption = None,
    device: DeviceOption = "auto",
    storage_option: StorageOption = None,
    as_json: JsonOption = False,
) -> None:
    """Train a network on targets retrieved from a table.

    Examples:
      trainer fit db/shapes.lance --out runs/shapes
      trainer fit db/shapes.lance --out runs/paper --preset paper --images 2000000
      trainer fit db/shapes.lance --out runs/drawn --targets seed0
      trainer fit --resume --out runs/shapes
    """
    print_status(f"trainer fit: opening {out if resume and table is None else table}")
    from index.errors import OptionError
    from index.table.storage import Storage
    from pipeline.encoders.devices import resolve_device
    from trainer.config import FitConfig, RuntimeConfig
    from trainer.fit import fit as run_fit
    from trainer.objectives.hyperparameters import parse_hyperparameters
    from trainer.resume import open_run_table, resumed_config, resumed_runtime
    from trainer.run_folder import EncoderPlaces, check_is_new
    from trainer.targets import is_searching, kept_name, open_run_targets, open_targets_table

    if table is None and not resume:
        raise OptionError("TABLE is missing: name a table, or add --resume to go on with the run in --out")
    options = _typed(ctx) if resume else dict(ctx.params)
    settings = {name: options[name] for name in FitConfig.__slots__ if name in options}
    if set_:
        settings["hyperparameters"] = parse_hyperparameters(set_)
    if init is not None:
        settings["init"] = str(Path(init).absolute())
    if targets is not None:
        options["targets"] = kept_name(targets)
    runtime_settings = {name: options[name] for name in RuntimeConfig.__slots__ if name in options}
    encoders = EncoderPlaces(image_encoder=image_encoder, text_encoder=text_encoder)
    storage = Storage.of(storage_option or ())
    check_folder(out)
    if resume:
        config, runtime = resumed_config(out, settings), resumed_runtime(out, runtime_settings, encoders)
        resolve_device(runtime.device)
        opened = open_run_table(out, table, storage, indexed=is_searching(config, runtime))
    else:
        config, runtime = FitConfig(**settings), RuntimeConfig(**runtime_settings, encoders=encoders)
        resolve_device(device)
        check_is_new(out)
        drawn = open_run_targets(str(table), targets, storage)
        opened = open_targets_table(str(table), drawn, storage, indexed=is_searching(config, runtime))
    result = run_fit(opened, config, out, resume=resume, runtime=runtime)
    if int(os.environ.get("RANK", 0)) == 0:
        _print_result(str(out), result, as_json)


@app.command(cls=Command)
def sample(
    run: RunArgument,
    caption: Annotated[list[str], typer.Argument(metavar="CAPTION...", help="One or more captions.")],
    out: Annotated[Path, typer.Option(metavar="FILE.png", help="Image grid to write.")],
    num_inference_steps: Annotated[int, COUNT, typer.Option(metavar="N", help="Network evaluations per image.")] = 2,
    num_images_per_prompt: Annotated[int, COUNT, typer.Option(metavar="N", help="Images per caption.")] = 4,
    guidance_scale: Annotated[
        float,
        NOT_NEGATIVE,
        typer.Option(help="1 follows the caption as trained; larger values follow it more strongly."),
    ] = 1.0,
    redraws: Annotated[
        int,
        COUNT_FROM_0,
        typer.Option(metavar="N", help="Extra first steps to try per image; the most confident is kept."),
    ] = 0,
    seed: SeedOption = 0,
    image_encoder: ImageEncoderOption = None,
    text_encoder: TextEncoderOption = None,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    r"""Generate images from captions.

    Examples:
      trainer sample runs/shapes "a small red circle left of a large blue square" \
        --out circle.png

      trainer sample runs/shapes "a large black triangle above a small green square" \
        --out triangle.png --num-inference-steps 4 --num-images-per-prompt 8
    """
    print_status(f"trainer sample: opening {run}")
    from index.errors import OptionError
    from index.table.storage import write_json
    from pipeline.encoders.devices import resolve_device
    from trainer.grid import draw_grid
    from trainer.run_folder import EncoderPlaces
    from trainer.sampler import CoalescerPipeline

    if out.suffix != ".png":
        raise OptionError(f"--out {out} is not a PNG file: use a name that ends in .png")
    check_file(out)
    resolve_device(device)
    encoders = EncoderPlaces(image_encoder=image_encoder, text_encoder=text_encoder)
    samples = CoalescerPipeline.from_pretrained(run, device=device, encoders=encoders)(
        caption,
        num_inference_steps=num_inference_steps,
        num_images_per_prompt=num_images_per_prompt,
        seed=seed,
        guidance_scale=guidance_scale,
        redraws=redraws,
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    columns = num_images_per_prompt if num_images_per_prompt > 1 and len(caption) > 1 else 8
    draw_grid(samples.images, samples.prompts, columns=columns).save(out)
    confidence = [None if value != value else value for value in samples.confidence.tolist()]  # JSON has no NaN
    images = [{"caption": c, "confidence": p} for c, p in zip(samples.prompts, confidence, strict=True)]
    report = {"run": str(run), "seed": seed, "num_inference_steps": num_inference_steps, "images": images}
    write_json(out.with_suffix(".json"), report)
    if as_json:
        return print_json({"out": str(out), **report})
    print(f"{out}: {len(images)} images in {num_inference_steps} steps; confidence in {out.with_suffix('.json')}")
    return None


@app.command(cls=Command)
def export(
    run: RunArgument,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder to write.")],
    image_encoder: ImageEncoderOption = None,
    text_encoder: TextEncoderOption = None,
    as_json: JsonOption = False,
) -> None:
    r"""Write a folder that has all that sampling needs.

    Network, encoders and settings: it needs no run, table or other encoder, and can be moved, or
    uploaded with `hf upload ORG/NAME DIR`.

    Examples:
      trainer export runs/shapes --out shapes
      trainer export runs/shapes --out shapes --image-encoder models/image \
        --text-encoder models/text
    """
    print_status(f"trainer export: opening {run}")
    from trainer.run_folder import EncoderPlaces
    from trainer.sampler import export_run

    check_folder(out)
    export_run(run, out, EncoderPlaces(image_encoder=image_encoder, text_encoder=text_encoder))
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    _print_result(str(out), {"run": str(run), "out": str(out), "bytes": size}, as_json)


@app.command(cls=Command)
def evaluate(
    run: RunArgument,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder for the report.", show_default="RUN/report")
    ] = None,
    num_inference_steps: StepsOption = "1,2,4,8",
    num_samples: SamplesOption = None,
    clip: ClipOption = None,
    inception: InceptionOption = None,
    seed: SeedOption = 0,
    image_encoder: ImageEncoderOption = None,
    text_encoder: TextEncoderOption = None,
    device: DeviceOption = "auto",
    storage_option: StorageOption = None,
    as_json: JsonOption = False,
) -> None:
    r"""Measure a run against held-out rows.

    Each metric is reported next to its references: train rows and their reconstructions, retrieved
    pairs, noise. Nothing is downloaded. Stopped and typed again, it goes on.

    Examples:
      trainer evaluate runs/shapes
      trainer evaluate runs/shapes --num-inference-steps 2 --num-samples 5000 \
        --out reports/shapes
    """
    print_status(f"trainer evaluate: opening {run}")
    from index.errors import OptionError
    from trainer.evaluation.protocol import evaluate as run_evaluate
    from trainer.evaluation.report import ERRORS_KNOWN, metrics_with_goals, reference_line
    from trainer.run_folder import may_be_hub_id

    if out is None and may_be_hub_id(run):
        raise OptionError(f"no folder {run}: check the path, or add --out DIR for the report if it is a hub id")
    out = out or run / "report"
    config = _evaluation(
        num_inference_steps, num_samples, clip, inception, seed, device, image_encoder, text_encoder, storage_option
    )
    check_folder(out)
    report, page = run_evaluate(run, config, out), out / "index.html"
    if as_json:
        return print_json(report | {"page": str(page)})
    print_columns(str(run), metrics_with_goals(report))
    for name in ERRORS_KNOWN:
        if line := reference_line(report, name):
            print(f"{name}: {line}")
    print(f"\npage: {page}")
    return None


@app.command(cls=Command)
def compare(
    run: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run folders or hub ids.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for the report.")],
    caption: Annotated[
        list[str] | None,
        typer.Option(metavar="CAPTION", help="Caption to show images of, from every run. May be repeated."),
    ] = None,
    num_inference_steps: StepsOption = "1,2,4,8,32",
    num_samples: SamplesOption = None,
    clip: ClipOption = None,
    inception: InceptionOption = None,
    seed: SeedOption = 0,
    image_encoder: ImageEncoderOption = None,
    text_encoder: TextEncoderOption = None,
    device: DeviceOption = "auto",
    storage_option: StorageOption = None,
    as_json: JsonOption = False,
) -> None:
    r"""Compare runs that were trained on the same table.

    Runs that differ in their seed alone are averaged. Stopped and typed again, or typed with more
    runs, it measures what is missing.

    Examples:
      trainer compare runs/coalescer runs/flow --out reports/both \
        --caption "a small red circle above a large blue square"

      trainer compare runs/a-seed0 runs/a-seed1 runs/b-seed0 runs/b-seed1 \
        --out reports/ab --num-inference-steps 1,2
    """
    print_status(f"trainer compare: opening {len(run)} runs")
    from trainer.evaluation.compare import compare as run_compare
    from trainer.evaluation.report import main_metrics, metric_title, reference_line

    config = _evaluation(
        num_inference_steps, num_samples, clip, inception, seed, device, image_encoder, text_encoder, storage_option
    )
    check_folder(out)
    report, page = run_compare(run, config, out, captions=caption or []), out / "index.html"
    if as_json:
        return print_json(report | {"page": str(page)})
    for name, rows in main_metrics(report).items():
        print_columns(f"\n{metric_title(report, name)}", rows)
        print(f"references: {reference_line(report, name) or '-'}")
    print(f"\npage: {page}")
    return None


def _typed(ctx: typer.Context) -> dict[str, Any]:
    """Return the parameters of a command that were typed, those with their defaults left out."""
    sources = {name: ctx.get_parameter_source(name) for name in ctx.params}
    return {name: ctx.params[name] for name, source in sources.items() if source and source.name == "COMMANDLINE"}


def _evaluation(
    num_inference_steps: list[int],
    num_samples: int | None,
    clip: Path | None,
    inception: Path | None,
    seed: int,
    device: str,
    image_encoder: str | None,
    text_encoder: str | None,
    storage_option: list[str] | None,
) -> Any:
    """Return the config that `evaluate` and `compare` share."""
    from index.table.storage import Storage
    from pipeline.encoders.devices import resolve_device
    from trainer.evaluation.protocol import EvaluationConfig
    from trainer.run_folder import EncoderPlaces

    resolve_device(device)
    return EvaluationConfig(
        num_inference_steps=num_inference_steps,
        num_samples=num_samples,
        clip=clip,
        inception=inception,
        seed=seed,
        device=device,
        encoders=EncoderPlaces(image_encoder=image_encoder, text_encoder=text_encoder),
        storage=Storage.of(storage_option or ()),
    )


def _print_result(title: str, result: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(result)
    else:
        print_table(title, result)
