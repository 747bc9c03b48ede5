"""A Hugging Face dataset as `save_to_disk` writes it: one split, or a folder of all splits.

The Arrow files are mapped into memory; `datasets` copies those of an object store to this machine first, in every
process. Pictures stay encoded.
"""

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

from index.errors import SourceError, one_line
from index.table.storage import Storage
from pipeline.sources.columns import ROWS, Columns
from pipeline.sources.ranges import SampleRange, cut
from pipeline.sources.sample import ReadOptions, Sample, Unreadable

SPLITS = "dataset_dict.json"
ONE_SPLIT = ("state.json", "dataset_info.json")


def is_saved(folder: str, storage: Storage) -> bool:
    """Whether a folder is one split or holds several."""
    return storage.exists(f"{folder}/{SPLITS}") or all(storage.exists(f"{folder}/{name}") for name in ONE_SPLIT)


def list_shards(folder: str, reading: ReadOptions) -> list[str]:
    """Pieces of every split."""
    _dataset.cache_clear()
    try:
        splits = (reading.storage.read_json(f"{folder}/{SPLITS}") or {}).get("splits")
        folders = [f"{folder}/{split}" for split in splits] if splits else [folder]
        return [shard for split in folders for shard in cut(split, len(_dataset(split, reading.storage)))]
    except Exception as error:  # pyarrow and datasets raise whatever they meet in a damaged file
        raise SourceError(f"{folder} is no dataset that can be loaded: {one_line(error, typed=True)}") from error


def count_samples(shard: str, reading: ReadOptions) -> int | None:
    """As the shard's name tells."""
    return SampleRange.parse(shard).size


def read_samples(shard: str, reading: ReadOptions) -> Iterator[Sample | Unreadable]:
    """The rows in their order."""
    piece = SampleRange.parse(shard)
    dataset = _dataset(piece.folder, reading.storage)
    piece.check(len(dataset))
    columns = Columns.of(dataset.features.arrow_schema, reading)
    stem = piece.folder.rsplit("/", 1)[-1]
    dataset = dataset.with_format("arrow", columns=columns.names)
    for start in range(piece.start, piece.stop, ROWS):
        rows = dataset[start : min(start + ROWS, piece.stop)]
        yield from columns.samples(rows, shard, stem, start)


@lru_cache(maxsize=4)
def _dataset(folder: str, storage: Storage) -> Any:
    import datasets

    files, _ = storage.files(folder)
    return datasets.load_from_disk(folder, storage_options=dict(files.storage_options))
