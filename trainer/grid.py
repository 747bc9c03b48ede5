"""Pictures in a grid, each with its caption under it."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image

TILE = 128
LINES = 3


def draw_grid(images: "Sequence[Image]", captions: Sequence[str], *, columns: int = 8) -> "Image":
    """One sheet; small pictures are enlarged to 128 pixels, larger ones keep their size."""
    from PIL import Image, ImageDraw, ImageFont

    side = max(TILE, images[0].width)
    font = ImageFont.load_default(size=11)
    columns = min(columns, len(images))
    height = side + 14 * LINES + 8
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * (side + 8) + 8, rows * height + 8), "white")
    pen = ImageDraw.Draw(sheet)
    for number, (image, caption) in enumerate(zip(images, captions, strict=True)):
        y, x = divmod(number, columns)
        corner = (x * (side + 8) + 8, y * height + 8)
        sheet.paste(image.resize((side, side), Image.Resampling.NEAREST if image.width < side else None), corner)
        lines = wrap(caption, lambda line: pen.textlength(line, font=font), side)
        for line_number, line in enumerate(lines[:LINES]):
            pen.text((corner[0], corner[1] + side + 2 + 14 * line_number), line, fill="black", font=font)
    return sheet


def wrap(caption: str, width_of, limit: int) -> list[str]:  # type: ignore[no-untyped-def]
    """Break a caption into lines no wider than `limit`, by `width_of` a line."""
    lines = [""]
    for word in caption.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and width_of(longer) > limit:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines
