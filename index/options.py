"""Options that several commands share, and the layout of every command's help.

Imports nothing heavy, so that `--help` answers at once.
"""

import contextlib
import importlib.metadata
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from index.errors import OptionError
from index.ranges import COUNT, FRACTION, NOT_NEGATIVE, PIXELS, POSITIVE, SEED, TOTAL, ranges_of

TableArgument = Annotated[str, typer.Argument(metavar="TABLE", help="Table, DB/NAME.lance or an object-store URI.")]
_source = typer.Argument(
    metavar="SOURCE...",
    help="Tar or parquet shards, image folders, saved datasets or hf:NAME; globs, braces and fsspec URIs.",
)
SourceArgument = Annotated[list[str], _source]
OptionalSourceArgument = Annotated[list[str] | None, _source]
SeedOption = Annotated[int, SEED, typer.Option(help="Random seed; the same seed gives the same result.")]
DeviceOption = Annotated[str, typer.Option(metavar="DEVICE", help="Torch device: auto, cpu, cuda, cuda:1, mps, ...")]
StorageOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME=VALUE",
        help="Object-store option in LanceDB's names, such as aws_region=eu-west-1. May be repeated.",
    ),
]
ImageEncoderOption = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="Where the table's image encoder is now.", show_default="where it was"),
]
TextEncoderOption = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="Where the table's text encoder is now.", show_default="where it was"),
]
NeighborsOption = Annotated[int, COUNT, typer.Option(metavar="K", help="Sample each pair from its K nearest rows.")]
TemperatureOption = Annotated[
    float, POSITIVE, typer.Option(help="Softmax temperature over the squared distances of the K nearest rows.")
]
JitterOption = Annotated[float, NOT_NEGATIVE, typer.Option(help="Noise on query embeddings, relative to their norm.")]
LimitOption = Annotated[int | None, TOTAL, typer.Option(metavar="N", help="Read only the first N samples.")]
ValFractionOption = Annotated[float, FRACTION, typer.Option(help="Fraction of rows held out from training, 0 to 1.")]
ImageSizeOption = Annotated[int, PIXELS, typer.Option(help="Side of the square images in pixels.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]

MAX_FLAGS = 70
"""Characters of an option with its choices; more of them are listed in its help text instead."""


class Command(TyperCommand):
    """A typer command that checks the ranges of its numeric options, and shows every value and default in one way.

    Its help keeps indented lines as they are. A range is written in an option's annotation.
    """

    context_class = typer.Context

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the command line; raise OptionError for a number that is none or is out of its option's range."""
        given, ranges = list(args), dict(ranges_of(self.callback)) if self.callback else {}
        try:
            rest: list[str] = super().parse_args(ctx, args)
        except typer.BadParameter as error:
            wrong: Any = error.param
            if wrong is None or wrong.name not in ranges:
                raise
            text = self.make_parser(ctx).parse_args(args=given)[0][wrong.name]
            kind = "whole number" if wrong.type_descriptor.annotation is int else "number"
            raise OptionError(f"{wrong.opts[0]} {text!r} is not a {kind}: use {ranges[wrong.name]}") from None
        for param in self.get_params(ctx):
            value = ctx.params.get(param.name)
            is_unset = isinstance(value, str) or (param.multiple and not value)
            if param.name in ranges and not is_unset and not ctx.resilient_parsing:
                ranges[param.name].check(param.opts[0], value)
        return rest

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """Return the usage line's parts: arguments by their metavar, in brackets if they are optional."""
        arguments = [param for param in self.get_params(ctx) if param.param_type_name == "argument"]
        return ["[OPTIONS]", *(_name(param) if param.required else f"[{_name(param)}]" for param in arguments)]

    def format_help_text(self, ctx: Any, formatter: Any) -> None:
        """Wrap the description, but keep paragraphs with indented lines, the examples, as they are: they are copied."""
        for paragraph in (self.help or "").split("\n\n"):
            formatter.write_paragraph()
            with formatter.indentation():
                if "\n " in f"\n{paragraph}":
                    formatter.write("".join(f"  {line}\n" for line in paragraph.splitlines()))
                else:
                    formatter.write_text(paragraph)

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the tables of arguments and options."""
        params = self.get_params(ctx)
        for title, kind in (("Arguments", "argument"), ("Options", "option")):
            rows = [_row(param, ctx) for param in params if param.param_type_name == kind]
            if rows:
                with formatter.section(title):
                    formatter.write_dl(rows)


def _name(param: Any) -> str:
    return str(param.metavar or param.name.upper())


def _row(param: Any, ctx: Any) -> tuple[str, str]:
    """Return what a parameter is called and what it does, with `[required]` or its default."""
    note = ""
    if param.param_type_name == "option" and param.required:
        note = "required"
    elif isinstance(param.show_default, str):
        note = f"default: {param.show_default}"
    elif param.show_default and param.default is not None and not param.is_flag:
        note = f"default: {param.default:g}" if isinstance(param.default, float) else f"default: {param.default}"
    flags, text = _flags(param, ctx), param.help or ""
    if len(flags) > MAX_FLAGS:
        flag, _, choices = flags.partition(" [")
        flags, text = f"{flag} NAME", f"{text} One of {choices.rstrip(']').replace('|', ', ')}."
    return flags, f"{text}  [{note}]" if note else text


def _flags(param: Any, ctx: Any) -> str:
    if param.param_type_name == "argument":
        return _name(param)
    flags = " / ".join((*param.opts, *param.secondary_opts))
    return flags if param.is_flag else f"{flags} {_value(param, ctx)}"


def _value(param: Any, ctx: Any) -> str:
    """Return how the value of an option is shown: its metavar, its choices in brackets, or its type in capitals."""
    if param.metavar:
        return str(param.metavar)
    kind = str(param.display_type(ctx)).strip("<>")
    return f"[{kind}]" if "|" in kind else kind.upper()


def make_app(help: str) -> typer.Typer:
    """Return an empty command line with `--version` and shell completion; its commands use `Command`."""
    app = typer.Typer(
        help=help,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        context_settings={"max_content_width": 120},
    )

    @app.callback()
    def options(
        version: Annotated[
            bool, typer.Option("--version", help="Show the version and exit.", is_eager=True, callback=_print_version)
        ] = False,
    ) -> None:
        pass

    return app


def _print_version(wanted: bool) -> bool:
    if wanted:
        print(f"coalescer {importlib.metadata.version('coalescer')}")
        raise typer.Exit
    return wanted


def check_folder(out: Path) -> None:
    """Raise OptionError if `--out` cannot be a folder to write into; nothing is created."""
    with _accessing(out):
        if out.exists() and not out.is_dir():
            raise OptionError(f"--out {out} is a file: use the name of a folder")
        _check_writable(out, out)


def check_file(out: Path) -> None:
    """Raise OptionError if `--out` cannot be a file to write; nothing is created."""
    with _accessing(out):
        if out.is_dir():
            raise OptionError(f"--out {out} is a folder: use the name of a file")
        _check_writable(out, out.parent)


def _check_writable(out: Path, folder: Path) -> None:
    nearest = next(each for each in (folder.absolute(), *folder.absolute().parents) if each.exists())
    if not nearest.is_dir():
        raise OptionError(f"--out {out} is below {nearest}, which is a file: use another folder")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise OptionError(f"--out {out} cannot be written: {nearest} is read-only: use another folder")


@contextlib.contextmanager
def _accessing(out: Path) -> Iterator[None]:
    """Turn the errors of names that are too long and folders that cannot be looked into into an OptionError."""
    try:
        yield
    except OSError as error:
        raise OptionError(f"--out {out} cannot be written ({error.strerror}): use another folder") from error


def parse_integers(text: str) -> list[int]:
    """Parse comma-separated integers."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise typer.BadParameter(
            f"{text!r} is not a comma-separated list of integers: type for instance 1,2,4"
        ) from None
