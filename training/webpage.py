"""Pages that stand alone: one HTML file with its style and its pictures inside."""

import base64
import html
import io
from collections.abc import Iterable, Sequence

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

STYLE = (
    "body{font:15px sans-serif;margin:2em auto;max-width:75em}th{text-align:left;padding-right:2em}"
    "td{padding-right:2em}.w{background:#fe9;padding:.5em}img{max-width:100%}"
)


def page(title: str, body: str) -> bytes:
    """A whole page around `body`, which is HTML."""
    title = html.escape(title)
    return f"<!doctype html><meta charset=utf-8><title>{title}</title><style>{STYLE}</style>{body}\n".encode()


def image(figure: Figure) -> str:
    """A figure as an <img> that holds its own pixels."""
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    return f"<img src='data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}'>"


def table(rows: Iterable[Sequence[str]], head: Sequence[str] = ()) -> str:
    """Rows of text, escaped; the first cell of each is its heading."""
    top = "<tr>" + "".join(f"<th>{html.escape(cell)}</th>" for cell in head) + "</tr>" if head else ""
    lines = [[html.escape(cell) for cell in row] for row in rows]
    body = "".join(f"<tr><th>{first}</th>{''.join(f'<td>{c}</td>' for c in rest)}</tr>" for first, *rest in lines)
    return f"<table>{top}{body}</table>"
