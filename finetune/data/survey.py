"""A first look at a source: its format, which of its columns are meant, and how long its rows are."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np

from finetune.data.formats import FORMATS, Conversation, RowError, load_line, parse_conversation, recognize_format
from finetune.data.sources import RawRow, columns_of, open_source, unused_columns
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
        "q",
    ),
    "output": (
        "output",
        "answer",
        "response",
        "completion",
        "target",
        "solution",
        "reply",
        "assistant",
        "summary",
        "highlights",
        "a",
    ),
    "input": ("input", "context", "passage", "background", "document", "article"),
    "system": ("system", "system_prompt", "system_message", "system_instruction"),
    "messages": ("messages", "conversation", "dialog", "dialogue", "chat", "turns"),
    "conversations": ("conversations", "conversation", "dialog", "dialogue", "chat", "turns"),
    "text": ("text", "content", "document", "article", "body"),
}
# What asks where nothing else does, and what a summary is of.
_ASKS_PERHAPS = ("source", "input")
_SUMMARIZED = ("document", "article", "dialogue", "text", "content", "body")


@dataclass(frozen=True)
class Survey:
    """What a source holds."""

    format: str
    columns: dict[str, str]
    """The format's field to a column of another name."""
    unused: list[str]
    """Columns that no field reads."""
    num_rows: int
    num_looked_at: int
    num_bad: int
    """Rows among those looked at that cannot be used."""
    first_bad: str
    """Where the first of them is, and why; empty where there is none."""
    lengths: dict[str, int]
    """Tokens of a row: p50, p95, p99 and max."""
    all_lengths: list[int]
    """Tokens of every row looked at that can be used."""


def survey_source(section: SourceSection, where: str, count_tokens: Callable[[Conversation], int]) -> Survey:
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
    lengths: list[int] = []
    bad: list[str] = []
    for row in rows:
        try:
            lengths.append(count_tokens(parse_conversation(row.payload, FORMATS[format_name], columns)))
        except RowError as error:
            bad.append(f"{source.origin(row.file, row.number)}: {error}")
    if not lengths:
        raise DataError(f"{where}: none of the first {len(rows):,} rows can be used:\n  {bad[0]}")
    points = np.percentile(lengths, [50, 95, 99, 100], method="higher").astype(int)
    return Survey(
        format=format_name,
        columns=columns,
        unused=unused_columns(format_name, columns, found),
        num_rows=len(rows) + sum(1 for _ in stream),
        num_looked_at=len(rows),
        num_bad=len(bad),
        first_bad=bad[0] if bad else "",
        lengths=dict(zip(("p50", "p95", "p99", "max"), points.tolist(), strict=True)),
        all_lengths=lengths,
    )


def guess_columns(rows: Sequence[RawRow], found: Sequence[str]) -> dict[str, str]:
    """Which columns are a format's fields under another name; empty where none is renamed, or nothing fits."""
    objects = [row for row in map(_as_object, rows) if row is not None]
    for name, shape in FORMATS.items():
        if name != "text" and all(field in found for field in shape.required):
            return _with_optional(name, {field: field for field in shape.required}, objects, found)
    for column in found:
        turns = next((row[column] for row in objects if _is_turns(row.get(column))), None)
        if turns is not None:
            name, field = ("messages", "messages") if "role" in turns[0] else ("sharegpt", "conversations")
            if column.lower() in _NAMES[field] or len(found) == 1:
                return _with_optional(name, {field: column}, objects, found)
    asked, answered = _pair(found)
    if asked and answered:
        return _with_optional("alpaca", {"instruction": asked, "output": answered}, objects, found)
    text = _named(found, _NAMES["text"])
    return {"text": text} if text and text != "text" else {}


def _pair(found: Sequence[str]) -> tuple[str | None, str | None]:
    """The columns of question and answer, or of a text and its summary."""
    answered = _named(found, _NAMES["output"])
    asked = _named(found, _NAMES["instruction"])
    if answered is not None and answered.lower() in ("summary", "highlights"):
        asked = asked or _named(found, _SUMMARIZED)
    return asked or _named(found, _ASKS_PERHAPS), answered


def _with_optional(
    name: str, columns: dict[str, str], objects: Sequence[Mapping[str, Any]], found: Sequence[str]
) -> dict[str, str]:
    """`columns` and those for the format's optional fields that hold text; without fields of their own name."""
    free = [column for column in found if column not in columns.values() and _holds_text(objects, column)]
    for field in FORMATS[name].optional:
        column = _named(free, _NAMES.get(field, ()))
        if column is not None:
            columns = {**columns, field: column}
    return {field: column for field, column in columns.items() if field != column}


def _holds_text(objects: Sequence[Mapping[str, Any]], column: str) -> bool:
    return all(isinstance(row.get(column, ""), str | None) for row in objects)


def _named(found: Sequence[str], names: Sequence[str]) -> str | None:
    lowered = {name.lower(): name for name in reversed(found)}
    return next((lowered[name] for name in names if name in lowered), None)


def _as_object(row: RawRow) -> Mapping[str, Any] | None:
    try:
        value = load_line(row.payload) if isinstance(row.payload, bytes) else row.payload
    except RowError:
        return None
    return value if isinstance(value, Mapping) else None


def _is_turns(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], Mapping)
