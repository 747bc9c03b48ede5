"""What is said of a table beside the measurements: its settings, its bad vectors, its last report."""

from typing import Any

import numpy as np

from index.table.codec import to_json_dict
from index.table.schema import TRAIN
from index.table.table import Table, column_array


def count_bad_vectors(table: Table) -> dict[str, int]:
    """How many training vectors are not finite, zero, or equal to an earlier one, from one pass over them."""
    weights = np.random.default_rng(0).integers(2**64, size=table.meta.geometry.vector_dim, dtype=np.uint64)
    hashes, bad, zero = [np.empty(0, np.uint64)], 0, 0
    for batch in table.scan(["vector"], TRAIN):
        vectors = column_array(batch["vector"])
        bad += int((~np.isfinite(vectors).all(1)).sum())
        zero += int((vectors == 0).all(1).sum())
        # Adding zero makes minus zero plus zero: equal vectors have equal bits.
        hashes.append((vectors + np.float16(0)).view(np.uint16).astype(np.uint64) @ weights)
    each = np.concatenate(hashes)
    return {"nan_vectors": bad, "zero_vectors": zero, "duplicate_vectors": len(each) - len(np.unique(each))}


def settings_of(table: Table) -> dict[str, Any]:
    """What the figures of a report were measured at."""
    geometry, index = table.meta.geometry, table.meta.index
    assert index is not None
    return {
        "table": table.uri,
        "version": table.version,
        "geometry": geometry.name,
        "center": geometry.centering is not None,
        "variance_told_by_descriptions": geometry.centering and geometry.centering.explained_variance,
        "desc_scale": geometry.desc_scale,
        "kappa": geometry.kappa,
        "dims": geometry.vector_dim,
        **{f"index_{n.removeprefix('index_')}": v for n, v in to_json_dict(index).items() if n != "recall_at_1"},
    }


def describe(table: Table) -> dict[str, Any]:
    """What a table holds, with the figures of its last index report where there is one."""
    meta = table.meta
    return {
        "table": table.uri,
        "version": table.version,
        "rows": table.dataset().count_rows(),
        "train_rows": table.dataset().count_rows(filter=f"split = '{TRAIN}'"),
        "image_encoder": f"{meta.image_encoder.class_name} {meta.image_encoder.name}",
        "text_encoder": f"{meta.text_encoder.class_name} {meta.text_encoder.name}",
        "image_size": meta.image_size,
        "latent_shape": list(meta.latent_shape),
        "text_dim": meta.text_dim,
        "geometry": meta.geometry.name,
        "desc_scale": meta.geometry.desc_scale,
        "indexed": meta.index is not None,
        **((table.report("index") or {}) if meta.index is not None else {}),
    }
