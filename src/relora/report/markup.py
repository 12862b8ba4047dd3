"""Pieces of HTML. Whatever comes from data goes through `text`: escaped, its control characters shown."""

import html
from collections.abc import Iterable, Sequence

from relora.log.units import visible
from relora.report.svg import Picture


def text(value: object) -> str:
    """Return what a page may show of a value from outside."""
    return html.escape(visible(str(value)))


def section(title: str, *parts: str) -> str:
    """Put parts under a heading; nothing where there are none."""
    content = "\n".join(filter(None, parts))
    return f"<section>\n<h2>{text(title)}</h2>\n{content}\n</section>" if content else ""


def figure(picture: Picture | None, *, kind: str = "") -> str:
    """Put a picture on the page; `kind` is its CSS class."""
    if picture is None:
        return ""
    opening = f'<figure class="{kind}">' if kind else "<figure>"
    return f"{opening}\n{picture.svg}\n<figcaption>{text(picture.caption)}</figcaption>\n</figure>"


def pair(*figures: str) -> str:
    """Put figures side by side where the screen has room."""
    return f'<div class="pair">\n{"".join(figures)}\n</div>'


def facts_table(caption: str, rows: Iterable[tuple[str, str]]) -> str:
    """Write names and values as a table of two columns, its names as row headers."""
    body = "\n".join(
        f'<tr><th scope="row">{text(name)}</th><td>{text(value)}</td></tr>' for name, value in rows if value
    )
    return _scrolling(caption, f"<tbody>\n{body}\n</tbody>")


def numbers_table(caption: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Write a table of numbers with column headers; the first cell of a row is its header."""
    head = "".join(f'<th scope="col" class="number">{text(column)}</th>' for column in columns)
    body = "\n".join(
        f'<tr><th scope="row" class="number">{text(first)}</th>'
        + "".join(f'<td class="number">{text(cell)}</td>' for cell in rest)
        + "</tr>"
        for first, *rest in rows
    )
    return _scrolling(caption, f"<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>")


def tiles(facts: Iterable[tuple[str, str, str]]) -> str:
    """Write (name, figure, remark) as large figures."""
    cells = "\n".join(
        f"<div><dt>{text(name)}</dt><dd>{text(value)} <small>{text(remark)}</small></dd></div>"
        for name, value, remark in facts
        if value
    )
    return f'<dl class="tiles">\n{cells}\n</dl>' if cells else ""


def notes(items: Sequence[str]) -> str:
    """Write what a reader must know before trusting the page."""
    if not items:
        return ""
    listed = "\n".join(f"<li>{text(item)}</li>" for item in items)
    return f'<div class="notes" role="note">\n<ul>\n{listed}\n</ul>\n</div>'


def _scrolling(caption: str, inside: str) -> str:
    # A region that scrolls must be reachable by keyboard, hence a tab stop and a name.
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{text(caption)}">\n'
        f"<table>\n<caption>{text(caption)}</caption>\n{inside}\n</table>\n</div>"
    )
