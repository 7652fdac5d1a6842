"""What `finetune preview` shows: rows token by token, in the terminal and as a page, and what is not trained."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from html import escape

from rich.console import Console
from rich.text import Text

from finetune.data.ledger import RejectedRow
from finetune.report.page import page, table
from finetune.report.tokens import RowView, Segment, Token

SHOWN_REJECTED = 10
_NONE = "No row is dropped, cut or split."
_NEWLINE = "↵"
# Even and odd tokens differ a little, so that their borders show; white on colours reads on any terminal.
_STYLES = {
    "y": ("#ffffff on #1d6b42", "#ffffff on #2a8656"),
    "p": ("#ffffff on #23427c", "#ffffff on #2f559c"),
    "c": ("#e4e4e4 on #33373d", "#e4e4e4 on #41464d"),
    "pad": ("#e4e4e4 on #5b3a3a", "#e4e4e4 on #6b4545"),
}
_SPECIAL = {"y": "#ffd7ff", "p": "#ffd7ff", "c": "#e3a6ff", "pad": "#e4e4e4"}
# What a row's map is drawn with where there are no colours.
_MAP_SIGNS = {"y": "#", "p": "=", "c": "-", "pad": "."}
_MAP_STYLES = {"y": "#2a8656", "p": "#2f559c", "c": "#80868f", "pad": "#6b4545"}
_MEANING = {
    "y": "supervised: the model is trained to write it",
    "c": "context: it is only read",
    "p": "prefix that samples share",
    "x": "special token",
    "pad": "padding",
}


@dataclass(frozen=True)
class Preview:
    """All that is shown."""

    title: str
    summary: list[str]
    rows: list[RowView]
    rejected: list[RejectedRow]
    cut: list[str]
    """Rows of which only the beginning is trained or validated on."""
    split: list[str]
    """Rows of plain text that are several samples."""
    max_seq_len: int


def kind_of(segment: Segment, token: Token) -> str:
    """y supervised, p shared prefix, c context, pad padding."""
    if segment.kind == "padding":
        return "pad"
    if segment.kind == "prefix":
        return "p"
    return "y" if token.supervised else "c"


def print_preview(preview: Preview, console: Console) -> None:
    """The preview in the terminal; without colours, signs say what colours would."""
    plain = console.color_system is None
    console.print(_key(plain))
    for row in preview.rows:
        console.print()
        console.print(Text(row.heading, style="bold"))
        console.print(_map(row, min(console.width, 100), plain))
        for segment in row.segments:
            console.print(_segment(segment, console, plain))
    console.print()
    for line in untrained_lines(preview):
        console.print(Text(line))


def untrained_lines(preview: Preview) -> Iterator[str]:
    """Dropped, cut and split rows with their reasons."""
    if not (preview.rejected or preview.cut or preview.split):
        yield _NONE
        return
    kinds = Counter(row.kind for row in preview.rejected)
    if kinds:
        yield "dropped: " + ", ".join(f"{count:,} {kind}" for kind, count in kinds.items())
    for row in preview.rejected[:SHOWN_REJECTED]:
        yield f"  {row.origin}: {row.kind}: {row.reason}"
    if len(preview.rejected) > SHOWN_REJECTED:
        yield f"  and {len(preview.rejected) - SHOWN_REJECTED:,} more; a run writes all of them to rejected.jsonl"
    what = {
        f"cut to the first {preview.max_seq_len:,} tokens": preview.cut,
        f"split into pieces of at most {preview.max_seq_len:,} tokens": preview.split,
    }
    for text, origins in what.items():
        if origins:
            yield f"{text}: {len(origins):,}"
        yield from (f"  {origin}" for origin in origins[:SHOWN_REJECTED])
        if len(origins) > SHOWN_REJECTED:
            yield f"  and {len(origins) - SHOWN_REJECTED:,} more"


def _key(plain: bool) -> Text:
    if plain:
        return Text(
            "⟦supervised⟧  shared prefix and context outside  │ between tokens  ↵ line end  map: # supervised, "
            "= prefix, - context, . padding"
        )
    line = Text()
    for kind in ("y", "c", "p"):
        line.append(f" {_MEANING[kind]} ", style=_STYLES[kind][0]).append("  ")
    return line.append(" special token ", style=f"bold {_SPECIAL['c']} on #33373d")


def _map(row: RowView, width: int, plain: bool) -> Text:
    """The row as a bar: what most of the tokens behind each character are."""
    kinds = [kind_of(segment, token) for segment in row.segments for token in segment.tokens]
    borders: list[int] = []
    for segment in row.segments:
        borders.append((borders[-1] if borders else 0) + len(segment.tokens))
    width = min(width, len(kinds))
    bar = Text()
    for index in range(width):
        start, end = (
            index * len(kinds) // width,
            max((index + 1) * len(kinds) // width, index * len(kinds) // width + 1),
        )
        kind = Counter(kinds[start:end]).most_common(1)[0][0]
        is_border = any(start < border <= end for border in borders[:-1])
        if plain:
            bar.append("|" if is_border else _MAP_SIGNS[kind])
        else:
            bar.append(
                "▐" if is_border else "█",
                style=_MAP_STYLES[kind] if not is_border else f"default on {_MAP_STYLES[kind]}",
            )
    return bar


def _segment(segment: Segment, console: Console, plain: bool) -> Text:
    """A segment under its heading, its lines behind a border: doubled where samples hang together."""
    shared = segment.kind == "prefix" or segment.in_group
    corner, side = ("╔═ " if segment.kind == "prefix" else "╟─ ", "║ ") if shared else ("┌─ ", "│ ")
    lines = Text(corner, style="dim").append(segment.heading, style="default")
    if segment.kind == "padding":
        return lines
    for line in _token_lines(segment, max(20, console.width - len(side)), plain):
        lines.append("\n").append(side, style="dim").append(line)
    return lines


def _token_lines(segment: Segment, width: int, plain: bool) -> list[Text]:
    """The tokens in lines that end between tokens, so that every space is where it belongs."""
    lines = [Text()]
    inside = False
    for index, token in enumerate(segment.tokens):
        # A line end inside a token ends the line, one at its end the line after it.
        pieces = visible(token.text).split("\n")
        opening = "⟦" if token.supervised and not inside else "⟧" if inside and not token.supervised else ""
        inside = token.supervised
        if plain:
            pieces[0] = (opening or "│" if lines[-1] or opening else "") + pieces[0]
        if lines[-1] and lines[-1].cell_len + Text(pieces[0]).cell_len > width:
            lines.append(Text())
        for number, piece in enumerate(pieces):
            if number:
                lines.append(Text())
            lines[-1].append(piece, style="" if plain else _style(segment, token, index))
    if plain and inside:
        lines[-1].append("⟧")
    return [line for line in lines if line]


def _style(segment: Segment, token: Token, index: int) -> str:
    kind = kind_of(segment, token)
    style = _STYLES[kind][index % 2]
    return f"bold {_SPECIAL[kind]} on {style.split(' on ')[1]}" if token.special else style


def visible(text: str) -> str:
    """A token's text with line ends and other control characters shown; lines still end where they do."""
    shown = text.replace("\r", "␍").replace("\t", "⇥\t").replace("\n", f"{_NEWLINE}\n")
    return "".join(char if char in "\n\t" or char.isprintable() else f"⟨{ord(char):x}⟩" for char in shown)


def preview_html(preview: Preview) -> str:
    """The preview as a self-contained page; a token tells its id and position under the pointer."""
    key = "".join(
        f'<li><span class="swatch {kind}">{"&lt;end&gt;" if kind == "x" else "text"}</span> {escape(meaning)}</li>'
        for kind, meaning in _MEANING.items()
    )
    summary = "".join(f'<p class="sub">{escape(line)}</p>' for line in preview.summary)
    header = f'<h1>{escape(preview.title)}</h1>{summary}<ul class="key-colors">{key}</ul>'
    sections = [(f"row-{row.number}", f"Row {row.number:,}", _row_html(row)) for row in preview.rows]
    sections.append(("untrained", "Rows that are not trained, or not whole", _untrained_html(preview)))
    # Rows are few and long: a table of contents of one line each would say nothing.
    return page(f"{preview.title} · preview", header, sections, what="Preview", contents=False)


def _row_html(row: RowView) -> str:
    where, _, what = row.heading.partition(": ")
    line = f"{what}; {where.partition(', ')[2]}"
    return (
        f'<p class="sub">{escape(line)}</p>'
        + _map_html(row)
        + "".join(_segment_html(segment) for segment in row.segments)
    )


def _map_html(row: RowView) -> str:
    runs: list[tuple[str, int]] = []
    for index, segment in enumerate(row.segments):
        if index:
            runs.append(("edge", 0))
        for token in segment.tokens:
            kind = kind_of(segment, token)
            if runs and runs[-1][0] == kind:
                runs[-1] = (kind, runs[-1][1] + 1)
            else:
                runs.append((kind, 1))
    parts = "".join(
        '<i class="edge"></i>' if kind == "edge" else f'<i class="{kind}" style="flex:{count} 1 0"></i>'
        for kind, count in runs
    )
    return f'<div class="row-map" aria-hidden="true">{parts}</div>'


def _segment_html(segment: Segment) -> str:
    classes = {"prefix": " shared", "sample": " sharing" if segment.in_group else "", "padding": ""}[segment.kind]
    what, _, rest = segment.heading.partition(", ")
    heading = f"<h4><b>{escape(what)}</b>, {escape(rest)}</h4>"
    if segment.kind == "padding":
        return f'<div class="segment{classes}">{heading}</div>'
    spans = "".join(_token_html(segment, token) for token in segment.tokens)
    return f'<div class="segment{classes}">{heading}<div class="tokens">{spans}</div></div>'


def _token_html(segment: Segment, token: Token) -> str:
    kind = kind_of(segment, token)
    classes = " ".join([kind] * (kind != "c") + ["x"] * token.special)
    named = f' class="{classes}"' if classes else ""
    title = f"id {token.id}, position {token.position}" + (", supervised" if token.supervised else "")
    return f'<span{named} title="{title}">{escape(visible(token.text))}</span>'


def _untrained_html(preview: Preview) -> str:
    rows = [[_key_html(row.origin), escape(row.kind), escape(row.reason)] for row in preview.rejected[:100]]
    cut = f"only the first {preview.max_seq_len:,} tokens are trained"
    rows += [[_key_html(origin), "cut", cut] for origin in preview.cut[:100]]
    split = f"all of it is used, in pieces of at most {preview.max_seq_len:,} tokens"
    rows += [[_key_html(origin), "split", split] for origin in preview.split[:100]]
    if not rows:
        return f'<p class="empty">{_NONE}</p>'
    left = len(preview.rejected) + len(preview.cut) + len(preview.split) - len(rows)
    more = f'<p class="note">{left:,} more are not shown.</p>' if left else ""
    return table(["row", "kind", "reason"], rows, text_columns=(0, 1, 2)) + more


def _key_html(origin: str) -> str:
    return f'<span class="key">{escape(origin)}</span>'
