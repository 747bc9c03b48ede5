"""`pipeline`: from image-caption data to an indexed Lance table.

Each command parses its options, builds a config and calls one function. Heavy imports stand inside the commands, after
their status line, so that `--help` answers at once.
"""

from dataclasses import asdict, replace
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
    SeedOption,
    SourceArgument,
    StorageOption,
    TableArgument,
    TemperatureOption,
    TextEncoderOption,
    ValFractionOption,
    check_folder,
    make_app,
    parse_integers,
)
from index.ranges import COUNT, FRACTION, NOT_NEGATIVE, POSITIVE, PROCESSES, TOTAL, Range
from index.terminal import print_columns, print_json, print_status, print_table, run

Geometry = Literal["sphere", "standard", "raw"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Captions = Literal["first", "all"]
Dedup = Literal["image", "pair"]
TextPooling = Literal["pooled", "projected", "mean", "cls", "last", "sentence-transformers"]
Search = Literal["ann", "exact"]
IndexType = Literal["auto", "ivf_rq", "ivf_pq", "ivf_sq", "ivf_flat", "ivf_hnsw_sq", "none"]

SmallDescScaleOption = Annotated[
    bool, typer.Option("--allow-small-desc-scale", help="Allow a --desc-scale of 1 or less.")
]
BeamOptionsArgument = Annotated[
    list[str] | None,
    typer.Argument(metavar="-- BEAM_OPTION...", help="Options of Apache Beam as --name=value."),
]
MemoryOption = Annotated[
    float,
    Range(0, 2**16, above=True),
    typer.Option(metavar="GIB", help="Memory for vectors, which also bounds the size of the index."),
]
WorkersOption = Annotated[int, PROCESSES, typer.Option(metavar="N", help="Local worker processes.")]

app = make_app("From image-caption data to an indexed Lance table.")


def main() -> None:
    """Entry point of the `pipeline` script."""
    run(app)


def _parse_desc_scale(text: str) -> float | str:
    try:
        return text if text == "auto" else float(text)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not a number: type one above 1, for instance 4, or auto") from None


def _parse_search_dim(text: str) -> int | str:
    try:
        return text if text == "full" else int(text)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not a whole number: type one of at least 2, or full") from None


@app.command("demo-data", cls=Command)
def demo_data(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder for the shards.")],
    num_samples: Annotated[int, TOTAL, typer.Option(metavar="N", help="Training images to draw.")] = 20_000,
    image_size: ImageSizeOption = 32,
    num_backgrounds: Annotated[
        int,
        Range(1, 33),
        typer.Option(metavar="N", help="Backgrounds; each has 4,320 captions, named from the second on."),
    ] = 1,
    seed: SeedOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Draw captioned shapes into shards like those of img2dataset.

    Examples:
      pipeline demo-data data/shapes
      pipeline demo-data data/shapes --num-samples 1000 --image-size 64
    """
    check_folder(out)
    print_status(f"pipeline demo-data: drawing {num_samples:,} images into {out}")
    from pipeline.demo.shapes import write_demo_data

    report = write_demo_data(
        out, num_samples=num_samples, image_size=image_size, seed=seed, num_backgrounds=num_backgrounds
    )
    _print_report(str(out), report, as_json)


@app.command(cls=Command)
def encode(
    source: SourceArgument,
    table: Annotated[str, typer.Option(metavar="TABLE", help="Table to write, DB/NAME.lance or s3://...")],
    image_encoder: Annotated[str, typer.Option(metavar="NAME", help="Folder or hub id of a diffusers autoencoder.")],
    text_encoder: Annotated[str, typer.Option(metavar="NAME", help="Folder or hub id of a text model.")],
    text_pooling: Annotated[
        TextPooling | None,
        typer.Option(help="How the text embedding is made of the model's output.", show_default="the model's own"),
    ] = None,
    text_prompt: Annotated[
        str | None,
        typer.Option(metavar="TEXT", help="Put before each caption, as in 'query: '.", show_default="the model's own"),
    ] = None,
    image_size: ImageSizeOption = 256,
    image_key: Annotated[
        str | None,
        typer.Option(
            metavar="KEY",
            help="Column or tar extension of the image; `png;jpg` tries png first.",
            show_default="the usual names",
        ),
    ] = None,
    caption_key: Annotated[
        str | None,
        typer.Option(
            metavar="KEY", help="Column, tar extension or JSON key of the caption.", show_default="the usual names"
        ),
    ] = None,
    captions: Annotated[
        Captions, typer.Option(help="Of an image with several captions: first, or all as one row each.")
    ] = "first",
    max_pixels: Annotated[
        int, TOTAL, typer.Option(metavar="N", help="Reject images of more pixels, before they are decompressed.")
    ] = 50_000_000,
    max_sample_mb: Annotated[
        float,
        POSITIVE,
        typer.Option(metavar="MIB", help="Reject samples whose files are larger, without reading them."),
    ] = 256.0,
    min_image_size: Annotated[
        int | None, COUNT, typer.Option(metavar="PIXELS", help="Filter: shorter side of at least this.")
    ] = None,
    max_aspect_ratio: Annotated[
        float | None, Range(1), typer.Option(metavar="RATIO", help="Filter: longer over shorter side of at most this.")
    ] = None,
    min_caption_length: Annotated[
        int | None, COUNT, typer.Option(metavar="N", help="Filter: at least N characters of caption.")
    ] = None,
    max_caption_length: Annotated[
        int | None, COUNT, typer.Option(metavar="N", help="Filter: at most N characters of caption.")
    ] = None,
    filter: Annotated[
        str | None,
        typer.Option(metavar="EXPR", help="Filter: expression over the JSON metadata, such as 'aesthetic > 5'."),
    ] = None,
    dedup: Annotated[
        Dedup | None, typer.Option(help="Filter: keep the first of equal images, or of equal image-caption pairs.")
    ] = None,
    desc_scale: Annotated[
        float | None,
        POSITIVE,
        typer.Option(metavar="FLOAT", help="Weight of the text embedding in the search, above 1.", show_default="4"),
    ] = None,
    geometry: Annotated[
        Geometry | None,
        typer.Option(help="How latents are normalized before they are compared.", show_default="sphere"),
    ] = None,
    val_fraction: ValFractionOption = 0.05,
    keep_images: Annotated[
        bool, typer.Option("--keep-images", help="Store the original image bytes with each row.")
    ] = False,
    limit: LimitOption = None,
    max_reject_rate: Annotated[
        float, FRACTION, typer.Option(help="Stop before publishing if a larger fraction of the samples is rejected.")
    ] = 0.5,
    append: Annotated[bool, typer.Option("--append", help="Add the shards that an existing table lacks.")] = False,
    part: Annotated[
        str | None,
        typer.Option(
            metavar="I/N",
            help="Encode every N-th shard and publish nothing; without it, the same command publishes all N parts.",
        ),
    ] = None,
    fetch_patience: Annotated[
        float | None,
        NOT_NEGATIVE,
        typer.Option(
            metavar="SECONDS",
            help="How long a store that is away or denies access is waited for.",
            show_default="300, and 5 if it denies access",
        ),
    ] = None,
    allow_missing_shards: Annotated[
        bool,
        typer.Option(
            "--allow-missing-shards", help="Publish without shards that cannot be read; the next run fetches them."
        ),
    ] = False,
    num_workers: WorkersOption = 1,
    batch_size: Annotated[int, COUNT, typer.Option(metavar="N", help="Images encoded at a time.")] = 64,
    device: DeviceOption = "auto",
    dtype: Annotated[
        Dtype, typer.Option(help="Data type that the encoders compute in; auto: bfloat16 on CUDA, else float32.")
    ] = "auto",
    storage_option: StorageOption = None,
    runner: Annotated[
        str,
        typer.Option(metavar="NAME", help="Beam runner, such as FlinkRunner; its options follow `--` as --name=value."),
    ] = "FnApiRunner",
    allow_small_desc_scale: SmallDescScaleOption = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything on a few samples, print the plan and stop.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    r"""Encode image-caption pairs into a Lance table.

    Runs on Apache Beam. Rerun the same command to resume.

    Examples:
      pipeline encode data/shapes --table db/shapes.lance --image-size 32 \
        --image-encoder models/image --text-encoder models/text

      pipeline encode 's3://laion/{00000..00099}.tar' --table s3://my/laion.lance \
        --image-encoder stabilityai/sd-vae-ft-mse \
        --text-encoder openai/clip-vit-large-patch14 --filter 'aesthetic > 5'
    """
    print_status("pipeline encode: listing the shards and loading the encoders")
    from index.table.storage import Storage
    from index.table.table import table_uri
    from pipeline.beam.workers import check_runtime
    from pipeline.config import EncodeConfig, Part, RuntimeConfig
    from pipeline.encode.run import encode_dataset
    from pipeline.filters import Filters
    from pipeline.sources.listing import list_shards

    table_uri(table)
    # What follows `--` arrives among the sources.
    beam_options = [part for part in source if part.startswith("--")]
    runtime = RuntimeConfig(
        num_workers=num_workers,
        batch_size=batch_size,
        device=device,
        storage=Storage.of(storage_option or (), fetch_patience),
        allow_missing_shards=allow_missing_shards,
        beam_options=(f"--runner={runner}", *beam_options),
        part=None if part is None else Part.parse(part),
    )
    config = EncodeConfig(
        shards=(),
        image_encoder=image_encoder,
        text_encoder=text_encoder,
        text_pooling=text_pooling,
        text_prompt=text_prompt,
        image_size=image_size,
        image_key=image_key,
        caption_key=caption_key,
        captions=captions,
        max_sample_mb=max_sample_mb,
        filters=Filters(
            min_image_size=min_image_size,
            max_aspect_ratio=max_aspect_ratio,
            min_caption_length=min_caption_length,
            max_caption_length=max_caption_length,
            filter=filter,
            dedup=dedup,
            max_pixels=max_pixels,
        ),
        dtype=dtype,
        desc_scale=desc_scale,
        allow_small_desc_scale=allow_small_desc_scale,
        geometry=geometry,
        val_fraction=val_fraction,
        keep_images=keep_images,
        limit=limit,
        max_reject_rate=max_reject_rate,
        append=append,
    )
    sources = [part for part in source if part not in beam_options]
    check_runtime(runtime)
    config = replace(config, shards=tuple(list_shards(sources, runtime.read_options(config))))
    encoded = encode_dataset(config, runtime, table, dry_run=dry_run, sources=sources)
    if as_json:
        return print_json(encoded.report)
    if part is not None and not dry_run:
        print(f"part {part} of {table} is encoded: when all are, rerun without --part to publish")
    elif append and not encoded.report.get("rows", dry_run):
        print(f"{table}: nothing to add")
    elif encoded.already_complete:
        print(f"{table} is already encoded with these options: nothing to do")
    for name, commit in encoded.report.get("hub_commits", {}).items():
        print(f"hf:{name} at commit {commit}")
    hidden = (
        "hub_commits",
        "warnings",
        "table",
        "settings",
        "encoders",
        "image_encoder",
        "text_encoder",
        "run_id",
        "beam_options",
        "versions",
    )
    print_table(table, {name: value for name, value in encoded.report.items() if name not in hidden})
    for warning in encoded.report.get("warnings", ()):
        print(f"\nwarning: {warning}")
    return None


@app.command(cls=Command)
def plan(
    rows: Annotated[int, TOTAL, typer.Argument(metavar="ROWS", help="Rows of the table.")],
    image_size: ImageSizeOption = 256,
    latent_shape: Annotated[
        Any,
        COUNT,
        typer.Option(
            metavar="C,H,W",
            parser=parse_integers,
            help="Of the image encoder's latents.",
            show_default="4 channels at an eighth of the image size",
        ),
    ] = None,
    text_dim: Annotated[int, COUNT, typer.Option(metavar="N", help="Dimensions of the text embedding.")] = 768,
    image_encoder: Annotated[
        str | None, typer.Option(metavar="NAME", help="Read the latent shape from this autoencoder, which is opened.")
    ] = None,
    text_encoder: Annotated[
        str | None, typer.Option(metavar="NAME", help="Read the text dimensions from this text model, which is opened.")
    ] = None,
    search_dim: Annotated[
        int | None,
        COUNT,
        typer.Option(metavar="N", help="Dimensions of the search space.", show_default="those of text and latent"),
    ] = None,
    val_fraction: ValFractionOption = 0.05,
    rows_per_shard: Annotated[int, COUNT, typer.Option(metavar="N", help="Samples of a shard.")] = 10_000,
    caption_length: Annotated[float, NOT_NEGATIVE, typer.Option(help="Mean characters of a caption.")] = 60.0,
    sidecar_length: Annotated[float, NOT_NEGATIVE, typer.Option(help="Mean characters of a sample's JSON.")] = 500.0,
    image_bytes: Annotated[
        float, NOT_NEGATIVE, typer.Option(help="Mean bytes of an original image, if they are kept.")
    ] = 0.0,
    index_type: Annotated[
        Literal["auto", "ivf_rq", "ivf_flat", "none"], typer.Option(help="LanceDB index; none is exact search.")
    ] = "auto",
    max_memory_gb: MemoryOption = 4.0,
    nprobes: Annotated[int, COUNT, typer.Option(metavar="N", help="Partitions that a query visits.")] = 24,
    images: Annotated[
        int, TOTAL, typer.Option(metavar="N", help="Training length in images, for draw-targets and `trainer fit`.")
    ] = 1_000_000_000,
    num_workers: WorkersOption = 1,
    images_per_second: Annotated[
        float,
        POSITIVE,
        typer.Option(metavar="N", help="Images that a worker encodes per second, at 256 pixels."),
    ] = 215.0,
    rate: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=VALUE",
            help="Another rate of a worker: layout_mb, gflops, quantized, scanned. May be repeated.",
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Estimate the bytes and hours that a table takes.

    Sizes follow from the format; hours are work divided by rates, which docs/clusters.md explains.

    Examples:
      pipeline plan 1000000
      pipeline plan 413000000 --num-workers 256 --search-dim 480 --max-memory-gb 256
      pipeline plan 60000 --image-size 32 --latent-shape 2,4,4 --text-dim 64
    """
    print_status(f"pipeline plan: estimating {rows:,} rows")
    from index.errors import OptionError
    from pipeline.estimate import Rates, TableShape, estimate, tables_of

    if latent_shape is not None and len(latent_shape) != 3:
        raise OptionError(f"--latent-shape {','.join(map(str, latent_shape))} is not three numbers: type C,H,W")
    shape = TableShape(
        rows=rows,
        image_size=image_size,
        latent_shape=latent_shape and tuple(latent_shape),
        text_dim=text_dim,
        search_dim=search_dim,
        val_fraction=val_fraction,
        rows_per_shard=rows_per_shard,
        caption_length=caption_length,
        sidecar_length=sidecar_length,
        image_bytes=image_bytes,
        index_type=index_type,
        max_memory=int(max_memory_gb * 2**30),
        nprobes=nprobes,
        targets=images,
        num_workers=num_workers,
        rates=replace(Rates.parse(rate or ()), images=images_per_second),
    )
    result = estimate(_with_encoders(shape, image_encoder, text_encoder))
    if as_json:
        return print_json(result)
    for title, lines in tables_of(result).items():
        print_columns(title, lines)
    return None


@app.command("build-index", cls=Command)
def build_index(
    table: TableArgument,
    beam_options: BeamOptionsArgument = None,
    desc_scale: Annotated[
        Any,
        POSITIVE,
        typer.Option(
            metavar="FLOAT|auto",
            parser=_parse_desc_scale,
            help="Weight of the text embedding in the search, above 1; auto reaches --target-perplexity.",
            show_default="as the table",
        ),
    ] = None,
    geometry: Annotated[
        Geometry | None,
        typer.Option(help="How latents are normalized before they are compared.", show_default="as the table"),
    ] = None,
    center: Annotated[
        bool | None,
        typer.Option(
            "--center/--no-center",
            help="Regress latents on text embeddings and search the residuals.",
            show_default="as the table",
        ),
    ] = None,
    search_dim: Annotated[
        Any,
        typer.Option(
            metavar="INT|full",
            parser=_parse_search_dim,
            help="Principal components of text and latents to search, for latents too wide to index.",
            show_default="as the table",
        ),
    ] = None,
    balance: Annotated[
        bool | None,
        typer.Option(
            "--balance/--no-balance",
            help="Fit dual potentials so that every row is retrieved equally often.",
            show_default="as the table",
        ),
    ] = None,
    balance_time_limit: Annotated[
        float, POSITIVE, typer.Option(metavar="SECONDS", help="Time limit of --balance; rerun to continue the fit.")
    ] = 300.0,
    max_memory_gb: MemoryOption = 4.0,
    index_type: Annotated[
        IndexType, typer.Option(help="LanceDB index; none is exact search, auto reaches --target-recall.")
    ] = "auto",
    target_recall: Annotated[
        float,
        Range(0, 1, above=True),
        typer.Option(help="recall@1 to reach against exact search, on held-out captions with random latents."),
    ] = 0.95,
    target_perplexity: Annotated[
        float, Range(1), typer.Option(help="Number of targets that a caption chooses among, for --desc-scale auto.")
    ] = 100.0,
    allow_small_desc_scale: SmallDescScaleOption = False,
    seed: SeedOption = 0,
    num_workers: WorkersOption = 1,
    runner: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Beam runner that writes vectors and builds the index, such as DataflowRunner.",
            show_default="this process",
        ),
    ] = None,
    image_encoder: ImageEncoderOption = None,
    text_encoder: TextEncoderOption = None,
    storage_option: StorageOption = None,
    as_json: JsonOption = False,
) -> None:
    r"""Build a table's vector index and measure it.

    Lays out the search vectors, builds the LanceDB index, and reports recall, hubness and linear-probe R2.

    Examples:
      pipeline build-index db/shapes.lance
      pipeline build-index db/shapes.lance --desc-scale auto --balance
      pipeline build-index s3://my/laion.lance --runner DataflowRunner -- \
        --project=my-project --region=europe-west1
    """
    print_status(f"pipeline build-index: opening {table}")
    from index.build.build_index import BuildConfig
    from index.build.build_index import build_index as run_build
    from index.report.page import index_page
    from index.table.storage import Storage
    from index.table.table import open_table
    from pipeline.encoders.stored import open_decoder, point_encoders

    config = BuildConfig(
        desc_scale=desc_scale,
        geometry=geometry,
        center=center,
        search_dim=search_dim,
        balance=balance,
        balance_time_limit=balance_time_limit,
        max_memory=int(max_memory_gb * 2**30),
        index_type=index_type,
        target_recall=target_recall,
        target_perplexity=target_perplexity,
        allow_small_desc_scale=allow_small_desc_scale,
        seed=seed,
    )
    storage = Storage.of(storage_option or ())
    build, write = _index_writers(index_type, num_workers, runner, beam_options or [], storage)
    opened = point_encoders(open_table(table, storage=storage), image_encoder, text_encoder)
    built = run_build(opened, config, build, write)
    decode = None if built.table.stores_images else open_decoder(built.table.meta.image_encoder)
    if decode is None and not built.table.stores_images:
        ref = built.table.meta.image_encoder
        print_status(
            f"pipeline build-index: the page shows no images: the table's image encoder cannot be opened at {ref.name}"
        )
    page = built.table.write_page(
        "index", index_page(built.table, built.report, decode=decode, memory=config.max_memory)
    )
    _print_report(table, asdict(built.report), as_json, page=page)


@app.command("draw-targets", cls=Command)
def draw_targets(
    table: TableArgument,
    beam_options: BeamOptionsArgument = None,
    images: Annotated[int, TOTAL, typer.Option(metavar="N", help="Targets in all, over all steps.")] = 1_000_000,
    batch_size: Annotated[int, COUNT, typer.Option(metavar="N", help="Targets per step.")] = 256,
    seed: SeedOption = 0,
    search: Annotated[Search, typer.Option(help="LanceDB index, or exact search.")] = "ann",
    num_neighbors: NeighborsOption = 1,
    temperature: TemperatureOption = 1.0,
    jitter: JitterOption = 0.0,
    name: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="Name of the targets, next to the table.", show_default="seed and its number"
        ),
    ] = None,
    max_memory_gb: Annotated[
        float,
        Range(0, 2**16, above=True),
        typer.Option(metavar="GIB", help="Memory for the vectors of exact search."),
    ] = 4.0,
    device: DeviceOption = "auto",
    num_workers: WorkersOption = 1,
    runner: Annotated[
        str, typer.Option(metavar="NAME", help="Beam runner; its options follow `--` as --name=value.")
    ] = "FnApiRunner",
    storage_option: StorageOption = None,
    as_json: JsonOption = False,
) -> None:
    """Draw the targets of a training run ahead.

    Retrieves the pair of each slot of each step into DB/NAME.targets, for `trainer fit --targets NAME`. Rerun the same
    command to resume, or with more --images to add steps.

    Examples:
      pipeline draw-targets db/shapes.lance --images 1000000
      pipeline draw-targets db/shapes.lance --images 1000000 --seed 1 --num-workers 8
    """
    print_status(f"pipeline draw-targets: opening {table}")
    from index.table.storage import Storage
    from pipeline.config import RuntimeConfig
    from pipeline.targets.draw import DrawConfig
    from pipeline.targets.draw import draw_targets as run_draw

    config = DrawConfig(
        images=images,
        batch_size=batch_size,
        seed=seed,
        search=search,
        num_neighbors=num_neighbors,
        temperature=temperature,
        jitter=jitter,
        name=name,
        max_memory=int(max_memory_gb * 2**30),
    )
    runtime = RuntimeConfig(
        num_workers=num_workers,
        device=device,
        storage=Storage.of(storage_option or ()),
        beam_options=(f"--runner={runner}", *(beam_options or ())),
    )
    _print_report(table, run_draw(table, config, runtime), as_json)


@app.command(cls=Command)
def inspect(table: TableArgument, storage_option: StorageOption = None, as_json: JsonOption = False) -> None:
    """Show what a table holds and its last index report.

    Examples:
      pipeline inspect db/shapes.lance
      pipeline inspect db/shapes.lance --json
    """
    print_status(f"pipeline inspect: opening {table}")
    from index.report.report import describe
    from index.table.storage import Storage
    from index.table.table import open_table
    from pipeline.encoders.stored import describe_encoders

    opened = open_table(table, storage=Storage.of(storage_option or ()))
    _print_report(table, describe(opened) | describe_encoders(opened), as_json)


@app.command(cls=Command)
def prune(
    table: TableArgument,
    keep_version: Annotated[
        list[int] | None, COUNT, typer.Option(metavar="VERSION", help="Keep this version too. May be repeated.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be removed and stop.")] = False,
    storage_option: StorageOption = None,
    as_json: JsonOption = False,
) -> None:
    """Remove old versions of a table and their files.

    Kept are the newest version, the last with a complete index, and versions that unfinished training runs or targets
    drawn ahead need.

    Examples:
      pipeline prune db/shapes.lance --dry-run
      pipeline prune db/shapes.lance --keep-version 4
    """
    print_status(f"pipeline prune: opening {table}")
    from index.table.prune import prune as run_prune
    from index.table.storage import Storage
    from index.table.table import open_table

    opened = open_table(table, storage=Storage.of(storage_option or ()))
    _print_report(table, asdict(run_prune(opened, keep=keep_version or (), dry_run=dry_run)), as_json)


def _with_encoders(shape: Any, image: str | None, text: str | None) -> Any:
    """Return a planned table with the dimensions that encoders give, if any are named."""
    from pipeline.encoders.files import find_encoder
    from pipeline.encoders.image import DiffusersAutoencoder
    from pipeline.encoders.text import TransformersTextEncoder

    if image is not None:
        place = find_encoder(image, "image")
        latent_shape = DiffusersAutoencoder(place.name, revision=place.revision).latent_shape(shape.image_size)
        shape = replace(shape, latent_shape=latent_shape)
    if text is not None:
        place = find_encoder(text, "text")
        shape = replace(shape, text_dim=TransformersTextEncoder(place.name, revision=place.revision).text_dim())
    return shape


def _index_writers(
    index_type: str, num_workers: int, runner: str | None, beam_options: list[str], storage: Any
) -> tuple[Any, Any]:
    """Return what builds the index and what writes vectors: this process, or Beam if it is asked for."""
    from index.build.layout import write_vectors
    from index.errors import OptionError
    from index.search.lance_index import build_whole

    if num_workers > 1 or runner is not None:
        from pipeline.beam.index_segments import beam_builder
        from pipeline.beam.rewrite_vectors import beam_vector_writer
        from pipeline.config import RuntimeConfig

        options = (*([f"--runner={runner}"] if runner else []), *beam_options)
        runtime = RuntimeConfig(num_workers=num_workers, storage=storage, beam_options=options)
        return beam_builder(runtime, index_type), beam_vector_writer(runtime)
    if beam_options:
        raise OptionError(f"{beam_options[0]!r} is an option of Beam: add --runner NAME or --num-workers N")
    return build_whole, write_vectors


def _print_report(title: str, report: dict[str, Any], as_json: bool, *, page: str | None = None) -> None:
    """Print a report as JSON or as tables: its scalars, nested reports, lists of records, warnings, and its page."""
    if as_json:
        return print_json(report | ({"page": page} if page else {}))
    shown = {name: value for name, value in report.items() if name not in ("warnings", "hit_counts")}
    nested = {name: value for name, value in shown.items() if isinstance(value, dict)}
    tables = {
        name: rows for name, rows in shown.items() if isinstance(rows, list) and rows and isinstance(rows[0], dict)
    }
    print_table(title, {name: value for name, value in shown.items() if name not in tables | nested})
    for name, value in nested.items():
        _print_report(f"\n{name}", value, as_json=False)
    for name, rows in tables.items():
        print_columns(f"\n{name}", {str(number): row for number, row in enumerate(rows, 1)})
    for warning in report.get("warnings", ()):
        print(f"\nwarning: {warning}")
    if page:
        print(f"\npage: {page}")
    return None
