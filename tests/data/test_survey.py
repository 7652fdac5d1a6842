"""A first look at a source: format, columns under other names, lengths, bad rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from finetune.data.formats import Conversation
from finetune.data.survey import survey_source
from finetune.errors import DataError
from finetune.recipe.schema import SourceSection

TURN = {"role": "user", "content": "a"}


def count(row: Conversation) -> int:
    return sum(len(turn["content"]) for turn in row.messages)


def write(folder: Path, *rows: dict[str, Any]) -> SourceSection:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return SourceSection(path=str(path))


@pytest.mark.parametrize(
    ("row", "format_name", "columns"),
    [
        ({"instruction": "a", "output": "b"}, "alpaca", {}),
        ({"prompt": "a", "completion": "b"}, "prompt_completion", {}),
        ({"messages": [TURN]}, "messages", {}),
        ({"conversations": [{"from": "human", "value": "a"}]}, "sharegpt", {}),
        ({"text": "a"}, "text", {}),
        ({"question": "a", "answer": "b"}, "alpaca", {"instruction": "question", "output": "answer"}),
        ({"Prompt": "a", "Response": "b", "id": 3}, "alpaca", {"instruction": "Prompt", "output": "Response"}),
        ({"instruction": "a", "response": "b"}, "alpaca", {"output": "response"}),
        ({"conversation": [TURN]}, "messages", {"messages": "conversation"}),
        ({"conversation": [{"from": "human", "value": "a"}]}, "sharegpt", {"conversations": "conversation"}),
        ({"content": "a", "url": "b"}, "text", {"text": "content"}),
        ({"instruction": "a", "output": "b", "context": "c"}, "alpaca", {"input": "context"}),
        ({"prompt": "a", "completion": "b", "system_message": "c"}, "prompt_completion", {"system": "system_message"}),
        ({"question": "a", "answer": "b", "context": ["c"]}, "alpaca", {"instruction": "question", "output": "answer"}),
        ({"article": "a", "highlights": "b"}, "alpaca", {"instruction": "article", "output": "highlights"}),
        ({"note": "n", "q": "a", "a": "b"}, "alpaca", {"instruction": "q", "output": "a"}),
        ({"source": "x", "text": "a", "summary": "b"}, "alpaca", {"instruction": "text", "output": "summary"}),
        ({"source": "a", "target": "b"}, "alpaca", {"instruction": "source", "output": "target"}),
        ({"input": "a", "output": "b"}, "alpaca", {"instruction": "input"}),
        ({"text": "a", "links": [{"url": "b"}]}, "text", {}),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else str(value),
)
def test_formats_and_columns(tmp_path: Path, row: dict[str, Any], format_name: str, columns: dict[str, str]) -> None:
    survey = survey_source(write(tmp_path, row), "--data", count)
    assert (survey.format, survey.columns) == (format_name, columns)


@pytest.mark.parametrize(
    ("row", "columns", "unused"),
    [
        (
            {"instruction": "a", "context": "b", "response": "c", "category": "d"},
            {"output": "response", "input": "context"},
            ["category"],
        ),
        (
            {"id": "1", "system_prompt": "a", "question": "b", "response": "c"},
            {"instruction": "question", "output": "response", "system": "system_prompt"},
            ["id"],
        ),
        ({"document": "a", "summary": "b", "id": "1"}, {"instruction": "document", "output": "summary"}, ["id"]),
    ],
    ids=["dolly", "open_orca", "xsum"],
)
def test_all_of_a_prompt_is_used_and_the_rest_is_named(
    tmp_path: Path, row: dict[str, Any], columns: dict[str, str], unused: list[str]
) -> None:
    survey = survey_source(write(tmp_path, row), "--data", count)
    assert (survey.format, survey.columns, survey.unused) == ("alpaca", columns, unused)


def test_lengths_rows_and_bad_ones(tmp_path: Path) -> None:
    rows = [{"instruction": "a" * size, "output": "b"} for size in range(1, 1201)]
    rows[4]["output"] = ""
    survey = survey_source(write(tmp_path, *rows), "--data", count)
    assert (survey.num_rows, survey.num_looked_at, survey.num_bad) == (1200, 1000, 1)
    assert survey.first_bad.endswith("rows.jsonl:5: column 'output' holds an empty string; it must be text")
    assert survey.lengths == pytest.approx({"p50": 502, "p95": 951, "p99": 991, "max": 1001}, abs=1)


def test_what_cannot_be_used_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no known format has these columns. Columns found: x, y") as caught:
        survey_source(write(tmp_path, {"x": "a", "y": "b"}), "--data", count)
    assert "finetune new" not in str(caught.value) and "Rename yours" in str(caught.value)
    with pytest.raises(DataError, match=r"^--data: there is no file .*absent.csv"):
        survey_source(SourceSection(path=str(tmp_path / "absent.csv")), "--data", count)
    with pytest.raises(DataError, match=r"none of the first 1 rows can be used:\n  .*rows.jsonl:1: column 'output'"):
        survey_source(write(tmp_path, {"instruction": "a", "output": None}), "--data", count)
    with pytest.raises(DataError, match="holds no rows"):
        survey_source(write(tmp_path), "--data", count)
