"""Formats: what each row shape becomes, how it is recognized, and what is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest

from finetune.data.formats import FORMATS, Format, RowError, parse_conversation, recognize_format
from finetune.data.sources import RawRow
from finetune.data.survey import guess_columns
from finetune.errors import DataError

PAIR = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
SYSTEM = {"role": "system", "content": "s"}


def parse_row(row: Any, shape: Format, columns: dict[str, str]) -> list[dict[str, Any]]:
    """The messages alone."""
    return parse_conversation(row, shape, columns).messages


@pytest.mark.parametrize(
    ("name", "row", "expected"),
    [
        ("alpaca", {"instruction": "q", "output": "a"}, PAIR),
        (
            "alpaca",
            {"instruction": "q", "input": "i", "output": "a"},
            [{"role": "user", "content": "q\n\ni", "instruction": "q", "input": "i"}, PAIR[1]],
        ),
        ("messages", {"messages": [SYSTEM, *PAIR]}, [SYSTEM, *PAIR]),
        (
            "sharegpt",
            {
                "conversations": [
                    {"from": "system", "value": "s"},
                    {"from": "human", "value": "q"},
                    {"from": "gpt", "value": "a"},
                ]
            },
            [SYSTEM, *PAIR],
        ),
        ("prompt_completion", {"prompt": "q", "completion": "a"}, PAIR),
        ("prompt_completion", {"prompt": "q", "completion": "a", "system": "s"}, [SYSTEM, *PAIR]),
        ("text", {"text": "t"}, [{"role": "text", "content": "t"}]),
    ],
)
def test_each_format_becomes_messages(name: str, row: dict[str, Any], expected: list[dict[str, Any]]) -> None:
    assert parse_row(row, FORMATS[name], {}) == expected
    assert recognize_format("auto", {}, row, "data.sources[0]") == name


def test_columns_are_mapped() -> None:
    columns = {"instruction": "question", "output": "answer"}
    assert recognize_format("auto", columns, ["question", "answer"], "here") == "alpaca"
    assert parse_row({"question": "q", "answer": "a"}, FORMATS["alpaca"], columns) == PAIR


def test_a_column_is_one_field_only() -> None:
    row = {"input": "q", "output": "a"}
    columns = guess_columns([RawRow(0, 1, row)], list(row))
    assert columns == {"instruction": "input"}
    assert recognize_format("auto", columns, row, "here") == "alpaca"
    assert parse_row(row, FORMATS["alpaca"], columns) == PAIR
    both = {"instruction": "input", "input": "input"}
    assert parse_row(row, FORMATS["alpaca"], both)[0]["content"] == "q\n\nq"


@pytest.mark.parametrize(
    ("wanted", "columns", "found", "message"),
    [
        ("auto", {"instruction": "question"}, ["answer", "id"], "'question' is no column.*found: answer, id"),
        ("auto", {}, ["a", "b"], "no known format.*found: a, b.*alpaca"),
        ("alpaca", {}, ["instruction", "response"], "missing: output.*found: instruction, response"),
        ("alpaca", {"question": "a"}, ["a"], "alpaca has no field 'question'"),
        ("alpaca", {"instruction": "output"}, ["output", "text"], "missing: output.*found: output, text"),
        ("auto", {"prompt": "x"}, ["x", "chosen"], "no known format"),
    ],
)
def test_columns_that_do_not_fit_are_named(
    wanted: str, columns: dict[str, str], found: list[str], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        recognize_format(wanted, columns, found, "data.sources[0]")


@pytest.mark.parametrize(
    ("value", "found"),
    [
        (None, "null"),
        (7, r"an integer \(7\)"),
        (1.5, r"a number \(1.5\)"),
        (True, "a boolean"),
        (["a", "b"], "a list of 2"),
        ({"a": 1}, "an object"),
        ("", "an empty string"),
        ("  \n", "an empty string"),
        ("\ud800", "not valid Unicode"),
    ],
)
@pytest.mark.parametrize("name", FORMATS)
def test_fm29_what_is_not_text_is_refused_in_every_format(name: str, value: Any, found: str) -> None:
    rows: dict[str, dict[str, Any]] = {
        "alpaca": {"instruction": "q", "output": value},
        "messages": {"messages": [PAIR[0], {"role": "assistant", "content": value}]},
        "sharegpt": {"conversations": [{"from": "human", "value": value}]},
        "prompt_completion": {"prompt": value, "completion": "a"},
        "text": {"text": value},
    }
    with pytest.raises(RowError, match=found):
        parse_row(rows[name], FORMATS[name], {})


@pytest.mark.parametrize("value", [3, ["a"]])
def test_fm29_an_optional_column_must_be_text_too(value: Any) -> None:
    with pytest.raises(RowError, match="column 'input' holds"):
        parse_row({"instruction": "q", "output": "a", "input": value}, FORMATS["alpaca"], {})


@pytest.mark.parametrize(
    ("row", "found"),
    [
        ({"messages": None}, "null"),
        ({"messages": []}, "an empty list"),
        ({"messages": "hi"}, "text"),
        ({"messages": ["hi"]}, "turn 1"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "turn 1: role is text"),
    ],
)
def test_fm29_turns_must_be_turns(row: dict[str, Any], found: str) -> None:
    with pytest.raises(RowError, match=found):
        parse_row(row, FORMATS["messages"], {})


@pytest.mark.parametrize(
    ("line", "found"),
    [
        (b'{"text": "a', "not valid JSON"),
        (b'{"a":', "Expecting value where the line ends"),
        (b"\xff", "not UTF-8"),
        (b"[1]", "a list of 1"),
        (b"null", "null"),
        (b'{"text": "a", "n": ' + b"9" * 5000 + b"}", "not readable as JSON: Exceeds the limit"),
        (b'{"text": "a", "text": "b"}', "the key 'text' stands twice in one object"),
    ],
)
def test_fm29_broken_lines(line: bytes, found: str) -> None:
    with pytest.raises(RowError, match=found):
        parse_row(line, FORMATS["text"], {})


def test_parts_of_text_are_joined() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b\n"}]
    turns = parse_row({"messages": [PAIR[0], {"role": "assistant", "content": parts}]}, FORMATS["messages"], {})
    assert turns == [PAIR[0], {"role": "assistant", "content": "ab\n"}]
    for wrong, found in (
        ({"type": "image_url", "image_url": {}}, "turn 1: content has a part of type 'image_url'; only"),
        ({"type": "text", "text": 3}, r"turn 1: content: text of a part holds an integer \(3\)"),
        ("a", "turn 1: content holds a list of 2"),
    ):
        with pytest.raises(RowError, match=found):
            parse_row({"messages": [{"role": "user", "content": [parts[0], wrong]}]}, FORMATS["messages"], {})


def test_sharegpt_calls_become_tool_calls() -> None:
    def parse(value: str) -> list[dict[str, Any]]:
        call = {"from": "function_call", "value": value}
        turns = [{"from": "human", "value": "q"}, call, {"from": "observation", "value": "1"}]
        return parse_row({"conversations": turns}, FORMATS["sharegpt"], {})

    one = {"name": "f", "arguments": {"x": 1}}
    call = {"type": "function", "function": one}
    tool = {"role": "tool", "content": "1"}
    assert parse(json.dumps(one)) == [PAIR[0], {"role": "assistant", "content": "", "tool_calls": [call]}, tool]
    assert parse(json.dumps([one, one]))[1]["tool_calls"] == [call, call]
    for wrong, found in (
        ("{", "turn 2: value of a function_call: not valid JSON"),
        ("{}", 'turn 2: value of a function_call holds an object; write {"name"'),
        ("[]", 'turn 2: value of a function_call holds an empty list; write {"name"'),
        ('{"name": "\\ud800", "arguments": {}}', "turn 2: value holds text that is not valid Unicode"),
    ):
        with pytest.raises(RowError, match=found):
            parse(wrong)


def test_tool_calls_pass_through() -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]}
    turns = parse_row({"messages": [PAIR[0], call]}, FORMATS["messages"], {})
    assert turns[1] == {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f"}}]}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("reasoning_content", "\ud800"),
        ("tool_calls", [{"function": {"name": "f", "arguments": {"\ud800": 1}}}]),
    ],
)
def test_fm29_a_lone_surrogate_beside_the_content(key: str, value: Any) -> None:
    row = {"messages": [PAIR[0], {**PAIR[1], key: value}]}
    with pytest.raises(RowError, match=rf"turn 2: {key} holds text that is not valid Unicode"):
        parse_row(row, FORMATS["messages"], {})


TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"default": None}}}]


@pytest.mark.parametrize("name", ["messages", "sharegpt"])
@pytest.mark.parametrize(
    ("value", "expected"), [(TOOLS, TOOLS), (json.dumps(TOOLS), TOOLS), (None, None), ([], None), ("", None)]
)
def test_tools_are_a_list_or_its_json_text(name: str, value: Any, expected: Any) -> None:
    turns = {"messages": PAIR} if name == "messages" else {"conversations": PAIR}
    assert parse_conversation({**turns, "tools": value}, FORMATS[name], {}) == (PAIR, expected)
    assert parse_conversation({**turns, "t": value}, FORMATS[name], {"tools": "t"}).tools == expected


@pytest.mark.parametrize(
    ("value", "found"),
    [
        ("[{", "column 'tools': not valid JSON"),
        ('"f"', "column 'tools' holds text"),
        (["f"], "column 'tools' holds a list of 1"),
        ({"name": "f"}, "column 'tools' holds an object"),
        ([{"name": "\ud800"}], "column 'tools' holds text that is not valid Unicode"),
    ],
)
def test_fm29_what_is_no_list_of_tools_is_refused(value: Any, found: str) -> None:
    with pytest.raises(RowError, match=found):
        parse_conversation({"messages": PAIR, "tools": value}, FORMATS["messages"], {})


@pytest.mark.parametrize(("weight", "expected"), [(0, {"weight": 0}), (0.0, {"weight": 0}), (1, {}), (None, {})])
def test_weight_is_kept_where_an_answer_is_not_trained(weight: Any, expected: dict[str, Any]) -> None:
    openai = [{**turn, "weight": weight} for turn in PAIR]
    shared = [{"from": turn["role"], "value": turn["content"], "weight": weight} for turn in PAIR]
    assert parse_row({"messages": openai}, FORMATS["messages"], {}) == [PAIR[0], {**PAIR[1], **expected}]
    assert parse_row({"conversations": shared}, FORMATS["sharegpt"], {}) == [PAIR[0], {**PAIR[1], **expected}]


@pytest.mark.parametrize(("weight", "found"), [(0.5, "a number"), (True, "a boolean"), ("0", "text"), ([0], "a list")])
def test_fm29_a_weight_is_0_or_1(weight: Any, found: str) -> None:
    with pytest.raises(RowError, match=f"turn 2: weight is {found}.*; accepted: 0"):
        parse_row({"messages": [PAIR[0], {**PAIR[1], "weight": weight}]}, FORMATS["messages"], {})
