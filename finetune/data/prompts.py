"""Prompts from a file, for `generate`: one a line of text, or rows as training reads them, without their answer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from finetune.console import say
from finetune.data.formats import Conversation, Fields, RowError, check_text, check_unicode, load_line, prompt_messages
from finetune.data.readers import READERS
from finetune.errors import DataError


def read_prompts(path: Path) -> list[Conversation]:
    """The prompts of a file; empty lines are passed over.

    Raises:
        DataError: the file cannot be read, or a line or row is no prompt.
    """
    kind = path.suffix.lower()
    found = []
    num_answered = 0
    try:
        # training takes a .txt file for one document
        rows = READERS[kind](path) if kind in READERS and kind != ".txt" else _read_lines(path)
        for number, payload in rows:
            try:
                row, answered = _parse(payload)
            except RowError as error:
                raise DataError(f"{path}:{number}: {error}") from None
            found.append(row)
            num_answered += answered
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error
    if num_answered:
        say(f"{path}: {num_answered:,} conversations end in an answer, which is left out of the prompt")
    return found


def _read_lines(path: Path) -> list[tuple[int, dict[str, str]]]:
    # not splitlines, which splits at U+2028 and at U+0085 too
    lines = path.read_text(encoding="utf-8-sig").split("\n")
    return [(number, {"prompt": line}) for number, line in enumerate(lines, 1) if line.strip()]


def _parse(payload: bytes | Mapping[str, Any] | RowError) -> tuple[Conversation, bool]:
    """A row's prompt, and whether an answer was cut off it."""
    if isinstance(payload, RowError):
        raise payload
    row: Any = load_line(payload) if isinstance(payload, bytes) else payload
    if isinstance(row, str):
        row = {"prompt": row}
    if isinstance(row, Mapping) and row.get("messages") not in (None, []):
        fields = Fields(row, {})
        turns = prompt_messages(fields)
        answered = turns[-1]["role"] == "assistant"
        if answered and len(turns) == 1:
            raise RowError("is no prompt: an assistant's turn is all that it has")
        return Conversation(turns[:-1] if answered else turns, fields.tools()), answered
    if not isinstance(row, Mapping) or "prompt" not in row:
        columns = f"; columns found: {', '.join(map(str, row))}" if isinstance(row, Mapping) else ""
        raise RowError(f'is no prompt; accepted are a string, {{"prompt": "…"}} and {{"messages": […]}}{columns}')
    text = row["prompt"]
    if text and isinstance(text, str):  # blanks alone are a prompt, too
        check_unicode(text, "prompt")
    else:
        check_text(text, "prompt")
    return Conversation([{"role": "user", "content": text}]), False
