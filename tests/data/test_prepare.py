"""From the recipe to data sets: thresholds, splits, weights, the ledger, the key."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from transformers import AutoTokenizer

from finetune.data import cache, workers
from finetune.data.formats import recognize_format
from finetune.data.prepare import key_parts, prepare_data, prepare_rows, prepare_validation_rows
from finetune.data.sources import columns_of, open_source
from finetune.data.template import encode_prompt, load_template
from finetune.errors import DataError, FinetuneError
from finetune.recipe.schema import DataSection
from finetune.run_dir import RunDir
from tests.data.conftest import TOOLS_TEMPLATE, chat, prepare, print_today

Tokenizers = Callable[[str], Any]
Sections = Callable[..., Any]


def many(count: int) -> list[dict[str, Any]]:
    return [{"prompt": f"What is {number}?", "completion": f"It is {number}."} for number in range(count)]


def origins(dataset: Any) -> list[int]:
    return [int(dataset.origin(index).rsplit(":", 1)[1]) for index in range(len(dataset))]


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ({"prompt": None, "completion": "a"}, "column 'prompt' holds null"),
        ({"prompt": "q", "completion": 72}, r"column 'completion' holds an integer \(72\)"),
        ({"prompt": ["q"], "completion": "a"}, "column 'prompt' holds a list of 1"),
        ({"prompt": "q", "completion": ""}, "column 'completion' holds an empty string"),
        ('{"prompt": "q", "comp', "not valid JSON"),
        (["q", "a"], "the row is a list of 2"),
    ],
)
def test_fm29_file_and_row_are_named(bad: Any, reason: str, tokenizer_of: Tokenizers, section: Sections) -> None:
    rows = [*many(2), bad, *many(1)]
    with pytest.raises(DataError, match=rf"1 of 4 rows(?s:.)*rows\.jsonl:3: {reason}(?s:.)*max_rejected_share"):
        prepare(tokenizer_of("llama3"), section(rows))


def test_fm29_rejected_rows_are_left_out_and_listed(
    tokenizer_of: Tokenizers, section: Sections, tmp_path: Path
) -> None:
    data = section([*many(3), {"prompt": 1, "completion": "a"}], max_rejected_share=0.3)
    prepared, _ = prepare(tokenizer_of("llama3"), data)
    assert len(prepared.train) == 3
    run_dir = RunDir(tmp_path / "run")
    prepared.ledger.write(run_dir)
    ledger = json.loads(run_dir.ledger.read_text())
    assert ledger["sources"][0]["rows_read"] == 4 and ledger["sources"][0]["dropped"] == {"malformed": 1}
    assert ledger["rejected"] == 1
    (line,) = run_dir.rejected.read_text().splitlines()
    assert json.loads(line)["origin"].endswith("rows.jsonl:4")
    assert any("dropped: malformed 1" in line for line in prepared.ledger.summary_lines())


def test_fm29_csv_cells_that_no_column_holds(tokenizer_of: Tokenizers, section: Sections, tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("instruction,output\na,b\nSay hi, please,Hello there\nshort\n")
    data = section(source={"path": str(tmp_path / "rows.csv")})
    with pytest.raises(DataError, match=r"2 of 3 rows(?s:.)*rows.csv:3: the row has 3 cells, .*without quotes\?"):
        prepare(tokenizer_of("llama3"), data)
    prepared, _ = prepare(tokenizer_of("llama3"), data.model_copy(update={"max_rejected_share": 0.7}))
    assert origins(prepared.train) == [2]
    assert prepared.ledger.sources[0].dropped == {"malformed": 2}
    assert [row.origin.rsplit(":")[-1] for row in prepared.ledger.rejected] == ["3", "4"]
    assert "column 'output' holds null (or is missing)" in prepared.ledger.rejected[1].reason


def test_fm29_a_row_that_the_template_refuses(tokenizer_of: Tokenizers, section: Sections) -> None:
    row = {"messages": [{"role": "user", "content": "a"}, *chat("b", "c")["messages"]]}
    with pytest.raises(DataError, match=r"rows.jsonl:2: the chat template refuses .* must alternate"):
        prepare(tokenizer_of("gemma"), section([chat("a", "b"), row]))


def test_test_rows_in_a_folder_of_training_rows_are_pointed_out(
    tokenizer_of: Tokenizers, section: Sections, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    section(many(2), name="set/train-00000-of-00001.jsonl")
    for name, expected in (("contest.jsonl", None), ("test-00000-of-00001.jsonl", "test-00000-of-00001.jsonl")):
        section(many(2), name=f"set/{name}")
        prepared, _ = prepare(tokenizer_of("llama3"), section(source={"path": str(folder)}))
        err = capsys.readouterr().err
        assert ("is trained on as well" in err) is (expected is not None) and (expected or "") in err
    assert len(prepared.train) == 6
    prepare(tokenizer_of("llama3"), section(source={"path": str(folder / "test*")}))
    assert "is trained on as well" not in capsys.readouterr().err


@pytest.mark.parametrize("content", ["", "\n\n"])
def test_an_empty_data_set(content: str, tokenizer_of: Tokenizers, section: Sections, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(content)
    with pytest.raises(DataError, match=r"data.sources\[0\].path: .*rows.jsonl holds no rows"):
        prepare(tokenizer_of("llama3"), section())


def test_rows_from_arrow_have_no_keys_that_other_rows_brought(
    tokenizer_of: Tokenizers, section: Sections, tmp_path: Path
) -> None:
    tokenizer = tokenizer_of("qwen3")
    tokenizer.chat_template = TOOLS_TEMPLATE
    rows = [
        {"messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "tool_calls": [call]}]}
        for call in ({"function": {"arguments": {"city": "Paris"}}}, {"function": {"arguments": {"query": "one"}}})
    ]
    rows.append(chat("hello", "hi"))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    lines, _ = prepare(tokenizer, section(rows))
    table, _ = prepare(tokenizer, section(name="rows.parquet"))
    assert "null" not in tokenizer.decode(table.train[0][0])
    assert [table.train[i][0].tolist() for i in range(3)] == [lines.train[i][0].tolist() for i in range(3)]
    assert table.train.fingerprint == lines.train.fingerprint


@pytest.mark.parametrize("train_on", ["all_assistant", "everything"])
def test_tools_are_rendered_as_the_tokenizer_does(
    train_on: str, tokenizer_of: Tokenizers, section: Sections, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = tokenizer_of("qwen3")
    tokenizer.chat_template = TOOLS_TEMPLATE
    tools = [{"name": "one", "default": None}]
    rows = [{**chat("hello", "hi"), "tools": tools}, {**chat("hello", "hi"), "tools": json.dumps(tools)}]
    data = section([*rows, chat("hello", "hi")], train_on=train_on)
    prepared, template = prepare(tokenizer, data)
    for index, given in ((0, tools), (1, tools), (2, None)):
        theirs = tokenizer.apply_chat_template(rows[0]["messages"], given, return_dict=False)
        ids, _ = prepared.train[index]
        assert ids.tolist() == theirs[: len(ids)] and len(ids) >= len(theirs) - 1
    assert prepared.ledger.duplicate_rows == 1
    test_rows = prepare_rows(data.sources[0], data, tokenizer, template)
    assert [row.tools for row in test_rows] == [tools, tools, None]
    prompt = encode_prompt(tokenizer, template, test_rows[0].messages, tools=test_rows[0].tools)
    assert prepared.train[0][0][: len(prompt)].tolist() == prompt
    assert "rows have tools" not in capsys.readouterr().err


def test_tools_that_the_template_does_not_show_are_said(
    tokenizer_of: Tokenizers, section: Sections, capsys: pytest.CaptureFixture[str]
) -> None:
    data = section([{**chat("hello", "hi"), "tools": [{"name": "f"}]}, chat("a", "b")])
    for _ in ("made", "found"):
        prepare(tokenizer_of("llama3"), data)
        assert "1 rows have tools, which the chat template (tokenizer) does not show" in capsys.readouterr().err


def test_fm29_tool_calls_that_the_template_does_not_show(
    tokenizer_of: Tokenizers, section: Sections, capsys: pytest.CaptureFixture[str]
) -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    row = {"messages": [*chat("hello", "hi")["messages"], {"role": "user", "content": "x"}, call]}
    thoughts = chat("hello", "hi")
    thoughts["messages"][1]["reasoning_content"] = "k"
    with pytest.raises(DataError, match=r"rows.jsonl:1: an assistant turn that holds tool_calls is empty as the chat"):
        prepare(tokenizer_of("llama3"), section([row, thoughts]))
    capsys.readouterr()
    unseen = {**call, "weight": 0}
    for _ in ("made", "found"):
        prepare(tokenizer_of("llama3"), section([{"messages": [*row["messages"][:-1], unseen]}, thoughts]))
        err = capsys.readouterr().err
        assert "1 rows have reasoning_content, which the chat template (tokenizer) does not show" in err
        assert "1 rows have tool_calls, which the chat template (tokenizer) does not show" in err
    tokenizer = tokenizer_of("qwen3")
    tokenizer.chat_template = TOOLS_TEMPLATE
    prepared, _ = prepare(tokenizer, section([row]))
    assert "have tool_calls" not in capsys.readouterr().err and prepared.ledger.sources[0].rows_kept == 1


def test_no_answers_at_all(tokenizer_of: Tokenizers, section: Sections) -> None:
    with pytest.raises(DataError, match=r"nothing to learn:\n  .*rows.jsonl:1: the conversation has no assistant turn"):
        prepare(tokenizer_of("llama3"), section([{"messages": [{"role": "user", "content": "x"}]}]))


def test_columns_that_are_not_used_are_named(
    tokenizer_of: Tokenizers, section: Sections, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare(tokenizer_of("llama3"), section([{"id": 1, **row, "url": "x"} for row in many(2)]))
    assert "format prompt_completion (told from its columns; not used: id, url)" in capsys.readouterr().err


def test_too_many_rows_that_are_cut(tokenizer_of: Tokenizers, section: Sections) -> None:
    rows = [{"prompt": "q", "completion": "hello world " * 40}]
    with pytest.raises(DataError, match=r"1 of 1 rows (?s:.)*to go on with them cut"):
        prepare(tokenizer_of("llama3"), section(rows, max_seq_len=40, over_length="truncate"))


def test_max_rows_weights_and_several_sources(tokenizer_of: Tokenizers, section: Sections, tmp_path: Path) -> None:
    section(many(10), name="a.jsonl")
    section([{"text": f"text {number}"} for number in range(6)], name="b.jsonl")
    data = DataSection.model_validate(
        {
            "sources": [
                {"path": str(tmp_path / "a.jsonl"), "weight": 2.5, "max_rows": 8},
                {"path": str(tmp_path / "b.jsonl"), "weight": 0.5},
            ]
        }
    )
    tokenizer = tokenizer_of("llama3")
    prepared, template = prepare(tokenizer, data)
    counts: dict[str, int] = {}
    for index in range(len(prepared.train)):
        origin = Path(prepared.train.origin(index)).name
        counts[origin] = counts.get(origin, 0) + 1
    first = [count for origin, count in counts.items() if origin.startswith("a")]
    assert sorted(first) == [2, 2, 2, 2, 3, 3, 3, 3]
    assert sum(origin.startswith("b") for origin in counts) == 3
    again = prepare_data(data, tokenizer, template, seed=0)
    other = prepare_data(data, tokenizer, template, seed=1)
    assert again.train.fingerprint == prepared.train.fingerprint != other.train.fingerprint


def test_a_weight_that_leaves_no_row_is_refused(tokenizer_of: Tokenizers, section: Sections, tmp_path: Path) -> None:
    section(many(10), name="a.jsonl")
    section(many(10), name="b.jsonl")
    sources = [{"path": str(tmp_path / "a.jsonl")}, {"path": str(tmp_path / "b.jsonl"), "weight": 0.04}]
    with pytest.raises(DataError, match=r"data.sources\[1\].weight: 0.04 of 10 rows is none of them"):
        prepare(tokenizer_of("llama3"), DataSection.model_validate({"sources": sources}))
    sources[1]["weight"] = 0.06
    prepared, _ = prepare(tokenizer_of("llama3"), DataSection.model_validate({"sources": sources}))
    assert len(prepared.train) == 11


def test_a_system_prompt_that_text_rows_do_not_show(
    tokenizer_of: Tokenizers, section: Sections, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    section([{"text": "some text"}], name="a.jsonl")
    section(many(2), name="b.jsonl")
    for names, expected in ((["a"], True), (["a", "b"], False)):
        sources = [{"path": str(tmp_path / f"{name}.jsonl")} for name in names]
        prepare(tokenizer_of("llama3"), DataSection.model_validate({"sources": sources, "system": "Be brief."}))
        assert ("data.system has no effect on text rows" in capsys.readouterr().err) == expected


@pytest.mark.parametrize(("size", "expected"), [(0.2, 4), (5.0, 5), (0.001, 1)])
def test_validation_rows_are_split_off(size: float, expected: int, tokenizer_of: Tokenizers, section: Sections) -> None:
    data = section(many(20), validation={"size": size})
    prepared, _ = prepare(tokenizer_of("llama3"), data)
    assert prepared.validation is not None
    held, kept = origins(prepared.validation), origins(prepared.train)
    assert len(held) == expected and sorted(held + kept) == list(range(1, 21))
    other, _ = prepare(tokenizer_of("llama3"), data, seed=1)
    assert expected == 1 or origins(other.validation) != held


def test_equal_rows_stay_on_one_side(tokenizer_of: Tokenizers, section: Sections) -> None:
    rows = [*many(5), *many(5), *many(5)]
    prepared, _ = prepare(tokenizer_of("llama3"), section(rows, validation={"size": 7.0}))
    held = {(number - 1) % 5 for number in origins(prepared.validation)}
    kept = {(number - 1) % 5 for number in origins(prepared.train)}
    assert held and kept and not held & kept
    assert prepared.ledger.duplicate_rows == 10


@pytest.mark.parametrize(
    ("size", "message"), [(20.0, "none is left to train on"), (2.5, "neither a share below 1 nor a whole")]
)
def test_a_validation_size_that_cannot_be(
    size: float, message: str, tokenizer_of: Tokenizers, section: Sections
) -> None:
    with pytest.raises(DataError, match=message):
        prepare(tokenizer_of("llama3"), section(many(20), validation={"size": size}))


def test_a_validation_source_of_its_own(tokenizer_of: Tokenizers, section: Sections, tmp_path: Path) -> None:
    section(many(3), name="held.jsonl")
    data = section(many(10)[2:], validation={"source": {"path": str(tmp_path / "held.jsonl")}})
    prepared, _ = prepare(tokenizer_of("llama3"), data)
    assert prepared.validation is not None and len(prepared.validation) == 3 and len(prepared.train) == 8
    assert prepared.ledger.validation_rows_in_train == 1


def test_rows_for_metrics(tokenizer_of: Tokenizers, section: Sections) -> None:
    tokenizer = tokenizer_of("llama3")
    data = section([chat("a", "b", "c", "d"), chat("e", "f")], system="Be kind.")
    template = load_template(tokenizer, data)
    rows = prepare_rows(data.sources[0], data, tokenizer, template)
    assert [row.expected for row in rows] == ["d", "f"]
    assert rows[1].messages == [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "e"}]
    assert len(prepare_rows(data.sources[0], data, tokenizer, template, max_rows=1)) == 1
    prepared = prepare_data(data, tokenizer, template, seed=0)
    ids, mask = prepared.train[1]
    assert ids[: int(np.argmax(mask))].tolist() == encode_prompt(tokenizer, template, rows[1].messages)


def test_what_is_expected_is_what_was_trained(tokenizer_of: Tokenizers, section: Sections) -> None:
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {"x": 1}}}]}
    rows = [
        chat("a", "Paris."),
        chat("a", "<think>k</think>Paris."),
        chat("a", "<think>\nk\n</think>\n\nb"),
        {"messages": [chat("a")["messages"][0], call]},
    ]
    trained = ["<think>\n\n</think>\n\nParis.", "<think>\nk\n</think>\n\nParis.", "<think>\nk\n</think>\n\nb"]
    trained.append('{"name": "f", "arguments": {"x": 1}}')
    tokenizer = tokenizer_of("qwen3")
    qwen3, data = tokenizer.chat_template, section(rows)
    for chosen, template_text in ((slice(3), qwen3), (slice(3, 4), TOOLS_TEMPLATE)):
        tokenizer.chat_template = template_text
        prepared, template = prepare(tokenizer, section(rows[chosen]))
        found = prepare_rows(data.sources[0], data, tokenizer, template)
        assert [row.opening + row.expected for row in found] == trained[chosen]
        for (ids, mask), text in zip(map(prepared.train.__getitem__, range(len(found))), trained[chosen], strict=True):
            assert tokenizer.decode(ids[mask]) == f"{text}<|im_end|>"
    data = section(rows[:1], train_on="everything")
    tokenizer.chat_template = qwen3
    found = prepare_rows(data.sources[0], data, tokenizer, load_template(tokenizer, data))
    assert (found[0].opening, found[0].expected) == ("<think>\n\n</think>\n\n", "Paris.")


def test_fm29_rows_for_metrics_that_the_template_refuses(
    tokenizer_of: Tokenizers, section: Sections, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = tokenizer_of("gemma")
    refused = {"messages": [{"role": "user", "content": "a"}, *chat("b", "c")["messages"]]}
    data = section([refused, chat("a", "b")])
    template = load_template(tokenizer, data)
    with pytest.raises(DataError, match=r"1 of 1 rows cannot(?s:.)*rows\.jsonl:1: the chat template refuses"):
        prepare_rows(data.sources[0], data, tokenizer, template)
    data = data.model_copy(update={"max_rejected_share": 0.5})
    rows = prepare_rows(data.sources[0], data, tokenizer, template, max_rows=1)
    assert [row.expected for row in rows] == ["b"]
    assert "1 of 2 rows cannot be used and are not measured: " in capsys.readouterr().err
    with pytest.raises(DataError, match="1 of 2 rows cannot"):
        prepare_rows(data.sources[0], data.model_copy(update={"max_rejected_share": 0.4}), tokenizer, template)


def test_validation_rows_for_metrics(tokenizer_of: Tokenizers, section: Sections) -> None:
    tokenizer = tokenizer_of("llama3")
    data = section(many(20), validation={"size": 4.0})
    prepared, template = prepare(tokenizer, data)
    rows = prepare_validation_rows(data, tokenizer, template, seed=0)
    assert [row.origin for row in rows] == [prepared.validation.origin(i) for i in range(4)]


def test_validation_rows_of_two_sources_in_one_file(
    tokenizer_of: Tokenizers, section: Sections, tmp_path: Path
) -> None:
    section([{"q": f"q {n}", "a": f"a{n}.", "b": f"b{n}."} for n in range(10)])
    path = str(tmp_path / "rows.jsonl")
    sources = [{"path": path, "columns": {"prompt": "q", "completion": column}} for column in ("a", "b")]
    data = DataSection.model_validate({"sources": sources, "validation": {"size": 6.0}})
    tokenizer = tokenizer_of("llama3")
    prepared, template = prepare(tokenizer, data)
    rows = prepare_validation_rows(data, tokenizer, template, seed=0)
    assert len(rows) == len(prepared.validation) == 6
    trained = [tokenizer.decode(prepared.train[index][0]) for index in range(14)]
    assert not [row for row in rows if any(row.expected in text for text in trained)]


CHANGES: dict[str, Any] = {
    "system": {"system": "Be kind."},
    "train_on": {"train_on": "last_assistant"},
    "max_seq_len": {"max_seq_len": 512},
    "over_length": {"over_length": "truncate"},
    "format": {"source": {"format": "text"}},
    "max_rows": {"source": {"max_rows": 2}},
    "columns": {"source": {"columns": {"prompt": "text"}}},
    "template": {"template": "chatml"},
}


def key_of(tokenizer: Any, data: DataSection) -> str:
    template = load_template(tokenizer, data)
    section = data.sources[0]
    source = open_source(section, "here")
    found = columns_of(source, list(source.rows()))
    format_name = recognize_format(section.format, section.columns, found, "here")
    return cache.cache_key(key_parts(source, section, data, tokenizer, template, format_name))


@pytest.mark.parametrize("change", list(CHANGES))
def test_fm15_each_key_that_shapes_samples_changes_the_key(
    change: str, tokenizer_of: Tokenizers, section: Sections
) -> None:
    rows = [{**row, "text": "of another format"} for row in many(3)]
    assert key_of(tokenizer_of("llama3"), section(rows)) != key_of(
        tokenizer_of("llama3"), section(rows, **CHANGES[change])
    )


@pytest.mark.parametrize(
    "keys",
    [
        {"num_workers": 1},
        {"packing": "none"},
        {"max_rejected_share": 0.5},
        {"date": "2026-01-02"},
        {"source": {"format": "prompt_completion"}},
    ],
)
def test_what_shapes_no_sample_keeps_the_key(keys: dict[str, Any], tokenizer_of: Tokenizers, section: Sections) -> None:
    rows = many(3)
    assert key_of(tokenizer_of("llama3"), section(rows)) == key_of(tokenizer_of("llama3"), section(rows, **keys))


def test_the_date_is_in_the_key_where_the_template_prints_it(tokenizer_of: Tokenizers, section: Sections) -> None:
    tokenizer = tokenizer_of("llama3")
    tokenizer.chat_template = print_today(tokenizer.chat_template)
    days = ("2026-01-02", "2026-01-03", "2026-01-02")
    keys = [key_of(tokenizer, section(many(3), date=day)) for day in days]
    assert keys[0] == keys[2] != keys[1]


def test_fm15_data_bytes_tokenizer_code_and_libraries_change_the_key(
    tokenizer_of: Tokenizers, section: Sections, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    keys = [key_of(tokenizer_of("llama3"), section(many(3)))]
    assert key_of(tokenizer_of("llama3"), section(many(3))) == keys[0]
    keys.append(key_of(tokenizer_of("llama3"), section(many(4))))
    section(many(3))
    more_tokens = tokenizer_of("llama3")
    more_tokens.add_tokens(["Paris"])
    keys.append(key_of(more_tokens, section()))
    other_eos = tokenizer_of("llama3")
    other_eos.eos_token = "<|eot_id|>"
    keys.append(key_of(other_eos, section()))
    with monkeypatch.context() as patch:
        patch.setattr(cache, "version", lambda name: "0.0")
        keys.append(key_of(tokenizer_of("llama3"), section()))
    with monkeypatch.context() as patch:
        copy = tmp_path / "code"
        shutil.copytree(Path(cache.__file__).parent, copy)
        with (copy / "masking.py").open("a") as stream:
            stream.write("\n")
        patch.setattr(cache, "__file__", str(copy / "cache.py"))
        keys.append(key_of(tokenizer_of("llama3"), section()))
    assert len(set(keys)) == len(keys)


def test_fm15_a_truncation_left_in_the_tokenizer_changes_nothing(tokenizer_of: Tokenizers, section: Sections) -> None:
    tokenizer = tokenizer_of("llama3")
    before = key_of(tokenizer, section(many(3)))
    tokenizer.backend_tokenizer.enable_truncation(2)
    assert key_of(tokenizer, section()) == before
    prepared, _ = prepare(tokenizer, section())
    assert prepared.train.lengths.min() > 2


def test_fm15_changed_bytes_give_changed_samples(tokenizer_of: Tokenizers, section: Sections) -> None:
    first, _ = prepare(tokenizer_of("llama3"), section(many(3)))
    second, _ = prepare(tokenizer_of("llama3"), section(many(2)))
    assert (len(first.train), len(second.train)) == (3, 2)
    assert first.train.fingerprint != second.train.fingerprint


def test_fm15_equal_bytes_under_another_suffix(tokenizer_of: Tokenizers, section: Sections, tmp_path: Path) -> None:
    lines = [{"text": "one"}, {"text": "two"}]
    document, _ = prepare(tokenizer_of("llama3"), section(lines, name="train.txt"))
    (tmp_path / "train.txt").rename(tmp_path / "train.jsonl")
    rows, _ = prepare(tokenizer_of("llama3"), section(name="train.jsonl"))
    assert (len(document.train), len(rows.train)) == (1, 2)
    assert rows.ledger.sources[0].cache == "made"


def test_the_second_time_comes_from_the_cache(
    tokenizer_of: Tokenizers, section: Sections, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = tokenizer_of("llama3")
    data = section([*many(7), {"prompt": 3}], max_rejected_share=0.5)
    first, template = prepare(tokenizer, data)
    monkeypatch.setattr("finetune.data.prepare.encode_stream", None)
    second = prepare_data(data, tokenizer, template, seed=0)
    assert [each.ledger.sources[0].cache for each in (first, second)] == ["made", "found"]
    assert second.ledger.rejected == first.ledger.rejected
    with pytest.raises(DataError, match="max_rejected_share"):
        prepare_data(data.model_copy(update={"max_rejected_share": 0.0}), tokenizer, template, seed=0)


def test_processes_and_threads_give_the_same_samples(
    tokenizer_of: Tokenizers, section: Sections, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(workers, "_MANY_ROWS", 20)
    monkeypatch.setattr(workers, "_ROWS_PER_CHUNK", 7)
    found = []
    for count in (1, 2):
        monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / f"cache{count}"))
        prepared, _ = prepare(tokenizer_of("llama3"), section(many(60), num_workers=count))
        found.append((prepared.train.fingerprint, origins(prepared.train)))
    assert found[0] == found[1]


def test_fm29_a_dead_worker_is_an_error_and_no_hang(
    tokenizer_of: Tokenizers, section: Sections, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "_MANY_ROWS", 20)
    monkeypatch.setattr(workers, "_start_worker", lambda encoder: os._exit(9))
    with pytest.raises(FinetuneError, match=r"data.num_workers: 1"):
        prepare(tokenizer_of("llama3"), section(many(61), num_workers=2))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "template"),
    [
        ("gsm8k_test.instruction.jsonl", "auto"),
        ("gpteacher_codegen.alpaca.jsonl", "alpaca"),
        ("taskmaster4_coffee_multiturn.jsonl", "auto"),
        ("fastchat_dummy_sharegpt.jsonl", "chatml"),
    ],
)
def test_fm12_real_rows_with_a_real_tokenizer(
    name: str, template: str, shared_data: Path, smollm2_folder: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2_folder)
    data = DataSection.model_validate(
        {"sources": [{"path": str(shared_data / name), "max_rows": 1000}], "template": template}
    )
    prepared, loaded = prepare(tokenizer, data)
    rows = {row.origin: row for row in prepare_rows(data.sources[0], data, tokenizer, loaded)}
    assert prepared.ledger.sources[0].rows_kept == len(rows)
    for index in range(len(prepared.train)):
        row = rows[prepared.train.origin(index)]
        ids, mask = prepared.train[index]
        prompt = encode_prompt(tokenizer, loaded, row.messages)
        assert ids[: len(prompt)].tolist() == prompt and mask[len(prompt) :].all()
        assert tokenizer.decode(ids[len(prompt) :]) == row.expected + "<|im_end|>"


@pytest.mark.slow
def test_fm29_fifty_thousand_rows(
    shared_data: Path,
    smollm2_folder: Path,
    section: Sections,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    lines = (shared_data / "gpteacher_codegen.alpaca.jsonl").read_text().splitlines()
    source = [json.loads(line) for line in lines]
    rows = [
        {**source[i % len(source)], "instruction": f"{source[i % len(source)]['instruction']} (variant {i})"}
        for i in range(52_002)
    ]
    data = section(rows, template="alpaca")
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "cache"))
    tokenizer = AutoTokenizer.from_pretrained(smollm2_folder)
    started = time.perf_counter()
    prepared, template = prepare(tokenizer, data)
    made = time.perf_counter() - started
    started = time.perf_counter()
    prepare_data(data, tokenizer, template, seed=0)
    opened = time.perf_counter() - started
    print(f"52,002 rows: {made:.1f} s to tokenize, {opened:.2f} s to open")
    assert len(prepared.train) == 52_002
    assert opened < 1.0 < made  # how long tokenizing takes is measured, not asserted: machines are shared
