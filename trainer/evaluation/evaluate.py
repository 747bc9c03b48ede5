"""How well a run answers held-out captions, beside its floors; nothing is downloaded.

The same run, options and seed give the same report but for times.
"""

import time
from pathlib import Path
from typing import Any

from index.table.storage import write_json, write_text
from trainer.evaluation.exam import ExamConfig, set_exam
from trainer.evaluation.report import evaluation_page, steps_said
from trainer.run_folder import read_config
from trainer.sampler import CoalescerPipeline


def evaluate(run: Path, config: ExamConfig, out: Path) -> dict[str, Any]:
    """Measure a run at several step counts; writes OUT/report.json and OUT/index.html, and returns the report."""
    objective = read_config(run)["fit"]["objective"]
    began = time.perf_counter()
    coalescer = CoalescerPipeline.from_pretrained(run, device=config.device)
    exam = set_exam(run, coalescer, config, out)
    result = exam.take(coalescer, config.steps, out / "log.jsonl")
    report: dict[str, Any] = {"run": str(run), "objective": objective, **exam.report()}
    report |= {"steps": result.figures, "reliability": result.reliability}
    if not result.reliability:
        report["left_out"]["reliability"] = f"{objective} teaches no confidence"
    report["seconds"] = round(time.perf_counter() - began, 1)
    write_json(out / "report.json", report)
    answers = {steps_said(n): each.x for n, each in result.found.items()}
    write_text(out / "index.html", evaluation_page(report, exam.sheet(answers)))
    return report
