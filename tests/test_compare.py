"""Comparison of runs: the same protocol as for one run alone, groups of seeds, and a page."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from index.errors import RunError
from trainer.config import FitConfig
from trainer.evaluation import run_evaluation
from trainer.evaluation.compare import compare, label_runs, short_names, summarize
from trainer.evaluation.protocol import EvaluationConfig, evaluate
from trainer.evaluation.report import format_value, main_metrics, metric_title, reference_line
from trainer.fit import fit

pytestmark = pytest.mark.slow

SHORT = FitConfig(size="tiny", images=60 * 32, batch_size=32)
CONFIG = EvaluationConfig(num_inference_steps=[1, 4], num_samples=60)
TIMES = ("ms_per_latent", "ms_per_decoding")
COALESCER, FLOW = "coalescer, coupling=nearest", "flow_matching, coupling=independent"


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
    """The report of their comparison, and its folder."""
    out = tmp_path_factory.mktemp("compared")
    return compare(runs, CONFIG, out, captions=["red", "green"]), out


def without_times(metrics):
    return {name: value for name, value in metrics.items() if name not in TIMES}


def test_every_run_has_the_metrics_of_its_own_evaluation(compared, runs, tmp_path):
    report, _ = compared
    alone = evaluate(runs[1], CONFIG, tmp_path)
    assert report["references"] == alone["references"]
    for n in ("1", "4"):
        assert without_times(report["runs"][1]["metrics"][n]) == without_times(alone["metrics"][n])


def test_runs_that_differ_in_their_seed_are_one_group(compared):
    report, out = compared
    assert report == json.loads((out / "report.json").read_text())
    assert list(report["groups"]) == [COALESCER, FLOW]
    both, rival = report["groups"].values()
    assert (both["runs"], rival["runs"]) == (2, 1)
    one, two = (run["metrics"]["4"]["frechet"] for run in report["runs"][:2])
    assert one != two
    assert both["metrics"]["4"]["frechet"] == pytest.approx([(one + two) / 2, abs(one - two) / 2**0.5])
    assert rival["metrics"]["1"]["frechet"] == [report["runs"][2]["metrics"]["1"]["frechet"], 0.0]
    assert both["training"]["images"] == [1920.0, 0.0]
    means = main_metrics(report)["frechet"][COALESCER]
    assert means == {"1 step": both["metrics"]["1"]["frechet"][0], "4 steps": both["metrics"]["4"]["frechet"][0]}


def test_what_was_measured_is_kept_and_only_new_runs_are_sampled(compared, runs, tmp_path, monkeypatch):
    report, _ = compared
    copied, sampled, sample_prompts = tmp_path / "copied", [], run_evaluation.sample_prompts

    def count(*args):
        sampled.append(args[3])
        return sample_prompts(*args)

    monkeypatch.setattr(run_evaluation, "sample_prompts", count)
    two = replace(CONFIG, num_inference_steps=[1])
    compare(runs[:2], two, copied)
    assert sampled == [1, 1]
    more = compare([runs[2], *runs[:2]], two, copied)
    assert sampled == [1, 1, 1]
    assert [without_times(run["metrics"]["1"]) for run in more["runs"]] == [
        without_times(report["runs"][i]["metrics"]["1"]) for i in (2, 0, 1)
    ]
    assert more["references"] == report["references"]


def test_progress_names_the_run_and_the_terminal_says_what_is_better_next_to_references(compared):
    report, out = compared
    steps = {json.loads(line)["step"] for line in (out / "log.jsonl").read_text().splitlines()}
    assert steps >= {"one (1/3)", "two (2/3)", "flow (3/3)"}
    assert metric_title(report, "frechet") == "frechet (lower is better)"
    assert re.fullmatch(
        r"class_accuracy \(higher is better; standard error of a run up to 0\.0\d+\)",
        metric_title(report, "class_accuracy"),
    )
    line = reference_line(report, "class_accuracy")
    for name, row in (report["references"] | {"held-out rows": report["heldout"]}).items():
        assert f"{name} {row['class_accuracy']:.4g} ± {row['class_accuracy_error']:.2g}" in line
    assert all(f"{name} " in reference_line(report, "energy_score") for name in report["energy_score_references"])


def test_the_page_is_self_contained_and_shows_groups_references_and_captions(compared):
    report, out = compared
    page = (out / "index.html").read_text()
    assert not re.search(r'(src|href)="(?!data:|#)', page)
    assert len(re.findall("<img", page)) == 2  # samples of the prompts, and of the given captions
    for label in (COALESCER, FLOW, "train rows", "retrieved pairs", "noise", "train reconstructions", "held-out rows"):
        assert f"<th>{label}</th>" in page
    for name in ("frechet", "class accuracy", "recall"):
        assert f"<h3>{name}</h3>" in page
        assert f"<!-- {name} -->" in page  # the title of its plot
    assert report["shown_num_inference_steps"] == 1
    assert "1 step each" in page


def test_values_are_shown_with_four_digits_and_their_deviation():
    assert format_value(0.123456, 0.0) == "0.1235"
    assert format_value(618146.0, 0.0) == "618,146"
    assert format_value(0.123456, 0.0123) == "0.1235 &plusmn; 0.012"


def test_runs_are_labeled_by_the_settings_that_differ():
    def config(hyperparameters=None, **settings):
        shared = {"objective": "coalescer", "preset": "default", "seed": 0, "size": "tiny", "hyperparameters": {}}
        return {"fit": shared | settings, "objective": {"p": 2.0, "dropout": 0.1} | (hyperparameters or {})}

    assert label_runs([config(), config(seed=1)]) == ["coalescer", "coalescer"]
    typed = config()
    typed["fit"]["hyperparameters"] = {"p": 2.0}
    # A hyperparameter that was typed with its default makes no other run.
    assert label_runs([config(), typed]) == ["coalescer", "coalescer"]
    labels = label_runs([config(), config({"p": 1.0})])
    assert labels == ["coalescer, p=2.0", "coalescer, p=1.0"]
    labels = label_runs([config(), config(size="small"), config({"p": 1.0}, preset="paper")])
    assert labels == ["coalescer, size=tiny", "coalescer, size=small", "coalescer paper, size=tiny"]
    labels = label_runs([config(images=64), config({"power": 1}, images=32, objective="endpoint")])
    assert labels == ["coalescer, images=64", "endpoint, images=32"]


def test_names_of_runs_are_as_short_as_they_can_be():
    assert short_names([Path("runs/a"), Path("/x/b/")]) == ["a", "b"]
    assert short_names([Path("x/1/a"), Path("x/2/a")]) == ["1/a", "2/a"]
    assert short_names([Path("a"), Path("x/a")]) == ["a", "x/a"]
    assert short_names([Path("a"), Path("a")]) == ["a", "a"]


def test_a_metric_that_a_run_lacks_is_not_averaged():
    runs = [{"metrics": {"2": row}, "training": {}} for row in ({"rate": 0.0, "frechet": 1.0}, {"rate": 1.0})]
    assert summarize(runs)["metrics"] == {"2": {"rate": [0.5, pytest.approx(0.5**0.5)]}}


def test_groups_have_the_standard_deviation_of_their_runs():
    runs = [{"metrics": {"2": {"frechet": value}}, "training": {"seconds": 2 * value}} for value in (1.0, 2.0, 6.0)]
    group = summarize(runs)
    assert group["metrics"]["2"]["frechet"] == pytest.approx([3.0, 7**0.5])
    assert group["training"]["seconds"] == pytest.approx([6.0, 2 * 7**0.5])


def test_runs_of_other_tables_and_unfinished_ones_are_refused(runs, indexed, tmp_path):
    fit(indexed, replace(SHORT, images=32), tmp_path / "other")
    with pytest.raises(RunError, match=r"other was trained on version .* compare runs of one table and version"):
        compare([runs[0], tmp_path / "other"], CONFIG, tmp_path / "out")
    shutil.copytree(runs[0], tmp_path / "half")
    (tmp_path / "half" / "result.json").unlink()
    with pytest.raises(RunError, match=r"half has not finished training: resume it with .*--resume"):
        compare([runs[0], tmp_path / "half"], CONFIG, tmp_path / "out")
    with pytest.raises(RunError, match="there is no run to compare"):
        compare([], CONFIG, tmp_path / "out")
    assert not (tmp_path / "out").exists()
