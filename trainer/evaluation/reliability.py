"""Whether a confidence can be believed: what was said, against what came of it.

Of a coalescer: what it said before its first step, by its confidence head and by |direction|, against the cosine
between its direction and the way to the pair that an exact search finds.
"""

from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float32
from torch.nn.functional import cosine_similarity

from trainer.evaluation.answers import BATCH, Questions, Told
from trainer.objectives.coalescer import Coalescer
from trainer.sampler import CoalescerPipeline

BINS = 10


def measure_confidence(
    coalescer: CoalescerPipeline, questions: Questions, told: Told, pairs: Float32[np.ndarray, "Q L"]
) -> dict[str, Any]:
    """The reliability of each confidence that the run's objective teaches; none of another objective."""
    objective = coalescer.objective
    if not isinstance(objective, Coalescer):
        return {}
    came: list[Float32[np.ndarray, B]] = []
    said: dict[str, list[Float32[np.ndarray, B]]] = {"confidence": [], "direction_length": []}
    with torch.inference_mode():
        for start in range(0, questions.count, BATCH):
            batch = slice(start, min(start + BATCH, questions.count))
            given = (questions.r[batch], pairs[batch], told(questions.captions[batch]))
            r, y, text = (torch.from_numpy(part).to(coalescer.device) for part in given)
            guess = objective.predict(coalescer.network, r, text)
            came.append(cosine_similarity(guess.direction, y - r).cpu().numpy())
            said["confidence"].append(guess.confidence.cpu().numpy())
            said["direction_length"].append(guess.direction.norm(dim=1).cpu().numpy())
    if not objective.confidence_weight:
        del said["confidence"]
    return {name: reliability(np.concatenate(parts), np.concatenate(came)) for name, parts in said.items()}


def reliability(said: Float[np.ndarray, "N"], came: Float[np.ndarray, "N"], *, bins: int = BINS) -> dict[str, Any]:
    """Both in bins of equally many, the least sure first; how far apart they are; whether they rank alike.

    `calibration_error` is the mean over all samples of |what their bin said - what came of it|, the expected
    calibration error. `rank_correlation` is Spearman's.
    """
    order = np.argsort(said, kind="stable")
    parts = [part for part in np.array_split(order, bins) if len(part)]
    each = [{"said": float(said[p].mean()), "came": float(came[p].mean()), "count": len(p)} for p in parts]
    error = sum(abs(bin["said"] - bin["came"]) * bin["count"] for bin in each) / len(said)
    return {"calibration_error": error, "rank_correlation": rank_correlation(said, came), "bins": each}


def rank_correlation(a: Float[np.ndarray, "N"], b: Float[np.ndarray, "N"]) -> float:
    """Spearman's: the correlation of ranks, equal values sharing one; 0 where all of either are equal."""
    ranks = [_ranks(values) - (len(a) - 1) / 2 for values in (a, b)]
    scale = np.sqrt(np.square(ranks[0]).sum() * np.square(ranks[1]).sum())
    return float((ranks[0] * ranks[1]).sum() / scale) if scale > 0 else 0.0


def _ranks(values: Float[np.ndarray, "N"]) -> Float[np.ndarray, "N"]:
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(count) - 1
    return np.asarray((last - (count - 1) / 2)[place])
