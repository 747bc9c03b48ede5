"""Read the metadata.csv, metadata.jsonl and metadata.parquet files of an image folder.

A file that cannot be read at all is an error. What is wrong with parts of it is told in words, which become the details
of the samples that lack a caption for it.
"""

import csv
import io
import json
import posixpath
from collections.abc import Iterator
from typing import Any, NamedTuple

from index.errors import SourceError, one_line
from pipeline.sources.columns import columns_without_bytes, encode_meta
from pipeline.sources.sample import ReadOptions

METADATA_FILES = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
FILE_NAME = "file_name"
DELIMITERS = (",", ";", "\t")


class Row(NamedTuple):
    """One row of a metadata file."""

    file_name: str
    json: bytes
    fault: str | None = None
    """Why its fields cannot be trusted."""


def read_metadata(uri: str, options: ReadOptions, faults: list[str]) -> Iterator[Row]:
    """Yield the rows that name an image, and add to `faults` what is wrong with the file.

    Raises SourceError if the file cannot be read.
    """
    read_rows = {".csv": _csv_rows, ".jsonl": _json_rows, ".parquet": _parquet_rows}[posixpath.splitext(uri)[1]]
    name, unnamed = posixpath.basename(uri), 0
    try:
        with options.storage.open(uri) as file:
            for fields, line, fault in read_rows(file, name, options, faults):
                file_name = fields.get(FILE_NAME)
                if isinstance(file_name, str) and file_name:
                    yield Row(file_name, encode_meta(fields) if line is None else line, fault)
                else:
                    unnamed += 1
    except (csv.Error, ValueError) as error:
        raise SourceError(f"{uri} cannot be read ({one_line(error, typed=True)}): fix or remove the file") from error
    if unnamed:
        faults.append(f"{name} has {unnamed:,} rows without {FILE_NAME!r}")


_Fields = Iterator[tuple[dict[Any, Any], bytes | None, str | None]]


def _csv_rows(file: Any, name: str, options: ReadOptions, faults: list[str]) -> _Fields:
    csv.field_size_limit(max(csv.field_size_limit(), min(options.max_sample_bytes, 2**31 - 1)))
    # Bytes that are not UTF-8 are kept, so that only the captions with such bytes are rejected.
    with io.TextIOWrapper(file, "utf-8-sig", errors="surrogateescape", newline="") as text:
        header = text.readline()
        columns = {delimiter: next(csv.reader([header], delimiter=delimiter), []) for delimiter in DELIMITERS}
        delimiter = next((each for each in DELIMITERS if FILE_NAME in columns[each]), None)
        if delimiter is None:
            faults.append(f"{name} has no column {FILE_NAME!r}, only {', '.join(columns[','])[:200]}")
            return
        reader = csv.DictReader(text, columns[delimiter], delimiter=delimiter)
        for row in reader:
            extra, line = row.pop(None, None), reader.line_num + 1
            fault = f"line {line:,} of {name} has more fields than its header: quote the caption" if extra else None
            yield row, None, fault


def _json_rows(file: Any, name: str, options: ReadOptions, faults: list[str]) -> _Fields:
    bad = 0
    for number, line in enumerate(file):
        line = line.removeprefix(b"\xef\xbb\xbf") if number == 0 else line
        try:
            fields = json.loads(line)
        except (ValueError, RecursionError):
            bad += bool(line.strip())
            continue
        if isinstance(fields, dict):
            yield fields, line.strip(), None
        else:
            bad += 1
    if bad:
        faults.append(f"{name} has {bad:,} lines that are not JSON objects")


def _parquet_rows(file: Any, name: str, options: ReadOptions, faults: list[str]) -> _Fields:
    import pyarrow.parquet as pq

    with pq.ParquetFile(file) as table:
        names = columns_without_bytes(table.schema_arrow)
        if FILE_NAME not in names:
            faults.append(f"{name} has no column {FILE_NAME!r}, only {', '.join(names)[:200]}")
            return
        for row in table.read(names).to_pylist():
            yield row, None, None
