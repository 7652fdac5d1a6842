"""`finetune generate`, from the command line down to the ids that the model gets."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from finetune.arguments import unused_sampling
from finetune.cli import main
from finetune.data.prompts import read_prompts
from finetune.errors import DataError
from finetune.inference import generate as module

MakeRun = Callable[..., tuple[Path, Any]]


def test_completions_go_to_stdout_and_numbers_to_stderr(make_run: MakeRun, capsys: pytest.CaptureFixture[str]) -> None:
    run, _ = make_run("adapter")
    assert main(["generate", str(run), "--prompt", "hello", "--prompt", "you", "--json"]) == 0
    out, err = capsys.readouterr()
    rows = [json.loads(line) for line in out.splitlines()]
    assert [row["prompt"] for row in rows] == ["hello", "you"]
    assert all(0 < row["num_tokens"] <= 8 for row in rows)
    assert "tokens/s" in err and "peak memory" in err

    assert main(["generate", str(run), "--prompt", "hello", "--max-new-tokens", "3", "--top-p", "0.9"]) == 0
    short, err = capsys.readouterr()
    assert "--top-p has no effect at --temperature 0" in " ".join(err.split())
    assert rows[0]["completion"].startswith(short.rstrip("\n\ufffd"))
    assert main(["generate", str(run), "--prompt", "hello", "--base", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["completion"] != rows[0]["completion"]


def test_a_prompt_past_the_context_is_refused(make_run: MakeRun, capsys: pytest.CaptureFixture[str]) -> None:
    run, _ = make_run("adapter")
    assert main(["generate", str(run), "--prompt", "hello", "--prompt", "long " * 110]) == 2
    assert "prompt 2 has 5" in (err := capsys.readouterr().err) and "the model's context holds 512; shorten it" in err


def test_fm12_the_model_gets_the_ids_of_the_tokenizers_own_template(
    make_run: MakeRun, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run, _ = make_run("adapter")
    given: list[list[int]] = []
    real = module.generate

    def spy(model: Any, tokenizer: Any, prompts: list[list[int]], *rest: Any, **options: Any) -> Any:
        given.extend(prompts)
        return real(model, tokenizer, prompts, *rest, **options)

    monkeypatch.setattr(module, "generate", spy)
    own = [{"role": "system", "content": "Mine."}, {"role": "user", "content": "x"}]
    file = tmp_path / "prompts.jsonl"
    file.write_text(json.dumps({"messages": own}) + "\n")
    assert main(["generate", str(run), "--prompt", "hello", "--file", str(file)]) == 0
    assert main(["generate", str(run), "--prompt", "hello", "--system", "Sing."]) == 0

    def want(system: str, text: str) -> list[int]:
        messages = [{"role": "system", "content": system}, {"role": "user", "content": text}]
        return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)

    # The recipe's system prompt, unless the command or the conversation carries one.
    assert given == [want("Be brief.", "hello"), want("Mine.", "x"), want("Sing.", "hello")]
    for ids in given:
        assert ids[0] == tokenizer.bos_token_id and ids[1] != tokenizer.bos_token_id


def test_prompts_are_read_from_text_and_json_lines(tmp_path: Path) -> None:
    text = tmp_path / "prompts.txt"
    text.write_text("one\n\n  two \n")
    assert [prompt.messages[0]["content"] for prompt in read_prompts(text)] == ["one", "  two "]
    lines = tmp_path / "prompts.jsonl"
    lines.write_text('"one"\n{"prompt": "two"}\n{"messages": [{"role": "user", "content": "three"}]}\n')
    assert [prompt.messages[0]["content"] for prompt in read_prompts(lines)] == ["one", "two", "three"]
    lines.write_text('{"messages": [{"role": "user", "content": "four"}], "tools": [{"name": "f"}]}\n')
    assert read_prompts(lines) == [([{"role": "user", "content": "four"}], [{"name": "f"}])]


def test_prompts_are_read_as_training_reads_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def read(name: str, content: str) -> list[Any]:
        path = tmp_path / name
        path.write_text(content, encoding="utf-8", newline="")
        return [[turn["content"] for turn in prompt.messages] for prompt in read_prompts(path)]

    assert read("a.txt", "one\u2028two\x85\r\nthree") == [["one\u2028two\x85"], ["three"]]
    row = json.dumps({"prompt": "one\u2028two"}, ensure_ascii=False)
    for name in ("a.jsonl", "a.ndjson", "a.JSONL"):
        assert read(name, f"{row}\n") == [["one\u2028two"]]
    assert read("a.json", f'[{row}, "three"]') == [["one\u2028two"], ["three"]]
    assert read("a.csv", "prompt,completion\nhello,hi\n") == [["hello"]]
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    turns = [{"role": "user", "content": "x"}, call, {"role": "tool", "content": "1"}]
    capsys.readouterr()
    answered = [*turns, {"role": "assistant", "content": "gold"}]
    lines = "".join(json.dumps({"messages": each}) + "\n" for each in (turns, answered))
    assert read("b.jsonl", lines) == [["x", "", "1"]] * 2
    assert "1 conversations end in an answer, which is left out" in capsys.readouterr().err
    with pytest.raises(DataError, match=r"c\.csv:2: is no prompt; .*columns found: question, answer"):
        read("c.csv", "question,answer\nhello,hi\n")


@pytest.mark.parametrize(
    "turns",
    [
        [{"role": "system", "content": ""}, {"role": "user", "content": "x"}],
        [{"role": "user", "content": ""}],
        [{"role": "user", "content": "x"}, {"role": "ipython", "content": "1"}],
    ],
)
def test_a_prompt_may_be_what_no_training_row_is(turns: list[dict[str, str]], tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text(json.dumps({"messages": turns}) + '\n{"messages": [], "prompt": "x"}\n{"prompt": " "}\n')
    single = [[{"role": "user", "content": text}] for text in ("x", " ")]
    assert [prompt.messages for prompt in read_prompts(file)] == [turns, *single]


TOOLS = '{"messages": [{"role": "user", "content": "x"}], "tools": 3}'


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "3",
        '"\\ud800"',
        '{"prompt": "\\ud800"}',
        '{"messages": [{"role": "assistant", "content": "x"}]}',
        '{"text": "x"}',
        '{"messages": []}',
        '{"messages": [{"role": "user"}]}',
        '{"messages": [{"role": 3, "content": "x"}]}',
        TOOLS,
    ],
)
def test_a_line_that_is_no_prompt_is_named(tmp_path: Path, line: str) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text(f'"fine"\n{line}\n')
    with pytest.raises(DataError, match=r"prompts\.jsonl:2"):
        read_prompts(file)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"top_p": 0.9}, "--top-p has no effect at --temperature 0"),
        ({"top_p": 0.9, "seed": 1}, "--top-p and --seed have no effect"),
        ({"top_p": 0.9, "seed": 1, "temperature": 0.7}, None),
        ({}, None),
    ],
)
def test_options_of_sampling_without_sampling(given: dict[str, Any], said: str | None) -> None:
    arguments = Namespace(**{"temperature": 0.0, "top_p": 1.0, "seed": 0, **given})
    found = unused_sampling(arguments)
    assert found is None if said is None else said in str(found)


def test_bad_arguments_exit_with_2(make_run: MakeRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, _ = make_run("adapter")
    assert main(["generate", str(run)]) == 2
    assert "--prompt" in capsys.readouterr().err
    assert main(["generate", str(tmp_path / "nowhere"), "--prompt", "x"]) == 2
    assert "nowhere: no such directory" in capsys.readouterr().err
    for option in ("--prompt", "--system"):
        assert main(["generate", str(run), "--prompt", "x", option, "\udcff"]) == 2
        assert f"{option} holds text that is not valid Unicode" in capsys.readouterr().err
    for option, value, why in (
        ("--top-p", "0", "must be above 0 and at most 1"),
        ("--temperature", "-1", "must be 0 or more"),
        ("--temperature", "warm", "must be a number"),
        ("--max-new-tokens", "0", "must be at least 1"),
        ("--max-new-tokens", "abc", "must be a whole number"),
        ("--seed", str(2**70), f"must be at most {2**63 - 1}"),
    ):
        with pytest.raises(SystemExit) as caught:
            main(["generate", str(run), "--prompt", "x", option, value])
        assert caught.value.code == 2 and f"argument {option}: {value}: {why}" in capsys.readouterr().err
