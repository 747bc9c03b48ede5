"""Self-contained HTML pages: one skeleton and style for all reports, readable in light and dark mode.

A page needs no other file, so that it can be mailed or opened from disk: plots are inline SVG, images are data URIs.
"""

import base64
import html
import io
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SKELETON = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<h1>{title}</h1>
{body}
</body>
</html>
"""
STYLE = """
:root{color-scheme:light dark}
body{font:15px/1.5 system-ui,sans-serif;max-width:66em;margin:2em auto;padding:0 1em}
table{border-collapse:collapse;margin:1em 0;font-variant-numeric:tabular-nums}
th,td{padding:.15em .9em .15em 0;text-align:left;vertical-align:top}
thead th{border-bottom:1px solid #888}
figure{display:inline-block;margin:0 .8em .8em 0;vertical-align:top}
figcaption{font-size:.85em;line-height:1.3}
svg{max-width:100%;height:auto;background:#fff}
.warning{border-left:.3em solid #d97706;padding:.2em .8em}
"""
MEDIA_TYPES = {b"\x89PNG": "image/png", b"\xff\xd8\xff": "image/jpeg", b"GIF8": "image/gif", b"RIFF": "image/webp"}


def page(title: str, body: str, *, style: str = "") -> str:
    """Return a page with a title (plain text, shown as its heading), a body (HTML) and CSS rules of its own."""
    return SKELETON.format(title=html.escape(title), body=body, style=STYLE + style)


def svg(figure: "Figure") -> str:
    """Return a matplotlib figure as inline SVG."""
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()[text.getvalue().index("<svg") :]


def image_tag(data: bytes, *, alt: str = "") -> str:
    """Return an encoded image (PNG, JPEG, GIF, WebP or another one that browsers know) as a tag that contains it."""
    media_type = next((name for magic, name in MEDIA_TYPES.items() if data.startswith(magic)), "image/*")
    return f'<img alt="{html.escape(alt)}" src="data:{media_type};base64,{base64.b64encode(data).decode()}">'


def table(rows: Iterable[Sequence[Any]], *, head: Sequence[str] = ()) -> str:
    """Return rows of plain values as a table; the first cell of each row is its heading."""
    lines = [f"<thead><tr>{''.join(f'<th>{_cell(name)}</th>' for name in head)}</tr></thead>"] if head else []
    for first, *others in rows:
        lines.append(f"<tr><th>{_cell(first)}</th>{''.join(f'<td>{_cell(value)}</td>' for value in others)}</tr>")
    return f"<table>{''.join(lines)}</table>"


def _cell(value: Any) -> str:
    return html.escape(f"{value:.4g}" if isinstance(value, float) else str(value))
