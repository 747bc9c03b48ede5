"""The closed list of reasons for rejecting a sample. To add a reason, add a member here and raise `Rejected` with it.

A rejected sample is stored in the table NAME_rejects with its key, shard, reason and detail. The value of a reason is
what is stored, so it does not change once it has been released. Samples that a user filters out are not rejects: their
reasons are in filters.py.
"""

from enum import StrEnum


class RejectReason(StrEnum):
    """Why a sample is in the rejects table."""

    UNREADABLE_SHARD = "unreadable_shard"
    """The shard cannot be read from here on (the key is empty), or a file of this sample cannot be read."""
    DUPLICATE_KEY = "duplicate_key"
    """An earlier sample of the same shard has this key."""
    NOT_GROUPED = "not_grouped"
    """The members of the sample are not next to each other in the tar."""
    UNSUPPORTED_MEMBER = "unsupported_member"
    """A member of the sample is a sparse file, a symbolic link, or a hard link to no earlier member."""
    UNSAFE_NAME = "unsafe_name"
    """The key is an absolute path, contains `..` or control characters, or is not UTF-8."""
    SAMPLE_TOO_LARGE = "sample_too_large"
    """The files of the sample are together larger than --max-sample-mb."""
    UNREADABLE_METADATA = "unreadable_metadata"
    """The JSON sidecar is not a JSON object in UTF-8."""
    MISSING_IMAGE = "missing_image"
    """There is no image file, member or column value."""
    EMPTY_IMAGE = "empty_image"
    """The image has 0 bytes."""
    UNREADABLE_IMAGE = "unreadable_image"
    """The bytes cannot be decoded as an image, or the brightness of its pixels is not defined."""
    UNSUPPORTED_FORMAT = "unsupported_format"
    """The image's format is not opened: EPS, SVG and the like, HEIC and JXL without their plugin."""
    IMAGE_TOO_LARGE = "image_too_large"
    """The image has more pixels than --max-pixels."""
    MISSING_CAPTION = "missing_caption"
    """There is no caption file, member, column value or sidecar field."""
    EMPTY_CAPTION = "empty_caption"
    """The caption is whitespace only."""
    CAPTION_NOT_TEXT = "caption_not_text"
    """The caption is a number, NaN, true, false or an object, not text."""
    CAPTION_NOT_UTF8 = "caption_not_utf8"
    """The caption is not valid UTF-8."""
    BAD_LATENT = "bad_latent"
    """The image encoder's latent is all zero, or not finite in float16."""
    BAD_EMBEDDING = "bad_embedding"
    """The text encoder's embedding is all zero, or not finite in float16."""


class Rejected(Exception):
    """Raised for a sample that cannot be encoded."""

    def __init__(self, reason: RejectReason, detail: str) -> None:
        """Keep the reason, and a detail that tells this sample's fault from others with the same reason."""
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail
