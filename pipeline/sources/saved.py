"""Read a Hugging Face dataset written by `save_to_disk`: one split, or a folder with all splits (DatasetDict).

The Arrow files are memory-mapped; `datasets` first copies those of an object store to this machine, once per process.
Images stay encoded.
"""

import hashlib
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

from index.errors import SourceError, one_line
from index.table.storage import Storage
from pipeline.sources.columns import ROWS_PER_READ, Columns
from pipeline.sources.identity import FileInfo
from pipeline.sources.ranges import SampleRange, split_into_ranges
from pipeline.sources.sample import ReadOptions, Sample, Unreadable

DATASET_DICT_FILE = "dataset_dict.json"
DATASET_FILES = ("state.json", "dataset_info.json")


def is_saved_dataset(folder: str, storage: Storage) -> bool:
    """Return whether a folder is a saved Dataset or DatasetDict."""
    if storage.exists(f"{folder}/{DATASET_DICT_FILE}"):
        return True
    return all(storage.exists(f"{folder}/{name}") for name in DATASET_FILES)


def list_shards(folder: str, options: ReadOptions) -> list[str]:
    """Return the ranges of every split; raises SourceError if the dataset cannot be loaded."""
    _load.cache_clear()
    try:
        splits = (options.storage.read_json(f"{folder}/{DATASET_DICT_FILE}") or {}).get("splits")
        folders = [f"{folder}/{split}" for split in splits] if splits else [folder]
        return [shard for split in folders for shard in split_into_ranges(split, len(_load(split, options.storage)))]
    except Exception as error:  # pyarrow and datasets raise exceptions of any class for a damaged file
        raise SourceError(
            f"{folder} cannot be loaded by datasets.load_from_disk ({one_line(error, typed=True)}): "
            "save it again with save_to_disk"
        ) from error


def count_samples(shard: str, options: ReadOptions) -> int | None:
    """Return the number of rows, from the shard's name."""
    return SampleRange.parse(shard).num_samples


def identity(shard: str, options: ReadOptions) -> str:
    """Return a hash of the range and of the names, sizes and times of change of the Arrow files."""
    sample_range = SampleRange.parse(shard)
    files, path = options.storage.files(sample_range.folder)
    arrow = [info for info in files.ls(path, detail=True) if info["name"].endswith(".arrow")]
    states = sorted((info["name"].rsplit("/", 1)[-1], FileInfo.of(info).state) for info in arrow)
    text = f"{sample_range.start}-{sample_range.stop}: {states}"
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]


def read_samples(shard: str, options: ReadOptions) -> Iterator[Sample | Unreadable]:
    """Yield the rows in their order."""
    sample_range = SampleRange.parse(shard)
    dataset = _load(sample_range.folder, options.storage)
    sample_range.check(len(dataset))
    columns = Columns.of(dataset.features.arrow_schema, options)
    stem = sample_range.folder.rsplit("/", 1)[-1]
    dataset = dataset.with_format("arrow", columns=columns.names)
    for start in range(sample_range.start, sample_range.stop, ROWS_PER_READ):
        rows = dataset[start : min(start + ROWS_PER_READ, sample_range.stop)]
        yield from columns.samples(rows, shard, stem, start, options)


@lru_cache(maxsize=4)
def _load(folder: str, storage: Storage) -> Any:
    import datasets

    files, _ = storage.files(folder)
    return datasets.load_from_disk(folder, storage_options=dict(files.storage_options))
