"""What is filtered, and why; a filter is no judge of what is broken."""

import pytest

from index.errors import OptionError
from pipeline.filters import Filtered, FilterReason, Filters


def reason(check, *arguments) -> FilterReason | None:
    try:
        check(*arguments)
    except Filtered as filtered:
        return filtered.reason
    return None


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((64, 64), None),
        ((63, 200), FilterReason.SMALL_SIDE),
        ((200, 63), FilterReason.SMALL_SIDE),
        ((64, 128), None),
        ((129, 64), FilterReason.WIDE_ASPECT),
        ((64, 129), FilterReason.WIDE_ASPECT),
    ],
)
def test_sizes(size, expected):
    assert reason(Filters(min_image_size=64, max_aspect_ratio=2.0).check_size, *size) is expected
    assert reason(Filters().check_size, *size) is None


def test_captions_are_counted_in_characters():
    filters = Filters(min_caption_length=3, max_caption_length=5)
    found = [reason(filters.check_caption, text) for text in ("né", "née", "trois", "quatre")]
    assert found == [FilterReason.SHORT_CAPTION, None, None, FilterReason.LONG_CAPTION]


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ("aesthetic > 5 and pwatermark < 0.8", None),
        ("aesthetic > 7", FilterReason.METADATA),
        ("lang == 'en'", None),
        ("lang in ['de', 'en'] and 'red' in caption", None),
        ("len(caption) > 3 and exif.camera == 'old'", None),
        ("not nsfw", FilterReason.METADATA_MISSING),
        ("score > 1", FilterReason.METADATA_MISSING),
        ("exif.lens == 'x'", FilterReason.METADATA_MISSING),
    ],
)
def test_expressions_over_the_sidecar(where, expected):
    fields = {"aesthetic": 6.1, "pwatermark": 0.2, "lang": "en", "score": None, "exif": {"camera": "old"}}
    assert reason(Filters(filter=where).check_meta, fields, "a red circle") is expected


@pytest.mark.parametrize("where", ["aesthetic >", "lang = 'en'", ""])
def test_what_is_no_expression_is_refused_at_once(where):
    with pytest.raises(OptionError, match="write for instance"):
        Filters(filter=where)


@pytest.mark.parametrize("where", ["__import__('os').system('true')", "open('x')", "'a' * 10 ** 9"])
def test_an_expression_reaches_nothing_but_the_fields(where):
    with pytest.raises(OptionError, match="cannot be used"):
        Filters(filter=where).check_meta({}, "x")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"min_image_size": 0}, "--min-image-size 0"),
        ({"max_aspect_ratio": 0.5}, "--max-aspect-ratio 0.5"),
        ({"max_caption_length": -1}, "--max-caption-length -1"),
        ({"dedup": "url"}, "--dedup 'url'.*image, pair"),
    ],
)
def test_options_are_checked(options, said):
    with pytest.raises(OptionError, match=said):
        Filters(**options)
