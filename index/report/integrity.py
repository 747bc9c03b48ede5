"""Search vectors that no index can serve well: not finite, zero, or equal to another one; and equal captions."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float16

from index.table.schema import TRAIN
from index.table.table import Table, column_array

BATCH_ROWS = 4096


@dataclass(frozen=True, kw_only=True)
class VectorIntegrity:
    """Counts of unusable training vectors, and of distinct captions."""

    nonfinite_vectors: int
    """Vectors with a NaN or an infinity."""
    zero_vectors: int
    duplicate_vectors: int
    """Vectors equal to an earlier one."""
    distinct_texts: int
    """Distinct text embeddings: as many as training rows if every caption is unique."""


def check_vectors(table: Table) -> VectorIntegrity:
    """Count the unusable training vectors of a table in one pass over them."""
    text_dim, nonfinite, zero = table.meta.geometry.text_width, 0, 0
    hashes, text_hashes = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    for batch in table.scan(["vector"], TRAIN, batch_size=BATCH_ROWS):
        vectors = column_array(batch["vector"])
        nonfinite += int((~np.isfinite(vectors).all(1)).sum())
        zero += int((vectors == 0).all(1).sum())
        hashes.append(_hashes(vectors))
        text_hashes.append(_hashes(vectors[:, :text_dim]))
    hashed = np.concatenate(hashes)
    return VectorIntegrity(
        nonfinite_vectors=nonfinite,
        zero_vectors=zero,
        duplicate_vectors=len(hashed) - len(np.unique(hashed)),
        distinct_texts=len(np.unique(np.concatenate(text_hashes))),
    )


def explain_nonfinite(table: Table) -> str:
    """Say which part of the search vectors is not finite, and what to do about it.

    What is stored as float16 may overflow: the latents and text embeddings of an encoder, or their scaled parts of the
    vector.
    """
    geometry, counts = table.meta.geometry, dict.fromkeys(("latent", "text", "text part", "image part"), 0)
    end = geometry.text_width + geometry.image_width
    for batch in table.scan(["text", "latent", "vector"], TRAIN, batch_size=BATCH_ROWS):
        text, latent, vectors = (column_array(batch[name]) for name in ("text", "latent", "vector"))
        parts = (latent, text, vectors[:, : geometry.text_width], vectors[:, geometry.text_width : end])
        for name, part in zip(counts, parts, strict=True):
            counts[name] += int((~np.isfinite(part).all(1)).sum())
    if counts["latent"] or counts["text"]:
        name, encoder = ("latents", "image") if counts["latent"] else ("text embeddings", "text")
        count = counts["latent"] or counts["text"]
        return (
            f"{count} {name} are not finite, as the {encoder} encoder gave them: encode the table again with "
            "--dtype float32, or delete these rows"
        )
    if counts["text part"]:
        longest = float(np.finfo(np.float16).max) / geometry.kappa
        small = "" if longest > 1 else " with --allow-small-desc-scale"
        return (
            f"the text part overflows float16 at --desc-scale {geometry.desc_scale:g}, because the captions are almost "
            f"equal (kappa {geometry.kappa:g}): use --desc-scale {longest:.2g} or less{small}"
        )
    if counts["image part"]:
        return (
            f"the image part overflows float16 in --geometry {geometry.name}, because some latent dimensions hardly "
            f"vary (smallest standard deviation {geometry.std.min():.2g}, median {np.median(geometry.std):.2g}): "
            "use --geometry sphere, which bounds it"
        )
    return "the balance coordinate overflows float16: use --no-balance, then --balance again"


def _hashes(rows: Float16[np.ndarray, "N D"]) -> np.ndarray:
    """Return a 64-bit hash of each row."""
    # Adding zero turns -0 into +0, so that equal rows have equal bytes.
    data = np.ascontiguousarray(rows + np.float16(0))
    keys = data.view(np.dtype((np.void, data.itemsize * data.shape[1])))[:, 0].tolist()
    return np.fromiter(map(hash, keys), np.int64, len(keys))
