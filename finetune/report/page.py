"""The skeleton of every page: one file with its styles and its script, no network, light and dark."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from datetime import datetime
from html import escape
from pathlib import Path

from finetune import __version__

_COMMAND = re.compile(r"`([^`]+)`")
_FOLDER = Path(__file__).parent
# A page as `page` writes it, its footer included.
PAGE_MARK = re.compile(rb"<!doctype html>.*<footer>[^<]* by finetune [^<]*</footer>", re.DOTALL)


def page(title: str, header: str, sections: Sequence[tuple[str, str, str]], *, what: str, contents: bool = True) -> str:
    """A whole page. `sections` are (id, heading, HTML); `contents` lists them at the side of a wide page.

    `what` says in the footer what this page is.
    """
    links = "".join(f'<a href="#{key}">{escape(heading)}</a>' for key, heading, _ in sections)
    nav = f'<nav aria-label="Contents">{links}</nav>' if contents else ""
    body = "".join(f'<section id="{key}"><h2>{escape(heading)}</h2>{html}</section>' for key, heading, html in sections)
    written = datetime.now().strftime("%Y-%m-%d %H:%M")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark"><link rel="icon" href="data:,">'
        f"<title>{escape(title)}</title><style>{_asset('page.css')}</style></head>"
        f'<body class="{"with-nav" if nav else "plain"}">{nav}<main><header>{header}</header>{body}'
        f"<footer>{escape(what)}, written {written} by finetune {__version__}</footer></main>"
        f"<script>{_asset('page.js')}</script></body></html>\n"
    )


def _asset(name: str) -> str:
    return (_FOLDER / name).read_text(encoding="utf-8")


def facts(pairs: Iterable[tuple[str, str, str]]) -> str:
    """Tiles of (label, value, remark): what one looks for first."""
    pairs = list(pairs)
    columns = min((4, 5, 3, 6), key=lambda number: -len(pairs) % number)
    tiles = "".join(
        f"<div><dt>{escape(label)}</dt><dd>{escape(value)}"
        + (f"<small>{escape(remark)}</small>" if remark else "")
        + "</dd></div>"
        for label, value, remark in pairs
    )
    return f'<dl class="facts" style="--columns:{columns}">{tiles}</dl>'


def table(head: Sequence[str], rows: Iterable[Sequence[str]], *, text_columns: Sequence[int] = (0,)) -> str:
    """A table of cells that are HTML already; columns are numbers unless named in `text_columns`."""

    def cell(tag: str, index: int, html: str) -> str:
        kind = "" if index in text_columns else ' class="number"'
        return f"<{tag}{kind}>{html}</{tag}>"

    top = "".join(cell("th", index, escape(name)) for index, name in enumerate(head))
    body = "".join(f"<tr>{''.join(cell('td', index, html) for index, html in enumerate(row))}</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def pairs_table(rows: Iterable[tuple[str, str]]) -> str:
    """Names and values, one pair a line."""
    body = "".join(f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in rows)
    return f'<div class="scroll"><table class="pairs"><tbody>{body}</tbody></table></div>'


def code(text: str) -> str:
    """A block of text to copy."""
    return f'<div class="code"><pre>{escape(text)}</pre><button type="button" class="copy">copy</button></div>'


def notice(lines: Sequence[str], *, kind: str, heading: str) -> str:
    """A box with a heading and a few lines; nothing where there are none."""
    if not lines:
        return ""
    shown = (_COMMAND.sub(r"<code>\1</code>", escape(line)) for line in lines)
    items = "".join(f"<li>{line}</li>" for line in shown)
    return f'<div class="notice {kind}"><b>{escape(heading)}</b><ul>{items}</ul></div>'
