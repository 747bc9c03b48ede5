"""The index report in words and pictures."""

import re
import shutil

import pytest

from index.build.build_index import BuildConfig, build_index
from index.report.advice import advise
from index.table.table import open_table
from pipeline.index_page import find_examples, index_page

WELL = {
    "anti_hub_rate": 0.14,
    "expected_anti_hub_rate": 0.13,
    "chi_square": 0.02,
    "recall_at_1": 0.96,
    "target_recall": 0.95,
    "perplexity": 90.0,
    "text_distance": 0.1,
    "linear_probe_r2": 0.3,
    "zero_vectors": 0,
    "duplicate_vectors": 3,
    "rows": 1000,
}


def test_a_sound_table_needs_no_advice():
    assert advise(WELL) == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"anti_hub_rate": 0.5}, "37% of the training rows are never targets .* try --balance"),
        (
            {"recall_at_1": 0.9},
            "finds 0.900 of the nearest pairs, less than --target-recall 0.95: give more --max-memory-gb",
        ),
        ({"perplexity": 1.03}, r"chooses among 1\.03 rows.*a smaller --desc-scale"),
        ({"text_distance": 0.9}, "hardly followed: try a larger --desc-scale"),
        ({"linear_probe_r2": 0.001}, "lottery to a network: try --center"),
        ({"zero_vectors": 4}, "4 vectors are zero"),
        ({"duplicate_vectors": 400}, "400 vectors repeat others.*--dedup pair"),
    ],
)
def test_what_looks_wrong_is_said_with_what_to_try(change, said):
    (warning,) = advise(WELL | change)
    assert re.search(said, warning)


@pytest.fixture
def copied(tmp_path):
    """A function that gives a copy of a table, to be changed."""

    def copy(table):
        shutil.copytree(table.uri, tmp_path / "copy.lance")
        return open_table(tmp_path / "copy.lance")

    return copy


def test_the_page_is_whole_and_needs_nothing_else(indexed, copied):
    built = build_index(copied(indexed), BuildConfig(index_type="ivf_rq"))
    page = index_page(built.table, built.report)
    assert page.count("<svg") == 3
    assert page.count("<figure>") == page.count("<img") == 24
    assert not re.search(r"(src|href)=.?(http|/|file)", page.replace('src="data:', ""))
    assert all(f"<th>{name}</th>" in page for name in ("recall_at_1", "anti_hub_rate", "index_bytes"))


def test_a_table_searched_exactly_has_no_probes_to_plot(encoded, copied):
    report = build_index(copied(encoded), BuildConfig(index_type="none")).report
    assert sum(report["hits"]) == report["train_rows"]
    assert index_page(encoded, report).count("<svg") == 2


def test_examples_come_nearest_first_with_the_pictures_kept(encoded):
    for found in find_examples(encoded):
        assert found.distances == sorted(found.distances)
        assert len(found.captions) == len(found.pictures) == 4
        assert all(picture.startswith(b"\x89PNG") for picture in found.pictures)


def test_captions_are_text_and_not_markup(indexed):
    from dataclasses import replace

    from pipeline import index_page as page

    found = replace(find_examples(indexed)[0], asked="<b>bold</b>", captions=["<script>"] * 4)
    assert "<b>" not in page._shown(found)
    assert "<script>" not in page._shown(found)


def test_without_its_encoder_a_page_has_captions_alone(indexed, monkeypatch):
    from index.errors import EncoderError
    from pipeline import encoders

    def missing(name):
        raise EncoderError("gone")

    monkeypatch.setattr(encoders, "DiffusersAutoencoder", missing)
    assert all(found.pictures is None for found in find_examples(indexed))
