"""BuildSegments: a vector index built on Beam, a segment for some of the table's fragments on each worker.

    groups of fragments -> build a segment of each -> gather -> merge and commit

What crosses Beam is numbers of fragments and names of segment files. Partitions are trained once, before; workers read
them from a file beside the table.
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
from pipeline.beam.runner import run_beam
from pipeline.config import RuntimeConfig

ROWS_PER_SEGMENT = 2**20


def on_beam(run: RuntimeConfig, index_type: str) -> Builder:
    """What builds an index for `build_index` on Beam; OptionError where segments of that type cannot be merged."""
    if index_type not in ("auto", "none", *MERGEABLE):
        raise OptionError(
            f"--index-type {index_type} is built by one process: choose one of {', '.join(MERGEABLE)}, "
            "or leave out --num-workers and --runner"
        )

    def build(table: Table, plan: IndexPlan, log: Path | None) -> Table:
        table = without_index(table)
        plan_file = f"{table.uri.removesuffix('.lance')}.plan.json"
        table.storage.write_json(plan_file, to_json_dict(plan))
        groups = fragment_groups(table, run.num_workers)
        with Progress(f"build {plan.index_type}", total=len(groups), unit="segments", log=log) as bar:
            run_beam(
                lambda pipeline: (
                    pipeline | "Fragments" >> beam.Create(groups) | "Build segments" >> BuildSegments(table, plan_file)
                ),
                run,
                table.uri,
                relief="fewer --num-workers",
            )
            bar.advance(len(groups))
        table.storage.remove(plan_file)
        return newest(table)

    return build


def fragment_groups(table: Table, workers: int) -> list[list[int]]:
    """Numbers of fragments, in groups of at most about a million rows, and where it can be one for each worker."""
    fragments = [(each.fragment_id, each.metadata.physical_rows) for each in table.dataset().get_fragments()]
    most = min(ROWS_PER_SEGMENT, -(-sum(rows for _, rows in fragments) // workers))
    groups, held = list[list[int]](), 0
    for number, rows in fragments:
        if not groups or held + rows > most:
            groups.append([])
            held = 0
        groups[-1].append(number)
        held += rows
    return groups


class BuildSegments(beam.PTransform):  # type: ignore[misc]
    """PCollection of groups of fragments -> PCollection with the one version number of the indexed table."""

    def __init__(self, table: Table, plan_file: str) -> None:
        super().__init__()
        self.table, self.plan_file = table, plan_file

    def expand(self, groups: Any) -> Any:
        """The graph."""
        return (
            groups
            | "Spread" >> beam.Reshuffle()
            | "Build" >> beam.ParDo(_Build(self.table, self.plan_file))
            | "Gather" >> beam.combiners.ToList()
            | "Publish" >> beam.ParDo(_Publish(self.table))
        )


class _Build(beam.DoFn):  # type: ignore[misc]
    """A group of fragments -> the segment that covers it, as text."""

    def __init__(self, table: Table, plan_file: str) -> None:
        self.table, self.plan_file = table, plan_file

    def setup(self) -> None:
        self.plan = from_json_dict(IndexPlan, self.table.storage.read_json(self.plan_file))

    def process(self, fragments: list[int]) -> Iterator[str]:
        yield base64.b64encode(pickle.dumps(build_segment(self.table, self.plan, fragments))).decode()


class _Publish(beam.DoFn):  # type: ignore[misc]
    """All segments in; the version of the table that they serve out."""

    def __init__(self, table: Table) -> None:
        self.table = table

    def process(self, segments: list[str]) -> Iterator[int]:
        yield publish_segments(self.table, [pickle.loads(base64.b64decode(text)) for text in sorted(segments)]).version
