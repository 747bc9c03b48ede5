"""Which samples each filter drops, by which reason, and which options are refused."""

import pytest

from index.errors import OptionError
from pipeline.filters import Filtered, FilterReason, Filters


def reason_of(check, *arguments) -> FilterReason | None:
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
def test_image_sizes(size, expected):
    assert reason_of(Filters(min_image_size=64, max_aspect_ratio=2.0).check_size, *size) is expected
    assert reason_of(Filters().check_size, *size) is None


def test_caption_lengths_are_counted_in_characters():
    filters = Filters(min_caption_length=3, max_caption_length=5)
    reasons = [reason_of(filters.check_caption, text) for text in ("né", "née", "trois", "quatre")]
    assert reasons == [FilterReason.SHORT_CAPTION, None, None, FilterReason.LONG_CAPTION]


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("aesthetic > 5 and pwatermark < 0.8", None),
        ("aesthetic > 7", FilterReason.METADATA),
        ("lang == 'en'", None),
        ("lang in ['de', 'en'] and 'red' in caption", None),
        ("len(caption) > 3 and exif.camera == 'old'", None),
        ("not nsfw", FilterReason.METADATA_MISSING),
        ("score > 1", FilterReason.METADATA_MISSING),
        ("exif.lens == 'x'", FilterReason.METADATA_MISSING),
        ("tags[0] == 'cat'", FilterReason.METADATA_MISSING),
        ("aesthetic % 0 == 1", FilterReason.METADATA_MISSING),
        ("1 << count > 5", FilterReason.METADATA_MISSING),
        ("'%d' % lang == '5'", FilterReason.METADATA_MISSING),
        ("long == 'x'", FilterReason.METADATA),
        ("lang * huge == 'x'", FilterReason.METADATA_MISSING),
        ("exif.camera.nothing() == 1", FilterReason.METADATA_MISSING),
        ("caption.startswith('a')", None),
    ],
)
def test_expressions_over_the_fields_of_the_sidecar(expression, expected):
    fields = {"aesthetic": 6.1, "pwatermark": 0.2, "lang": "en", "score": None, "exif": {"camera": "old"}}
    fields |= {"tags": [], "count": -1, "long": "x" * 200_000, "huge": 10**9}
    assert reason_of(Filters(filter=expression).check_meta, fields, "a red circle") is expected


@pytest.mark.parametrize("expression", ["aesthetic >", "lang = 'en'", ""])
def test_an_invalid_expression_is_refused_before_any_sample(expression):
    with pytest.raises(OptionError, match=r"is not a Python expression .*: use for instance"):
        Filters(filter=expression)


@pytest.mark.parametrize(
    "expression",
    [
        *("__import__('os').system('true')", "open('x')", "'a' * 10 ** 9", "score > 1 / 0", "lambda: 1", "(x := 1)"),
        *(
            "caption.__class__",
            "caption.format(1)",
            "score @ 2",
            "max(1, 2) > score",
            "[*tags]",
            "tags[0](1)",
            "await x",
        ),
    ],
)
def test_an_expression_that_no_sample_can_fit_is_refused_before_any_sample(expression):
    with pytest.raises(OptionError, match=r"cannot be evaluated: .*: use the sidecar's fields"):
        Filters(filter=expression)


def test_an_expression_is_parsed_once(monkeypatch):
    import ast

    filters = Filters(filter="aesthetic > 4.125")
    monkeypatch.setattr(ast, "parse", lambda *arguments, **options: pytest.fail("parsed again"))
    assert reason_of(filters.check_meta, {"aesthetic": 5}, "") is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_pixels": 0}, "--max-pixels 0 is out of range: use 1 or more"),
        ({"min_image_size": 0}, "--min-image-size 0 is out of range: use 1 or more"),
        ({"max_aspect_ratio": 0.5}, "--max-aspect-ratio 0.5 is out of range: .* 1 or more"),
        ({"max_caption_length": -1}, "--max-caption-length -1 is out of range"),
        ({"dedup": "url"}, "--dedup 'url' is unknown: choose one of image, pair"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(OptionError, match=message):
        Filters(**options)
