"""An image grid with a caption under each image."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image

MIN_SIDE = 128
"""Smaller images are enlarged to this many pixels."""
MAX_LINES = 3
"""Lines of a caption that are shown."""
MARGIN, LINE_HEIGHT, FONT_SIZE = 8, 14, 11
"""In pixels."""


def draw_grid(images: "Sequence[Image]", captions: Sequence[str], *, columns: int = 8) -> "Image":
    """Draw images of one size, row by row, each with its caption."""
    from PIL import Image, ImageDraw, ImageFont

    side = max(MIN_SIDE, images[0].width)
    cell_width, cell_height = side + MARGIN, side + LINE_HEIGHT * MAX_LINES + MARGIN
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    grid = Image.new("RGB", (columns * cell_width + MARGIN, rows * cell_height + MARGIN), "white")
    draw, font = ImageDraw.Draw(grid), ImageFont.load_default(size=FONT_SIZE)
    for i, (image, caption) in enumerate(zip(images, captions, strict=True)):
        x, y = i % columns * cell_width + MARGIN, i // columns * cell_height + MARGIN
        grid.paste(image.resize((side, side), Image.Resampling.NEAREST if image.width < side else None), (x, y))
        lines = wrap_caption(caption, lambda line: draw.textlength(line, font=font), side)
        for j, line in enumerate(lines[:MAX_LINES]):
            draw.text((x, y + side + 2 + LINE_HEIGHT * j), line, fill="black", font=font)
    return grid


def wrap_caption(caption: str, measure: Callable[[str], float], max_width: int) -> list[str]:
    """Break a caption into lines that `measure` finds no wider than `max_width`; a wider word has a line of its own."""
    lines = [""]
    for word in caption.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and measure(longer) > max_width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines
