"""Build the LanceDB vector index: in one process, or as segments of some fragments that are merged in one commit.

Segments can be merged only if they share the partitions and the rotation of IVF_RQ. Both are seeded and stored in the
plan, so that the same plan gives the same index on any machine.
"""

import contextlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float32

from index.search.kmeans import partition_file, train_centroids
from index.table.commit import update_meta
from index.table.storage import unwritable
from index.table.table import VECTOR_INDEX, Table, index_uuid
from index.terminal import Progress

if TYPE_CHECKING:
    from lance.indices import Index

MERGEABLE = ("ivf_rq", "ivf_flat")
"""Index types whose segments merge without a loss of recall (measured: merged IVF_SQ falls from 0.98 to 0.70)."""


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class IndexPlan:
    """Everything that determines the contents of an index."""

    index_type: str
    """ivf_rq, ivf_pq, ivf_sq, ivf_flat or ivf_hnsw_sq."""
    centroids: Float32[np.ndarray, "P S"]
    num_bits: int | None = None
    """Bits per dimension of IVF_RQ."""
    rotation: str | None = None
    """The random rotation of IVF_RQ, in Lance's JSON."""
    memory: int | None = None
    """Bytes that assigning rows to partitions may take; changes no result."""

    @classmethod
    def train(
        cls,
        table: Table,
        index_type: str,
        num_partitions: int,
        *,
        num_bits: int | None = None,
        seed: int,
        memory: int | None = None,
    ) -> "IndexPlan":
        """Train the partitions of an index of `table` and, for IVF_RQ, draw its rotation.

        Training, and whoever builds the index, hold at most `memory` bytes (None: no limit).
        """
        centroids = train_centroids(table, num_partitions, seed=seed, memory=memory)
        rotation = None if num_bits is None else _draw_rotation(centroids.shape[1], num_bits, seed)
        return cls(index_type=index_type, centroids=centroids, num_bits=num_bits, rotation=rotation, memory=memory)

    def options(self) -> dict[str, Any]:
        """Return the keyword arguments of Lance's `create_index`."""
        options: dict[str, Any] = {
            "column": "vector",
            "index_type": self.index_type.upper(),
            "name": VECTOR_INDEX,
            "metric": "L2",
            "num_partitions": len(self.centroids),
            "ivf_centroids": self.centroids,
        }
        if self.rotation is not None:
            options |= {"num_bits": self.num_bits, "rabitq_model": self.rotation}
        if self.index_type == "ivf_pq":
            options["num_sub_vectors"] = self.centroids.shape[1] // 8
        return options


def _draw_rotation(dim: int, num_bits: int, seed: int) -> str:
    """Return a rotation of IVF_RQ whose random signs are seeded."""
    import lance

    model = json.loads(lance.lance.indices.build_rq_model(dim, num_bits))
    count = len(model["fast_rotation_signs"])
    model["fast_rotation_signs"] = np.random.default_rng([seed, dim]).integers(256, size=count).tolist()
    return json.dumps(model)


def build_whole(table: Table, plan: IndexPlan, log: Path | None) -> Table:
    """Build an index in this process; it replaces the existing one, and the last complete version keeps serving."""
    table = undescribed(index_splits(table))
    dataset = table.dataset()
    with Progress(f"build {plan.index_type}", total=None, unit="steps", log=log) as bar:

        def tick(progress: Any) -> None:
            bar.advance(1, stage=f"{progress.stage} {progress.completed}/{progress.total or '?'}")

        with partition_file(table, plan.centroids, memory=plan.memory) as partitions, _written_whole(table):
            dataset.create_index(
                replace=True, progress_callback=tick, precomputed_partition_dataset=partitions, **plan.options()
            )
    return table.at(dataset)


@contextlib.contextmanager
def _written_whole(table: Table) -> Iterator[None]:
    """Raise TableError if Lance could not read back what it wrote, as on a full disk."""
    try:
        yield
    except ValueError as error:
        if "not appear to be a Lance file" not in str(error):
            raise
        raise unwritable(table.uri, error) from error


def undescribed(table: Table) -> Table:
    """Remove the index from the metadata, before it is replaced: from now on the last complete version serves."""
    return table if table.meta.index is None else update_meta(table, replace(table.meta, index=None))


def without_index(table: Table) -> Table:
    """Drop the vector index, so that Lance can build segments; the last complete version keeps serving."""
    table = undescribed(index_splits(table))
    dataset = table.dataset()
    if index_uuid(dataset) is not None:
        dataset.drop_index(VECTOR_INDEX)
    return table.at(dataset)


def build_segment(table: Table, plan: IndexPlan, fragments: Sequence[int]) -> "Index":
    """Build the part of an index that covers some fragments; readers do not see it yet, and it can be pickled."""
    with partition_file(table, plan.centroids, fragments, plan.memory) as partitions:
        return table.dataset().create_index_uncommitted(
            fragment_ids=list(fragments), precomputed_partition_dataset=partitions, **plan.options()
        )


def publish_segments(table: Table, segments: Sequence["Index"]) -> Table:
    """Merge segments that cover all fragments and commit them as the index; does nothing if there is one already."""
    dataset = newest(table).dataset()
    if index_uuid(dataset) is None:
        merged = dataset.merge_existing_index_segments(list(segments)) if len(segments) > 1 else segments[0]
        dataset = dataset.commit_existing_index_segments(VECTOR_INDEX, "vector", [merged])
    return table.at(dataset)


def newest(table: Table) -> Table:
    """Return the newest version of a table."""
    import lance

    dataset = lance.dataset(table.uri, storage_options=table.storage.lance)
    return table.at(dataset)


def index_splits(table: Table) -> Table:
    """Add a bitmap index on `split`, the filter of every search, if there is none."""
    dataset = table.dataset()
    if not any("split" in index.field_names for index in dataset.describe_indices()):
        dataset.create_scalar_index("split", "BITMAP")
    return table.at(dataset)
