"""Calibration of a run's confidence: predicted confidence against the observed cosine similarity.

For a coalescer: the confidence head and |direction| at the first step, against the cosine between its direction and the
displacement to the pair that an exact search retrieves.
"""

from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float32
from torch.nn.functional import cosine_similarity

from trainer.evaluation.samples import BATCH, Prompts, TextEmbeddings
from trainer.objectives.coalescer import Coalescer as CoalescerObjective
from trainer.sampler import CoalescerPipeline

BINS = 10


def measure_calibration(
    pipeline: CoalescerPipeline, prompts: Prompts, text: TextEmbeddings, pairs: Float32[np.ndarray, "Q L"]
) -> dict[str, Any]:
    """Return the calibration of each confidence that the run's objective trains; empty for other objectives."""
    objective = pipeline.objective
    if not isinstance(objective, CoalescerObjective):
        return {}
    observed: list[Float32[np.ndarray, B]] = []
    predicted: dict[str, list[Float32[np.ndarray, B]]] = {"confidence": [], "direction_length": []}
    with torch.inference_mode():
        for start in range(0, prompts.count, BATCH):
            batch = slice(start, min(start + BATCH, prompts.count))
            arrays = (prompts.noise[batch], pairs[batch], text.batch(batch))
            r, y, embeddings = (torch.from_numpy(array).to(pipeline.device) for array in arrays)
            prediction = objective.predict(pipeline.network, r, embeddings)
            observed.append(cosine_similarity(prediction.direction, y - r).cpu().numpy())
            predicted["confidence"].append(prediction.confidence.cpu().numpy())
            predicted["direction_length"].append(prediction.direction.norm(dim=1).cpu().numpy())
    if not objective.confidence_weight:
        del predicted["confidence"]
    cosine = np.concatenate(observed)
    joined = {name: np.concatenate(parts) for name, parts in predicted.items()}
    finite = {name: np.isfinite(cosine) & np.isfinite(each) for name, each in joined.items()}
    return {
        name: calibrate(each[finite[name]], cosine[finite[name]]) for name, each in joined.items() if finite[name].any()
    }


def calibrate(
    predicted: Float[np.ndarray, "N"], observed: Float[np.ndarray, "N"], *, bins: int = BINS
) -> dict[str, Any]:
    """Return the means of both in equal-count bins of increasing prediction, their error, and their rank correlation.

    `calibration_error` is the expected calibration error, the mean over samples of |predicted - observed| of their bins
    (arXiv 1706.04599, there with bins of equal width). `rank_correlation` is Spearman's; 0 if either is constant.
    """
    from torchmetrics.functional import spearman_corrcoef

    parts = [part for part in np.array_split(np.argsort(predicted, kind="stable"), bins) if len(part)]
    table = [
        {"predicted": float(predicted[part].mean()), "observed": float(observed[part].mean()), "count": len(part)}
        for part in parts
    ]
    error = sum(abs(row["predicted"] - row["observed"]) * row["count"] for row in table) / len(predicted)
    rank = spearman_corrcoef(torch.from_numpy(predicted), torch.from_numpy(observed))
    return {"calibration_error": error, "rank_correlation": float(rank), "bins": table}
