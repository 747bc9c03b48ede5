"""BuildSegments: build a vector index on Beam, one segment for each group of the table's fragments.

    groups of fragments -> build a segment of each -> wait for all -> merge and commit

What crosses Beam is ids of fragments. Partitions are trained once, before the graph runs; workers read them from a file
next to the table, and leave what describes their segments in a folder beside it.
"""

import base64
import pickle
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import apache_beam as beam

from index.background import look_up
from index.build.select import Builder
from index.errors import OptionError, TableError
from index.search.lance_index import MERGEABLE, IndexPlan, build_segment, newest, publish_segments, without_index
from index.table.codec import from_json_dict, to_json_dict
from index.table.table import Table
from index.terminal import Progress
from pipeline.beam.engine import check_engine
from pipeline.beam.gather import Barrier
from pipeline.beam.runner import run_beam
from pipeline.config import RuntimeConfig

ROWS_PER_SEGMENT = 2**20


def beam_builder(runtime: RuntimeConfig, index_type: str) -> Builder:
    """Return the function with which `build_index` builds an index on Beam.

    Raises OptionError if segments of this index type cannot be merged, or the runner or its options are wrong.
    """
    if index_type not in ("auto", "none", *MERGEABLE):
        raise OptionError(
            f"--index-type {index_type} can only be built by one process: use one of {', '.join(MERGEABLE)}, "
            "or leave out --num-workers and --runner"
        )
    check_engine(runtime)

    def build(table: Table, plan: IndexPlan, log: Path | None) -> Table:
        table = without_index(table)
        plan_uri = f"{table.uri.removesuffix('.lance')}.plan.json"
        groups = fragment_groups(table, runtime.num_workers)
        try:
            table.storage.remove(segments_folder(table.uri))  # of a build that was killed
            table.storage.write_json(plan_uri, to_json_dict(plan))
            with Progress(f"build {plan.index_type}", total=len(groups), unit="segments", log=log) as bar:
                run_beam(
                    lambda pipeline: (
                        pipeline
                        | "Fragments" >> beam.Create(groups)
                        | "Build segments" >> BuildSegments(table, plan_uri, [group[0] for group in groups])
                    ),
                    runtime,
                    table.uri,
                    memory_advice="fewer --num-workers",
                )
                bar.advance(len(groups))
        finally:
            table.storage.remove(plan_uri)
            table.storage.remove(segments_folder(table.uri))
        return newest(table)

    return build


def segments_folder(uri: str) -> str:
    """Return the folder of what describes the segments of an unfinished index: DB/NAME.segments."""
    return uri.removesuffix(".lance") + ".segments"


def fragment_groups(table: Table, num_workers: int) -> list[list[int]]:
    """Return ids of fragments in groups of at most 2^20 rows, and of at most a worker's equal part of the table."""
    fragments = [(each.fragment_id, each.metadata.physical_rows) for each in table.dataset().get_fragments()]
    max_rows = min(ROWS_PER_SEGMENT, -(-sum(rows for _, rows in fragments) // num_workers))
    groups, group_rows = list[list[int]](), 0
    for fragment, rows in fragments:
        if not groups or group_rows + rows > max_rows:
            groups.append([])
            group_rows = 0
        groups[-1].append(fragment)
        group_rows += rows
    return groups


class BuildSegments(beam.PTransform):  # type: ignore[misc]
    """PCollection of groups of fragment ids -> PCollection with the one version number of the indexed table.

    `names` are the first ids of all groups.
    """

    def __init__(self, table: Table, plan_uri: str, names: Sequence[int]) -> None:
        super().__init__()
        self.table, self.plan_uri, self.names = table, plan_uri, names

    def expand(self, groups: Any) -> Any:
        """Build the graph."""
        return (
            groups
            | "Spread" >> beam.Reshuffle()
            | "Build" >> beam.ParDo(_BuildSegment(self.table, self.plan_uri))
            | "Wait for all" >> Barrier()
            | "Commit" >> beam.ParDo(_CommitSegments(self.table, self.names))
        )


class _BuildSegment(beam.DoFn):  # type: ignore[misc]
    """A group of fragment ids -> its first id, once the segment that covers them is built and described in a file."""

    def __init__(self, table: Table, plan_uri: str) -> None:
        self.table, self.plan_uri = table, plan_uri

    def setup(self) -> None:
        self.plan = from_json_dict(IndexPlan, self.table.storage.read_json(self.plan_uri))

    def process(self, fragments: list[int]) -> Iterator[int]:
        segment = pickle.dumps(build_segment(self.table, self.plan, fragments))
        self.table.storage.write_json(_segment_uri(self.table, fragments[0]), base64.b64encode(segment).decode())
        yield fragments[0]


class _CommitSegments(beam.DoFn):  # type: ignore[misc]
    """Number of segments -> the version of the table that they index."""

    def __init__(self, table: Table, names: Sequence[int]) -> None:
        self.table, self.names = table, names

    def process(self, number: int) -> Iterator[int]:
        if number != len(self.names):  # some engines drop elements without an error
            raise TableError(
                f"the index of {self.table.uri} is not finished ({number:,} of {len(self.names):,} segments built): "
                "rerun the same command"
            )
        segments = list(look_up(lambda name: _read_segment(self.table, name), self.names))
        yield publish_segments(self.table, segments).version


def _segment_uri(table: Table, name: int) -> str:
    return f"{segments_folder(table.uri)}/{name}.json"


def _read_segment(table: Table, name: int) -> Any:
    return pickle.loads(base64.b64decode(table.storage.read_json(_segment_uri(table, name))))
