"""Metadata of tables that earlier versions of the software wrote, brought to the present schema version.

Each step of `MIGRATIONS` takes a JSON object of one version to the next. Rows and vectors stay as they are, so a table
need not be encoded again; the new metadata is stored the next time that a command writes any.
"""

from collections.abc import Callable
from typing import Any

from index.errors import TableError

Json = dict[str, Any]


def migrate(content: Json) -> Json:
    """Return metadata in the present schema version.

    Raises TableError if a newer version of the software wrote it.
    """
    version = content.get("schema_version")
    if not isinstance(version, int) or version < 1:
        raise TableError(f"the table's metadata has schema_version {version!r}: it was not written by coalescer")
    if version > SCHEMA_VERSION:
        raise TableError(
            f"the table was written by a newer version of coalescer (schema {version}, this one reads up to "
            f"{SCHEMA_VERSION}): pip install --upgrade coalescer"
        )
    for step in range(version, SCHEMA_VERSION):
        content = MIGRATIONS[step](content) | {"schema_version": step + 1}
    return content


def _to_2(content: Json) -> Json:
    """Rename the fields of version 1 to the field's own words."""
    content = _renamed(content, heldout_share="val_fraction", text_width="text_dim")
    geometry = _renamed(content["geometry"], kind="name", text_width="text_dim", centring="centering")
    if geometry.get("centering"):
        geometry["centering"] = _renamed(geometry["centering"], explained="explained_variance")
    content |= {name: _renamed(content[name], kind="class_name") for name in ("image_encoder", "text_encoder")}
    text = content["text_encoder"]
    pooling = "pooled" if text["class_name"].startswith(("CLIP", "Siglip")) else "mean"
    content["text_encoder"] = {"pooling": pooling} | text
    content |= {"geometry": geometry, "crop": {"centre": "center"}.get(content["crop"], content["crop"])}
    if content.get("index"):
        index = _renamed(content["index"], kind="index_type", recall="recall_at_1", refine="refine_factor")
        content["index"] = index
    return content


def _renamed(content: Json, **names: str) -> Json:
    return {names.get(name, name): value for name, value in content.items()}


MIGRATIONS: dict[int, Callable[[Json], Json]] = {1: _to_2}
SCHEMA_VERSION = 1 + max(MIGRATIONS)
