"""LayOutVectors: the search vectors of any table's fragments, written on Beam."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import apache_beam as beam
import numpy as np
from apache_beam.options.pipeline_options import PipelineOptions

from index.table.commit import encoded_columns, publish
from index.table.storage import Storage
from index.table.table import open_table
from pipeline.beam.layout import Layout, LayOutVectors
from pipeline.beam.write_lance import fragment_from_dict


def test_vectors_are_those_of_the_layout(encoded, tmp_path):
    uri, results = str(tmp_path / "t.lance"), tmp_path / "fragments"
    shutil.copytree(encoded.uri, uri)
    table, storage = open_table(uri), Storage()
    meta = table.meta.with_geometry(replace(table.meta.geometry, desc_scale=2.0))
    Layout(meta, balance=0.5).write(str(tmp_path / "layout.json"), storage)
    fragments = [json.dumps(each.metadata.to_json()) for each in table.dataset().get_fragments()]
    schema = encoded_columns(table)
    with beam.Pipeline(options=PipelineOptions(["--runner=FnApiRunner"])) as pipeline:
        (
            pipeline
            | beam.Create(list(enumerate(fragments)))
            | LayOutVectors(uri, schema, str(tmp_path / "layout.json"), storage)
            | beam.MapTuple(lambda position, text: f"{position} {text}")
            | beam.io.WriteToText(str(results), shard_name_template="")
        )
    lines = sorted(Path(results).read_text().splitlines())
    laid_out = [fragment_from_dict(json.loads(line.partition(" ")[2])) for line in lines]
    after = publish(uri, schema, meta, laid_out, "run", storage, mode="overwrite")
    text, latent, vector = (after.column(name, split=None) for name in ("text", "latent", "vector"))
    expected = meta.geometry.vectors(text, latent, np.full(len(text), 0.5, np.float32))
    assert np.array_equal(vector, expected.astype(np.float16))
    assert np.array_equal(text, encoded.column("text", split=None))
