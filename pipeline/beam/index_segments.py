"""BuildSegments: build a vector index on Beam, one segment for each group of the table's fragments.

    groups of fragments -> build a segment of each -> gather -> merge and commit

What crosses Beam is ids of fragments and names of segment files. Partitions are trained once, before the graph runs;
workers read them from a file next to the table.
"""

import base64
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import apache_beam as beam

from index.build.select import Builder
from index.errors import OptionError
from index.search.lance_index import MERGEABLE, IndexPlan, build_segment, newest, publish_segments, without_index
from index.table.codec import from_json_dict, to_json_dict
from index.table.table import Table
from index.terminal import Progress
from pipeline.beam.engine import check_engine
from pipeline.beam.gather import Gather
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
            table.storage.write_json(plan_uri, to_json_dict(plan))
            with Progress(f"build {plan.index_type}", total=len(groups), unit="segments", log=log) as bar:
                run_beam(
                    lambda pipeline: (
                        pipeline
                        | "Fragments" >> beam.Create(groups)
                        | "Build segments" >> BuildSegments(table, plan_uri)
                    ),
                    runtime,
                    table.uri,
                    memory_advice="fewer --num-workers",
                )
                bar.advance(len(groups))
        finally:
            table.storage.remove(plan_uri)
        return newest(table)

    return build


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
    """PCollection of groups of fragment ids -> PCollection with the one version number of the indexed table."""

    def __init__(self, table: Table, plan_uri: str) -> None:
        super().__init__()
        self.table, self.plan_uri = table, plan_uri

    def expand(self, groups: Any) -> Any:
        """Build the graph."""
        return (
            groups
            | "Spread" >> beam.Reshuffle()
            | "Build" >> beam.ParDo(_BuildSegment(self.table, self.plan_uri))
            | "Gather" >> Gather()
            | "Commit" >> beam.ParDo(_CommitSegments(self.table))
        )


class _BuildSegment(beam.DoFn):  # type: ignore[misc]
    """A group of fragment ids -> the segment that covers them, pickled as text."""

    def __init__(self, table: Table, plan_uri: str) -> None:
        self.table, self.plan_uri = table, plan_uri

    def setup(self) -> None:
        self.plan = from_json_dict(IndexPlan, self.table.storage.read_json(self.plan_uri))

    def process(self, fragments: list[int]) -> Iterator[str]:
        yield base64.b64encode(pickle.dumps(build_segment(self.table, self.plan, fragments))).decode()


class _CommitSegments(beam.DoFn):  # type: ignore[misc]
    """All segments -> the version of the table that they index."""

    def __init__(self, table: Table) -> None:
        self.table = table

    def process(self, segments: list[str]) -> Iterator[int]:
        yield publish_segments(self.table, [pickle.loads(base64.b64decode(text)) for text in sorted(segments)]).version
