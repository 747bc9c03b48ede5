"""Self-contained HTML pages: one skeleton, with figures and images inline."""

import base64
import html
import io
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STYLE = "body{font:15px/1.5 system-ui;margin:2em auto;max-width:76em;padding:0 1em}"


def page(title: str, body: str, *, style: str = "") -> str:
    """Return a page with this title as its heading; `body` is HTML, `style` is CSS in addition to the common one."""
    head = f'<meta charset="utf-8"><title>{html.escape(title)}</title>\n<style>{STYLE}\n{style}</style>'
    return f'<!doctype html><html lang="en">{head}\n<h1>{html.escape(title)}</h1>\n{body}</html>\n'


def svg(figure: "Figure") -> str:
    """Return a figure as an inline SVG element."""
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()[text.getvalue().index("<svg") :]


def image_tag(data: bytes, *, alt: str = "") -> str:
    """Return an image element with a PNG inline."""
    return f'<img alt="{html.escape(alt)}" src="data:image/png;base64,{base64.b64encode(data).decode()}">'
