"""What an Arrow column may be taken for: a picture, a caption, or neither."""

from typing import Any


def plain_names(schema: Any) -> list[str]:
    """The columns without bytes."""
    return [field.name for field in schema if not holds_bytes(field.type)]


def is_list(kind: Any) -> bool:
    """Lists of any layout."""
    import pyarrow as pa

    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def is_bytes(kind: Any) -> bool:
    """Bytes of any layout."""
    import pyarrow as pa

    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind))


def is_text(kind: Any) -> bool:
    """Text, a list of texts, or bytes that may be text; never a number, so no class label."""
    import pyarrow as pa

    if is_list(kind) or pa.types.is_dictionary(kind):
        kind = kind.value_type
    text = pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
    return bool(text or is_bytes(kind))


def is_picture(kind: Any) -> bool:
    """Bytes, or a struct that has them, as Hugging Face writes pictures."""
    import pyarrow as pa

    return is_bytes(kind) or (
        pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0 and is_bytes(kind.field("bytes").type)
    )


def holds_bytes(kind: Any) -> bool:
    """Whether there are bytes in it at any depth."""
    import pyarrow as pa

    if is_list(kind):
        return holds_bytes(kind.value_type)
    if pa.types.is_struct(kind):
        return any(holds_bytes(kind.field(i).type) for i in range(kind.num_fields))
    return is_bytes(kind)
