"""`pipeline`: from image-caption shards to an indexed Lance table. A skin: parse, build a config, call one function."""

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

TableArgument = Annotated[str, typer.Argument(help="The table, DB/NAME.lance.", show_default=False)]
StorageOption = Annotated[
    list[str] | None,
    typer.Option(help="For object stores, name=value, as LanceDB names them: aws_endpoint, aws_region ..."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


def main() -> None:
    """Entry point of the `pipeline` script."""
    run(app)


@app.command("demo-data")
def demo_data(
    out: Annotated[Path, typer.Argument(help="Folder for the shards.", show_default=False)],
    samples: Annotated[int, typer.Option(help="Training pictures to draw.")] = 20_000,
    size: Annotated[int, typer.Option(help="Side of a picture, in pixels.")] = 32,
    seed: Annotated[int, typer.Option(help="Same seed, same pictures.")] = 0,
) -> None:
    """Draw captioned shapes to img2dataset-style tar shards.

    pipeline demo-data data/shapes

    pipeline demo-data data/shapes --samples 1000 --size 64
    """
    from pipeline.demo.shapes import write_demo_data

    print_table(str(out), write_demo_data(out, samples=samples, size=size, seed=seed))


@app.command()
def encode(
    source: Annotated[
        list[str],
        typer.Argument(
            help="Tar or parquet shards, image folders, saved datasets, hf:NAME; globs, braces, any fsspec URI. "
            "After `--`: Beam options as --name=value.",
            show_default=False,
        ),
    ],
    table: Annotated[str, typer.Option(help="The table to write, DB/NAME.lance or s3://...", show_default=False)],
    image_encoder: Annotated[
        str, typer.Option(help="Folder or hub id of a diffusers autoencoder.", show_default=False)
    ],
    text_encoder: Annotated[
        str, typer.Option(help="Folder or hub id of a transformers text model.", show_default=False)
    ],
    image_size: Annotated[int, typer.Option(help="Side of the square that is encoded, in pixels.")] = 256,
    image_key: Annotated[str | None, typer.Option(help="Column or tar ending of the picture, `a;b`: in order.")] = None,
    caption_key: Annotated[str | None, typer.Option(help="Column, tar ending or JSON key of the caption.")] = None,
    min_image_size: Annotated[int | None, typer.Option(help="Filter: shorter side in pixels, at least.")] = None,
    max_aspect_ratio: Annotated[float | None, typer.Option(help="Filter: longer over shorter side, at most.")] = None,
    min_caption_length: Annotated[int | None, typer.Option(help="Filter: characters of the caption, at least.")] = None,
    max_caption_length: Annotated[int | None, typer.Option(help="Filter: characters of the caption, at most.")] = None,
    filter: Annotated[
        str | None, typer.Option(help="Filter: over the JSON sidecar, as in 'aesthetic > 5 and pwatermark < 0.8'.")
    ] = None,
    dedup: Annotated[
        str | None, typer.Option(help="Filter: keep the first of equal `image`s, or of equal image-caption `pair`s.")
    ] = None,
    desc_scale: Annotated[
        float | None, typer.Option(help="Weight of the description in the search, above 1; 4 unless given.")
    ] = None,
    geometry: Annotated[str | None, typer.Option(help="sphere (unless given), standard or raw.")] = None,
    val_fraction: Annotated[float, typer.Option(help="Share of rows kept from training.")] = 0.05,
    keep_images: Annotated[bool, typer.Option(help="Store the original bytes with each row.")] = False,
    limit: Annotated[int | None, typer.Option(help="Read only the first N samples.")] = None,
    max_reject_rate: Annotated[float, typer.Option(help="Stop before publishing if more is rejected.")] = 0.5,
    append: Annotated[bool, typer.Option(help="Add the shards that the table does not have.")] = False,
    workers: Annotated[int, typer.Option(help="Local processes, one torch thread each.")] = 1,
    batch_size: Annotated[int, typer.Option(help="Pictures encoded at a time.")] = 64,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps ...")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto (bfloat16 on cuda), float32, bfloat16 or float16.")] = "auto",
    storage_option: StorageOption = None,
    runner: Annotated[str, typer.Option(help="Beam runner.")] = "FnApiRunner",
    allow_small_desc_scale: Annotated[bool, typer.Option(help="Allow a --desc-scale of 1 or less.")] = False,
    dry_run: Annotated[bool, typer.Option(help="Check everything on a few samples, print the plan, stop.")] = False,
) -> None:
    """Encode image-caption pairs into a Lance table, on Apache Beam.

    pipeline encode data/shapes --table db/shapes.lance --image-encoder models/image --text-encoder models/text
    --image-size 32 --num-workers 2

    pipeline encode 's3://laion/{00000..00099}.tar' --table s3://mine/db/laion.lance --image-encoder
    stabilityai/sd-vae-ft-mse --text-encoder openai/clip-vit-large-patch14 --filter 'aesthetic > 5' --min-image-size 256
    """
    from index.table.storage import Storage
    from pipeline.config import RuntimeConfig
    from pipeline.encode.run import encode as run_encode
    from pipeline.encode.run import plan_encode
    from pipeline.encoders import pick_device

    device = pick_device(device)
    # What follows `--` reaches us among the sources.
    beam_options = [part for part in source if part.startswith("--")]
    how = RuntimeConfig(
        num_workers=workers,
        batch_size=batch_size,
        device=device,
        storage=Storage.of(storage_option or ()),
        beam_options=(f"--runner={runner}", *beam_options),
    )
    options: dict[str, Any] = {
        "image_encoder": image_encoder,
        "text_encoder": text_encoder,
        "image_size": image_size,
        "image_key": image_key,
        "caption_key": caption_key,
        "min_image_size": min_image_size,
        "max_aspect_ratio": max_aspect_ratio,
        "min_caption_length": min_caption_length,
        "max_caption_length": max_caption_length,
        "filter": filter,
        "dedup": dedup,
        "dtype": ("bfloat16" if device.startswith("cuda") else "float32") if dtype == "auto" else dtype,
        "desc_scale": desc_scale,
        "allow_small_desc_scale": allow_small_desc_scale,
        "geometry": geometry,
        "val_fraction": val_fraction,
        "keep_images": keep_images,
        "limit": limit,
        "max_reject_rate": max_reject_rate,
        "append": append,
    }
    config = plan_encode([part for part in source if part not in beam_options], options, how)
    encoded = run_encode(config, how, table, dry_run=dry_run)
    if encoded.done_before:
        print(f"{table} is already encoded with these options: nothing to do")
    hidden = ("table", "settings", "image_encoder", "text_encoder", "run_id", "beam_options", "versions")
    print_table(table, {name: value for name, value in encoded.report.items() if name not in hidden})


@app.command("build-index")
def build_index(
    table: TableArgument,
    beam_options: Annotated[
        list[str] | None, typer.Argument(help="After `--`: Beam options as --name=value.", show_default=False)
    ] = None,
    desc_scale: Annotated[
        str | None,
        typer.Option(help="A number above 1, or `auto`; the table's own unless given."),
    ] = None,
    geometry: Annotated[str | None, typer.Option(help="sphere, standard or raw.")] = None,
    center: Annotated[
        bool | None,
        typer.Option("--center/--no-center", help="Compare what descriptions do not tell of a latent."),
    ] = None,
    balance: Annotated[
        bool | None,
        typer.Option("--balance/--no-balance", help="Fit dual potentials: every row drawn equally often."),
    ] = None,
    balance_time_limit: Annotated[float, typer.Option(help="Time for --balance; call again to go on.")] = 300.0,
    max_memory_gb: Annotated[
        float, typer.Option(help="GiB of vectors held at a time, and that an index may take.")
    ] = 4.0,
    index_type: Annotated[
        str, typer.Option(help="auto, ivf_rq, ivf_pq, ivf_sq, ivf_flat, ivf_hnsw_sq or none (exact search).")
    ] = "auto",
    target_recall: Annotated[float, typer.Option(help="recall@1 wanted on the real query law.")] = 0.95,
    target_perplexity: Annotated[
        float, typer.Option(help="For auto: targets that a description chooses among.")
    ] = 100.0,
    allow_small_desc_scale: Annotated[bool, typer.Option(help="Allow a --desc-scale of 1 or less.")] = False,
    seed: Annotated[int, typer.Option(help="Same seed, same index.")] = 0,
    workers: Annotated[int, typer.Option(help="Local processes that build parts of the index.")] = 1,
    runner: Annotated[str | None, typer.Option(help="Beam runner that builds them.", show_default=False)] = None,
    storage_option: StorageOption = None,
    as_json: JsonOption = False,
) -> None:
    """Settle the geometry, build the LanceDB index, and report recall, shares and linear_probe_r2.

    pipeline build-index db/shapes.lance

    pipeline build-index db/shapes.lance --desc-scale auto --balance --target-recall 0.98

    pipeline build-index s3://mine/db/laion.lance --runner DataflowRunner -- --project=P --region=R
    """
    from dataclasses import asdict

    from index.build.build_index import BuildConfig
    from index.build.build_index import build_index as run_build
    from index.build.select import Builder
    from index.errors import OptionError
    from index.report.page import index_page, keeps_images
    from index.search.lance_index import build_whole
    from index.table.storage import Storage
    from index.table.table import open_table
    from pipeline.encoders import open_decoder

    config = BuildConfig(
        desc_scale=_scale(desc_scale),
        geometry=geometry,
        center=center,
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
    build: Builder = build_whole
    if workers > 1 or runner is not None:
        from pipeline.beam.index_segments import on_beam
        from pipeline.config import RuntimeConfig

        options = (*([f"--runner={runner}"] if runner else []), *(beam_options or ()))
        build = on_beam(RuntimeConfig(num_workers=workers, storage=storage, beam_options=options), index_type)
    elif beam_options:
        raise OptionError(f"{beam_options[0]!r} is for Beam: add --runner NAME or --num-workers N")
    built = run_build(open_table(table, storage=storage), config, build)
    decode = None if keeps_images(built.table) else open_decoder(built.table.meta.image_encoder)
    page = built.table.write_page("index", index_page(built.table, built.report, decode=decode))
    _show(table, asdict(built.report), as_json)
    if not as_json:
        print(f"\n{page}")


@app.command()
def inspect(table: TableArgument, storage_option: StorageOption = None, as_json: JsonOption = False) -> None:
    """Say what a table holds, and what its last index report found.

    pipeline inspect db/shapes.lance

    pipeline inspect db/shapes.lance --json
    """
    from index.report.report import describe
    from index.table.storage import Storage
    from index.table.table import open_table

    _show(table, describe(open_table(table, storage=Storage.of(storage_option or ()))), as_json)


def _scale(given: str | None) -> Any:
    from index.errors import OptionError

    if given is None or given == "auto":
        return given
    try:
        return float(given)
    except ValueError:
        raise OptionError(f"--desc-scale {given!r} is no number: give one above 1, for instance 4, or `auto`") from None


def _show(title: str, report: dict[str, Any], as_json: bool) -> None:
    import json

    if as_json:
        print(json.dumps(report, indent=2))
        return
    plain = {name: value for name, value in report.items() if name not in ("warnings", "hit_counts")}
    lists = {name: lines for name, lines in plain.items() if isinstance(lines, list) and lines}
    tables = {name: lines for name, lines in lists.items() if isinstance(lines[0], dict)}
    nested = {name: value for name, value in plain.items() if isinstance(value, dict)}
    print_table(title, {name: value for name, value in plain.items() if name not in tables | nested})
    for name, value in nested.items():
        _show(f"\n{name}", value, as_json=False)
    for name, lines in tables.items():
        print_columns(f"\n{name}", {str(number): line for number, line in enumerate(lines, 1)})
    for warning in report.get("warnings", ()):
        print(f"\nwarning: {warning}")
