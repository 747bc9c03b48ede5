"""The index report in words and as a page, and the HTML that all pages are made of."""

import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest

from index.build.build_index import BuildConfig, build_index
from index.report import html
from index.report.page import Example, index_page, measured_on, retrieve_examples
from index.report.report import find_warnings
from index.table.table import open_table
from pipeline.encoders.stored import open_decoder

PNG = b"\x89PNG\r\n\x1a\n"
SOUND = {
    "anti_hub_rate": 0.14,
    "expected_anti_hub_rate": 0.13,
    "chi_square": 0.02,
    "recall_at_1": 0.96,
    "recall_queries": 1024,
    "target_recall": 0.95,
    "perplexity": 90.0,
    "text_distance": 0.1,
    "linear_probe_r2": 0.3,
    "zero_vectors": 0,
    "duplicate_vectors": 3,
    "rows": 1000,
    "train_rows": 900,
    "distinct_texts": 10,
    "target_perplexity": None,
}


@pytest.fixture(scope="module")
def built(indexed, tmp_path_factory):
    """A table with an index, without images, and its report."""
    uri = tmp_path_factory.mktemp("page") / "shapes.lance"
    shutil.copytree(indexed.uri, uri)
    return build_index(open_table(uri), BuildConfig(index_type="ivf_rq"))


def decode(latents):
    """Gray images as bright as the latents' mean."""
    level = (128 + 8 * latents.mean((1, 2, 3))).clip(0, 255).astype(np.uint8)
    return np.broadcast_to(level[:, None, None, None], (len(latents), 4, 4, 3)).copy()


class Tags(HTMLParser):
    """Count tags, collect their attributes, and check that they are nested."""

    VOID = ("meta", "img", "br")

    def __init__(self, page):
        super().__init__()
        self.count, self.open, self.attributes, self.text = {}, [], [], []
        self.feed(page)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.count[tag] = self.count.get(tag, 0) + 1
        self.attributes += attrs
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.count[tag] = self.count.get(tag, 0) + 1
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_a_sound_table_has_no_warnings(built):
    assert find_warnings(replace(built.report, **SOUND)) == []
    # Within two standard errors of the target, on 1,024 queries.
    assert find_warnings(replace(built.report, **SOUND | {"recall_at_1": 0.94})) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"anti_hub_rate": 0.5}, "anti-hub rate is 50%, 37% above uniform sampling .* try --balance"),
        (
            {"recall_at_1": 0.9},
            r"recall@1 is 0\.900 on 1,024 queries, more than two standard errors \(0\.007\) below --target-recall 0\.95"
            ": raise --max-memory-gb",
        ),
        ({"perplexity": 1.03}, r"perplexity is 1\.03 targets per caption.*try a smaller --desc-scale"),
        # A smaller desc_scale makes it worse where captions are unique (docs/results.md).
        ({"perplexity": 1.03, "distinct_texts": 890}, r"1\.03 targets per caption.*890 captions.*keep desc_scale"),
        (
            {"perplexity": 2.1, "target_perplexity": 100.0, "desc_scale": 1.01, "train_rows": 3313},
            r"auto reached a perplexity of 2\.1 at desc_scale 1\.01, 100 was asked: a smaller desc_scale would",
        ),
        (
            {"perplexity": 31.0, "target_perplexity": 100.0},
            "31 at desc_scale 4, 100 was asked: .*tenth of the 900 train",
        ),
        ({"text_distance": 0.9}, "0.90 apart.*try a larger --desc-scale"),
        ({"linear_probe_r2": 0.001}, r"R\^2 = 0\.001 of the targets.*try --center"),
        ({"zero_vectors": 4}, "4 search vectors are zero"),
        ({"duplicate_vectors": 400}, "400 search vectors are duplicates.*--dedup pair"),
    ],
)
def test_a_bad_metric_is_warned_of_with_what_to_try(built, change, message):
    (warning,) = find_warnings(replace(built.report, **SOUND | change))
    assert re.search(message, warning)


def test_the_page_is_complete_and_refers_to_nothing_else(built):
    page = index_page(built.table, replace(built.report, warnings=["<mind> this"]), decode=decode)
    tags = Tags(page)
    assert tags.count["svg"] == 3
    assert tags.count["figure"] == tags.count["img"] == 6 * 4
    links = [value for name, value in tags.attributes if name in ("src", "href", "xlink:href")]
    assert links
    assert all(value.startswith(("data:image/png;base64,", "#")) for value in links)
    assert {"recall_at_1", "anti_hub_rate", "index_bytes", "perplexity", "<mind> this"} <= set(tags.text)
    assert measured_on(built.report) in tags.text
    assert f"{built.report.recall_at_1:.4g}" in tags.text


def test_a_table_searched_exactly_has_no_recall_plot(encoded, tmp_path):
    shutil.copytree(encoded.uri, tmp_path / "copy.lance")
    built = build_index(open_table(tmp_path / "copy.lance"), BuildConfig(index_type="none"))
    assert sum(built.report.hit_counts) == built.report.train_rows
    assert Tags(index_page(built.table, built.report)).count["svg"] == 2


def test_examples_come_nearest_first_with_the_originals(encoded):
    examples = retrieve_examples(encoded)
    assert examples
    for example in examples:
        assert example.distances == sorted(example.distances)
        assert len(example.captions) == len(example.images) == 4
        assert all(image.startswith(PNG) for image in example.images)


def test_without_originals_latents_are_decoded_if_there_is_a_decoder(built):
    examples, decoded = retrieve_examples(built.table), retrieve_examples(built.table, decode)
    assert [example.captions for example in examples] == [example.captions for example in decoded]
    assert {example.images for example in examples} == {None}
    assert all(image.startswith(PNG) for example in decoded for image in example.images)
    assert "img" not in Tags(index_page(built.table, built.report)).count


def test_a_decoder_is_opened_for_the_same_weights_only(built, changed_encoder):
    ref = built.table.meta.image_encoder
    latents = built.table.column("latent")[:2].reshape(-1, *built.table.meta.latent_shape).astype(np.float32)
    assert open_decoder(ref)(latents).shape == (2, 32, 32, 3)
    assert open_decoder(replace(ref, name="/no/such/folder")) is None
    assert open_decoder(replace(ref, name=changed_encoder)) is None


def test_captions_are_text_and_not_markup():
    example = Example(caption="<b>bold</b>", captions=["<script>", 'a "b"'], distances=[1.0, 2.0], images=[PNG, PNG])
    tags = Tags(example.to_html())
    assert not {"b", "script"} & tags.count.keys()
    assert {"<b>bold</b>", "<script>"} <= set(tags.text)
    assert [value for name, value in tags.attributes if name == "alt"] == ["<script>", 'a "b"']


def test_the_page_skeleton_escapes_its_title_and_keeps_its_body():
    page = html.page("a < b & c", "<p>body</p>", style="p{color:red}")
    assert page.count("a &lt; b &amp; c") == 2
    tags = Tags(page)
    assert (tags.count["h1"], tags.count["p"]) == (1, 1)
    assert any("p{color:red}" in text and "color-scheme" in text for text in tags.text)


def test_tables_escape_their_cells():
    tags = Tags(html.table([("<x>", 0.123456), ("n", None)], head=("name", "value")))
    assert (tags.count["tr"], tags.count["th"], tags.count["td"]) == (3, 4, 2)
    assert {"<x>", "0.1235", "None", "value"} <= set(tags.text)


@pytest.mark.parametrize(("data", "media_type"), [(PNG, "png"), (b"\xff\xd8\xff\xe0", "jpeg"), (b"other", "*")])
def test_images_are_data_uris(data, media_type):
    assert f'src="data:image/{media_type};base64,' in html.image_tag(data, alt='"')
    assert 'alt="&quot;"' in html.image_tag(data, alt='"')
