"""Captions of a folder of pictures as Hugging Face's imagefolder has them: metadata.csv, .jsonl or .parquet.

Each has a column `file_name`, relative to itself; a file without that column says nothing. What is not UTF-8 in a CSV
stays so, and only the captions in question are rejected.
"""

import csv
import io
import json
import posixpath
from collections.abc import Iterator
from typing import Any

from index.errors import SourceError, one_line
from index.table.storage import Storage
from pipeline.sources.arrow_types import plain_names
from pipeline.sources.columns import encode_meta

METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")


def read_records(uri: str, storage: Storage) -> Iterator[tuple[str, bytes]]:
    """Pictures' names and rows of one metadata file; a JSON line that cannot be read leaves its picture without."""
    rows = {".csv": _csv_rows, ".jsonl": _json_rows, ".parquet": _parquet_rows}[posixpath.splitext(uri)[1]]
    try:
        with storage.open(uri) as file:
            for fields, text in rows(file):
                if isinstance(name := fields.get("file_name"), str):
                    yield name, encode_meta(fields) if text is None else text
    except (csv.Error, ValueError) as error:
        raise SourceError(f"{uri} cannot be read: {one_line(error, typed=True)}") from error


def _csv_rows(file: Any) -> Iterator[tuple[dict[Any, Any], None]]:
    with io.TextIOWrapper(file, "utf-8-sig", errors="surrogateescape", newline="") as text:
        for row in csv.DictReader(text):
            yield row, None


def _json_rows(file: Any) -> Iterator[tuple[dict[str, Any], bytes]]:
    for line in file:
        try:
            fields = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(fields, dict):
            yield fields, line.strip()


def _parquet_rows(file: Any) -> Iterator[tuple[dict[str, Any], None]]:
    import pyarrow.parquet as pq

    with pq.ParquetFile(file) as table:
        for row in table.read(plain_names(table.schema_arrow)).to_pylist():
            yield row, None
