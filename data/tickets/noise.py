"""How a customer types: case, punctuation, typos, emoticons. Values to copy stay untouched."""

from __future__ import annotations

import re
from dataclasses import dataclass

from draw import Draw

EMOTICONS = (":(", ":-(", ":/", "😕", "🙁", "😡", "😞")
_SLOT = re.compile(r"\{(\w+)\}")
_WORD = re.compile(r"(?<![\w'])[A-Za-z][a-z]{3,}(?![\w'])")
# Only contractions that are no other word without the apostrophe ("I'd", "we're" would be).
_CONTRACTION = re.compile(r"\b(can|don|won|doesn|didn|hasn|isn|haven|couldn|it|that|there|I)'(t|s|m)\b", re.IGNORECASE)


@dataclass(frozen=True)
class Style:
    """The habits of one writer."""

    lower: bool
    loose: bool
    lines: bool
    emoticon: bool
    apostrophes: bool
    typos: int


@dataclass(frozen=True)
class Sentence:
    """A template without alternatives, what it says, how it ends, and what follows it."""

    text: str
    kind: str
    end: str = "."
    gap: str = " "


@dataclass
class Piece:
    """A run of text; a fixed one holds a slot's value and is never changed."""

    text: str
    fixed: bool = False


def draw_style(draw: Draw) -> Style:
    """Draw a writer: a fifth types in lower case only, a third is careless about punctuation."""
    lower = draw.chance(0.22)
    loose = draw.chance(0.7 if lower else 0.25)
    return Style(
        lower=lower,
        loose=loose,
        lines=draw.chance(0.35),
        emoticon=draw.chance(0.15),
        apostrophes=not (loose and draw.chance(0.5)),
        typos=draw.pick((0, 0, 1, 1, 2) if loose else (0, 0, 0, 0, 0, 0, 1, 2)),
    )


def write(sentences: list[Sentence], values: dict[str, str], style: Style, draw: Draw) -> str:
    """Write the sentences down as this writer would."""
    pieces: list[Piece] = []
    capital = True
    for index, sentence in enumerate(sentences):
        own = _pieces(sentence.text, values, style)
        if capital and not style.lower and not own[0].fixed:
            own[0].text = own[0].text[:1].upper() + own[0].text[1:]
        last = index == len(sentences) - 1
        end, gap = _ending(sentence, own[-1].fixed, style, draw)
        if last or sentences[index + 1].kind == "signoff":
            end = "" if end == "," else end
            gap = "" if last else sentences[index + 1].gap if end else "\n"
        pieces += [*own, Piece(end + gap, fixed=True)]
        capital = gap == "\n" or end[-1:] not in (",", ":", "-")
    for _ in range(style.typos):
        _add_typo(pieces, draw)
    return "".join(piece.text for piece in pieces)


def _pieces(text: str, values: dict[str, str], style: Style) -> list[Piece]:
    pieces = []
    for index, part in enumerate(_SLOT.split(text)):
        if index % 2:
            pieces.append(Piece(values[part], fixed=True))
        elif part:
            if not style.apostrophes:
                part = _CONTRACTION.sub(r"\1\2", part)
            pieces.append(Piece(part.lower() if style.lower else part))
    return pieces


def _ending(sentence: Sentence, after_value: bool, style: Style, draw: Draw) -> tuple[str, str]:
    end, gap = sentence.end, sentence.gap
    if sentence.kind == "issue" and style.emoticon:
        return f"{'' if style.loose else end} {draw.pick(EMOTICONS)}", "\n" if style.loose else gap
    if sentence.kind == "urgent" and end == "." and draw.chance(0.3):
        return "!!" if style.loose else "!", gap
    if not style.loose or end not in (".", "?") or draw.chance(0.35):
        return end, gap
    # A value must not run into the next word, or its end could not be told.
    if end == "." and draw.chance(0.35):
        return ",", " "
    runs_on = style.lower and end == "." and not after_value
    return ("", " ") if runs_on and draw.chance(0.6) else ("", "\n")


def _add_typo(pieces: list[Piece], draw: Draw) -> None:
    words = [(piece, match) for piece in pieces if not piece.fixed for match in _WORD.finditer(piece.text)]
    if not words:
        return
    piece, match = draw.pick(words)
    word = match[0]
    at = 1 + draw.below(len(word) - 2)
    typo = draw.pick(
        (
            word[:at] + word[at + 1] + word[at] + word[at + 2 :],
            word[:at] + word[at + 1 :],
            word[:at] + word[at] + word[at:],
        )
    )
    piece.text = piece.text[: match.start()] + typo + piece.text[match.end() :]
