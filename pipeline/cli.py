"""`pipeline`: from image-caption shards to an indexed Lance table. A skin: parse, build a config, call one function."""

from pathlib import Path
from typing import Annotated, Any

import typer

from index.console import print_columns, print_table, run

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    add_completion=False,
    pretty_exceptions_enable=False,
    help=__doc__.split(". A")[0] + ".",
)

TableArgument = Annotated[Path, typer.Argument(help="The table, DB/NAME.lance.", show_default=False)]
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
    from pipeline.demo import write_demo_data

    print_table(str(out), write_demo_data(out, samples=samples, size=size, seed=seed))


@app.command()
def encode(
    source: Annotated[
        list[str],
        typer.Argument(
            help="Files, folders, globs, brace patterns of .tar or .parquet; after `--` Beam options as --name=value.",
            show_default=False,
        ),
    ],
    table: Annotated[Path, typer.Option(help="The table to write, DB/NAME.lance.", show_default=False)],
    image_encoder: Annotated[
        str, typer.Option(help="Folder or hub id of a diffusers autoencoder.", show_default=False)
    ],
    text_encoder: Annotated[
        str, typer.Option(help="Folder or hub id of a transformers text model.", show_default=False)
    ],
    image_size: Annotated[int, typer.Option(help="Side of the square that is encoded, in pixels.")] = 256,
    desc_scale: Annotated[float, typer.Option(help="Weight of the description in the search, above 1.")] = 4.0,
    geometry: Annotated[str, typer.Option(help="sphere, standard or raw.")] = "sphere",
    heldout_share: Annotated[float, typer.Option(help="Share of rows kept from training.")] = 0.05,
    keep_images: Annotated[bool, typer.Option(help="Store the original bytes with each row.")] = False,
    limit: Annotated[int | None, typer.Option(help="Read only the first N samples.")] = None,
    max_reject_share: Annotated[float, typer.Option(help="Stop before publishing if more is rejected.")] = 0.5,
    workers: Annotated[int, typer.Option(help="Local processes, one torch thread each.")] = 1,
    batch_size: Annotated[int, typer.Option(help="Pictures encoded at a time.")] = 64,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps ...")] = "auto",
    runner: Annotated[str, typer.Option(help="Beam runner.")] = "FnApiRunner",
    allow_small_desc_scale: Annotated[bool, typer.Option(help="Allow a --desc-scale of 1 or less.")] = False,
    dry_run: Annotated[bool, typer.Option(help="Check sources, encoders and target, print the plan, stop.")] = False,
) -> None:
    """Encode image-caption shards into a Lance table, on Apache Beam.

    pipeline encode data/shapes --table db/shapes.lance --image-encoder models/image --text-encoder models/text
    --image-size 32 --workers 2

    pipeline encode 's3://laion/{00000..00099}.tar' --table db/laion.lance --image-encoder stabilityai/sd-vae-ft-mse
    --text-encoder openai/clip-vit-large-patch14 --image-size 256
    """
    from pipeline.encode import encode as run_encode
    from pipeline.encode import plan_encode
    from pipeline.rows import RunConfig

    options: dict[str, Any] = {
        "image_encoder": image_encoder,
        "text_encoder": text_encoder,
        "image_size": image_size,
        "desc_scale": desc_scale,
        "allow_small_desc_scale": allow_small_desc_scale,
        "geometry": geometry,
        "heldout_share": heldout_share,
        "keep_images": keep_images,
        "limit": limit,
        "max_reject_share": max_reject_share,
    }
    # What follows `--` reaches us among the sources.
    beam_options = [part for part in source if part.startswith("--")]
    config = plan_encode([part for part in source if part not in beam_options], options)
    how = RunConfig(
        workers=workers,
        batch_size=batch_size,
        device=device,
        beam_options=(f"--runner={runner}", *beam_options),
    )
    encoded = run_encode(config, how, str(table), dry_run=dry_run)
    if encoded.done_before:
        print(f"{table} is already encoded with these options: nothing to do")
    shown = (
        "rows",
        "rejects",
        "rejects_by_reason",
        "shards",
        "seconds",
        "images_per_second",
        "latent_shape",
        "text_width",
    )
    print_table(str(table), {name: encoded.report[name] for name in shown if name in encoded.report})


@app.command("build-index")
def build_index(
    table: TableArgument,
    desc_scale: Annotated[
        str | None,
        typer.Option(help="A number above 1, or `auto`; the table's own unless given."),
    ] = None,
    geometry: Annotated[str | None, typer.Option(help="sphere, standard or raw.")] = None,
    balance: Annotated[
        bool | None,
        typer.Option("--balance/--no-balance", help="Fit dual potentials: every row drawn equally often."),
    ] = None,
    index_type: Annotated[
        str, typer.Option(help="auto, ivf_rq, ivf_pq, ivf_sq, ivf_flat, ivf_hnsw_sq or none (exact search).")
    ] = "auto",
    target_recall: Annotated[float, typer.Option(help="recall@1 wanted on the real query law.")] = 0.95,
    perplexity: Annotated[float, typer.Option(help="For auto: targets that a description chooses among.")] = 100.0,
    allow_small_desc_scale: Annotated[bool, typer.Option(help="Allow a --desc-scale of 1 or less.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Settle the geometry, build the LanceDB index, and report recall, shares and learnability.

    pipeline build-index db/shapes.lance

    pipeline build-index db/shapes.lance --desc-scale auto --balance --target-recall 0.98
    """
    from index.build import BuildConfig
    from index.build import build_index as run_build
    from index.table import open_table

    config = BuildConfig(
        desc_scale=_scale(desc_scale),
        geometry=geometry,
        balance=balance,
        index_type=index_type,
        target_recall=target_recall,
        perplexity=perplexity,
        allow_small_desc_scale=allow_small_desc_scale,
    )
    built = run_build(open_table(table), config)
    _show(str(table), built.report, as_json)


@app.command()
def inspect(table: TableArgument, as_json: JsonOption = False) -> None:
    """Say what a table holds, and what its last index report found.

    pipeline inspect db/shapes.lance

    pipeline inspect db/shapes.lance --json
    """
    from index.report import describe
    from index.table import open_table

    _show(str(table), describe(open_table(table)), as_json)


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
    lists = {name: lines for name, lines in report.items() if isinstance(lines, list) and lines}
    tables = {name: lines for name, lines in lists.items() if isinstance(lines[0], dict)}
    print_table(title, {name: value for name, value in report.items() if name not in tables})
    for name, lines in tables.items():
        print_columns(f"\n{name}", {str(number): line for number, line in enumerate(lines, 1)})
