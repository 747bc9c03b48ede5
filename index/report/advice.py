"""Warnings in words: what of a report says that a table is unlikely to train well, and what to try.

Thresholds are where the notes' measurements turn: half of the rows that chance would reach are never targets, fewer
than two targets to a description, a line that explains nothing of them.
"""

from typing import Any


def advise(report: dict[str, Any]) -> list[str]:
    """One sentence for each thing that looks wrong in a report of `build_index`; none where all is well."""
    told = []
    missed = report["anti_hub_rate"] - report["expected_anti_hub_rate"]
    if missed > 0.25:
        told.append(
            f"{missed:.0%} of the training rows are never targets beyond what chance leaves out, chi^2 of shares is "
            f"{report['chi_square']:.2f}: try --balance, and --geometry sphere if it is not"
        )
    if report["recall_at_1"] < report["target_recall"]:
        told.append(
            f"search finds {report['recall_at_1']:.3f} of the nearest pairs, less than --target-recall "
            f"{report['target_recall']:g}: give more --max-memory-gb, which allows a finer index"
        )
    if report["perplexity"] < 2:
        told.append(
            f"a description chooses among {report['perplexity']:.2f} rows, so the random point does not matter and a "
            "caption gives one picture: try a smaller --desc-scale, or --desc-scale auto"
        )
    if report["text_distance"] > 0.7:
        told.append(
            f"unit descriptions of targets lie {report['text_distance']:.2f} from the ones asked for, so "
            "captions are hardly followed: try a larger --desc-scale"
        )
    if report["linear_probe_r2"] < 0.02:
        told.append(
            f"a linear fit from (R, description) explains {report['linear_probe_r2']:.3f} of the targets, which then look "
            "like a lottery to a network: try --center, a larger --desc-scale, or fewer latent numbers"
        )
    if report["zero_vectors"]:
        told.append(f"{report['zero_vectors']:,} vectors are zero and will be found by chance: encode the table again")
    if report["duplicate_vectors"] > 0.1 * report["rows"]:
        told.append(
            f"{report['duplicate_vectors']:,} vectors repeat others, of each group one row is found: "
            "encode with --dedup pair"
        )
    return told
