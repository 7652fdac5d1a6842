"""A first look at a source: its format, which of its columns are meant, and how long its rows are."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np

from finetune.data.formats import FORMATS, Message, RowError, load_line, parse_row, recognize_format
from finetune.data.sources import RawRow, columns_of, open_source
from finetune.errors import DataError

if TYPE_CHECKING:
    from finetune.recipe.schema import SourceSection

# Rows that are read whole; the others are only counted.
_LOOKED_AT = 1000
# Of English text with the vocabularies of today's models: between 3.5 and 5.
CHARACTERS_PER_TOKEN = 4

# What people call a format's fields, most telling first.
_NAMES: dict[str, tuple[str, ...]] = {
    "instruction": (
        "instruction",
        "question",
        "prompt",
        "query",
        "problem",
        "task",
        "user",
        "human",
        "source",
        "input",
    ),
    "output": ("output", "answer", "response", "completion", "target", "solution", "reply", "assistant", "summary"),
    "messages": ("messages", "conversation", "dialog", "dialogue", "chat", "turns"),
    "conversations": ("conversations", "conversation", "dialog", "dialogue", "chat", "turns"),
    "text": ("text", "content", "document", "article", "body"),
}


@dataclass(frozen=True)
class Survey:
    """What a source holds."""

    format: str
    columns: dict[str, str]
    """The format's field to a column of another name."""
    num_rows: int
    num_looked_at: int
    num_bad: int
    """Rows among those looked at that cannot be used."""
    first_bad: str
    """Where the first of them is, and why; empty where there is none."""
    lengths: dict[str, int]
    """Tokens of a row: p50, p95, p99 and max."""


def survey_source(section: SourceSection, where: str, count_tokens: Callable[[list[Message]], int]) -> Survey:
    """Look at the first rows of a source; `count_tokens` says how long a conversation is.

    Raises:
        DataError: the source is missing, empty or of unknown shape, or none of the rows looked at can be used.
    """
    source = open_source(section, where)
    stream = source.rows()
    rows = list(islice(stream, _LOOKED_AT))
    if not rows:
        raise DataError(f"{where}: {section.path} holds no rows.")
    found = columns_of(source, rows)
    columns = guess_columns(rows, found)
    format_name = recognize_format("auto", columns, found, where)
    lengths, bad = [], []
    for row in rows:
        try:
            lengths.append(count_tokens(parse_row(row.payload, FORMATS[format_name], columns)))
        except RowError as error:
            bad.append(f"{source.origin(row.file, row.number)}: {error}")
    if not lengths:
        raise DataError(f"{where}: none of the first {len(rows):,} rows can be used:\n  {bad[0]}")
    points = np.percentile(lengths, [50, 95, 99, 100], method="higher").astype(int)
    return Survey(
        format=format_name,
        columns=columns,
        num_rows=len(rows) + sum(1 for _ in stream),
        num_looked_at=len(rows),
        num_bad=len(bad),
        first_bad=bad[0] if bad else "",
        lengths=dict(zip(("p50", "p95", "p99", "max"), points.tolist(), strict=True)),
    )


def guess_columns(rows: Sequence[RawRow], found: Sequence[str]) -> dict[str, str]:
    """Which columns are a format's fields under another name; empty where none is renamed, or nothing fits."""
    if any(all(field in found for field in shape.required) for shape in FORMATS.values()):
        return {}
    first = next((row for row in map(_as_object, rows) if row is not None), {})
    turns = next((name for name in found if _is_turns(first.get(name))), None)
    if turns is not None:
        field = "messages" if "role" in first[turns][0] else "conversations"
        return {field: turns} if turns.lower() in _NAMES[field] or len(found) == 1 else {}
    asked = _named(found, "instruction")
    answered = _named([name for name in found if name != asked], "output")
    if asked and answered:
        pairs = {"instruction": asked, "output": answered}
        return {field: column for field, column in pairs.items() if field != column}
    text = _named(found, "text")
    return {"text": text} if text else {}


def _named(found: Sequence[str], field: str) -> str | None:
    lowered = {name.lower(): name for name in reversed(found)}
    return next((lowered[name] for name in _NAMES[field] if name in lowered), None)


def _as_object(row: RawRow) -> Mapping[str, Any] | None:
    try:
        value = load_line(row.payload) if isinstance(row.payload, bytes) else row.payload
    except RowError:
        return None
    return value if isinstance(value, Mapping) else None


def _is_turns(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], Mapping)
