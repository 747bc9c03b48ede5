"""Runs side by side: the same exam as one run alone, seeds as one line, and a page of its own."""

import json
import shutil
from dataclasses import replace

import pytest

from index.errors import RunError
from trainer.config import FitConfig
from trainer.evaluation.compare import compare, name_runs, summarize
from trainer.evaluation.comparison_page import said
from trainer.evaluation.evaluate import evaluate
from trainer.evaluation.exam import ExamConfig
from trainer.fit import fit

SHORT = FitConfig(size="tiny", images=60 * 32, batch_size=32)
ASKED = ExamConfig(steps=[1, 4], samples=60)
TIMES = ("ms_per_latent", "ms_per_decoding")


@pytest.fixture(scope="module")
def runs(colored, tmp_path_factory):
    """Two seeds of the coalescer, and a rival."""
    folder = tmp_path_factory.mktemp("runs")
    for name, config in {
        "one": SHORT,
        "two": replace(SHORT, seed=1),
        "flow": replace(SHORT, objective="flow_matching", coupling="independent"),
    }.items():
        fit(colored, config, folder / name)
    return [folder / name for name in ("one", "two", "flow")]


@pytest.fixture(scope="module")
def compared(runs, tmp_path_factory):
    out = tmp_path_factory.mktemp("compared")
    return compare(runs, ASKED, out, captions=["red", "green"]), out


def timeless(figures):
    return {name: value for name, value in figures.items() if name not in TIMES}


def test_every_run_gets_the_figures_that_it_has_alone(compared, runs, tmp_path):
    report, _ = compared
    alone = evaluate(runs[1], ASKED, tmp_path)
    assert report["floors"] == alone["floors"]
    for n in ("1", "4"):
        assert timeless(report["runs"][1]["steps"][n]) == timeless(alone["steps"][n])


def test_runs_that_differ_by_their_seed_are_one_line(compared):
    report, out = compared
    assert report == json.loads((out / "report.json").read_text())
    assert list(report["lines"]) == ["coalescer, coupling=nearest", "flow_matching, coupling=independent"]
    both, rival = report["lines"].values()
    assert (both["runs"], rival["runs"]) == (2, 1)
    one, two = (run["steps"]["4"]["frechet"] for run in report["runs"][:2])
    assert one != two
    assert both["steps"]["4"]["frechet"] == pytest.approx([(one + two) / 2, abs(one - two) / 2**0.5])
    assert rival["steps"]["1"]["frechet"] == [report["runs"][2]["steps"]["1"]["frechet"], 0.0]
    assert both["training"]["images"] == [1920.0, 0.0]


def test_the_page_stands_alone_and_shows_the_captions_asked_for(compared):
    report, out = compared
    page = (out / "index.html").read_text()
    assert page.count("data:image/png;base64,") == 2
    assert 'src="http' not in page
    assert page.count("<svg") >= 10
    assert "flow_matching" in page
    assert report["shown_steps"] == 1
    assert said(0.123456, 0.0) == "0.1235"
    assert said(618146.0, 0.0) == "618,146"
    assert said(0.123456, 0.0123) == "0.1235 &plusmn; 0.012"


def test_runs_are_named_by_what_they_do_not_share():
    def config(**fitted):
        return {
            "fit": {"objective": "coalescer", "preset": "default", "seed": 0, "size": "tiny", "hyperparameters": {}}
            | fitted
        }

    assert name_runs([config(), config(seed=1)]) == ["coalescer", "coalescer"]
    named = name_runs([config(), config(size="small"), config(preset="paper", hyperparameters={"p": 1.0})])
    assert named == ["coalescer, size=tiny", "coalescer, size=small", "coalescer paper, size=tiny, p=1.0"]
    assert name_runs([config(images=64), config(images=32, size="small")]) == [
        "coalescer, size=tiny",
        "coalescer, size=small",
    ]
    assert name_runs([config(images=64), config(images=32)]) == ["coalescer, images=64", "coalescer, images=32"]
    both = name_runs([config(images=64, reuse=1), config(images=32, reuse=5)])
    assert both == ["coalescer, reuse=1", "coalescer, reuse=5"]


def test_spread_is_the_standard_deviation_of_runs():
    runs = [{"steps": {"2": {"frechet": value}}, "training": {"seconds": 2 * value}} for value in (1.0, 2.0, 6.0)]
    line = summarize(runs)
    assert line["steps"]["2"]["frechet"] == pytest.approx([3.0, 7**0.5])
    assert line["training"]["seconds"] == pytest.approx([6.0, 2 * 7**0.5])


def test_runs_of_other_tables_and_unfinished_ones_are_refused(runs, indexed, tmp_path):
    fit(indexed, replace(SHORT, images=32), tmp_path / "other")
    with pytest.raises(RunError, match=r"other was trained on version .* compare runs of one table and version"):
        compare([runs[0], tmp_path / "other"], ASKED, tmp_path / "out")
    shutil.copytree(runs[0], tmp_path / "half")
    (tmp_path / "half" / "result.json").unlink()
    with pytest.raises(RunError, match=r"half is not trained to its end: go on with .*--resume"):
        compare([runs[0], tmp_path / "half"], ASKED, tmp_path / "out")
    assert not (tmp_path / "out").exists()
