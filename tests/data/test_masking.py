"""Masks: golden files per template, borders, rewritten turns, truncation, and the tokenizer's own mask."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from finetune.data.prepare import prepare_rows
from finetune.data.template import encode_prompt
from finetune.errors import DataError
from tests.data.conftest import HERE, chat, prepare

QUESTION = "What is the capital of France?"
TWO_TURNS = chat("hello", "good morning", QUESTION, "The capital is\n\nParis.")
WITH_SYSTEM = chat(QUESTION, "Paris.", "hello", "hi", system="Write one word.")
CASES = ["llama3", "gemma", "mistral", "qwen3", "smollm2", "alpaca", "chatml", "plain"]


def describe_samples(tokenizer: Any, dataset: Any) -> str:
    blocks = []
    for index in range(len(dataset)):
        ids, supervised = dataset[index]
        runs = np.split(ids[supervised], np.flatnonzero(np.diff(np.flatnonzero(supervised)) > 1) + 1)
        blocks.append(f"=== sample {index}: the whole\n{tokenizer.decode(ids)}")
        blocks.extend(f"=== sample {index}: supervised\n{tokenizer.decode(run)}" for run in runs)
    return "\n".join(blocks) + "\n"


@pytest.mark.parametrize("case", CASES)
def test_fm09_the_supervised_text_is_the_assistants_and_nothing_else(
    case: str, tokenizer_of: Callable[[str], Any], section: Callable[..., Any], request: pytest.FixtureRequest
) -> None:
    rows = [TWO_TURNS, WITH_SYSTEM]
    if case == "smollm2":
        tokenizer = AutoTokenizer.from_pretrained(request.getfixturevalue("smollm2_folder"))
        data = section(rows)
    elif case in ("alpaca", "chatml", "plain"):
        tokenizer = tokenizer_of("base" if case != "chatml" else "qwen3")
        data = section(rows, template=case)
    else:
        tokenizer, data = tokenizer_of(case), section(rows)
    prepared, _ = prepare(tokenizer, data)
    found = describe_samples(tokenizer, prepared.train)
    golden = HERE / "golden" / f"{case}.txt"
    if os.environ.get("FINETUNE_UPDATE_GOLDEN"):
        golden.write_text(found, encoding="utf-8")
    assert found == golden.read_text(encoding="utf-8")


@pytest.mark.parametrize("style", ["llama3", "alpaca", "chatml"])
def test_fm09_our_mask_is_the_tokenizers_own(
    style: str, tokenizer_of: Callable[[str], Any], section: Callable[..., Any]
) -> None:
    tokenizer = tokenizer_of({"alpaca": "base", "chatml": "qwen3"}.get(style, style))
    data = section([TWO_TURNS, WITH_SYSTEM], template="auto" if style == "llama3" else style)
    prepared, _ = prepare(tokenizer, data)
    for index, row in enumerate((TWO_TURNS, WITH_SYSTEM)):
        theirs = tokenizer.apply_chat_template(row["messages"], return_dict=True, return_assistant_tokens_mask=True)
        ids, supervised = prepared.train[index]
        assert ids.tolist() == theirs["input_ids"][: len(ids)]
        assert supervised.tolist() == [bool(m) for m in theirs["assistant_masks"]][: len(ids)]
        assert not any(theirs["assistant_masks"][len(ids) :])


@pytest.mark.parametrize("style", ["llama3", "gemma", "mistral", "qwen3", "base"])
def test_fm02_the_real_eos_is_labelled_although_pad_is_eos(
    style: str, tokenizer_of: Callable[[str], Any], section: Callable[..., Any]
) -> None:
    tokenizer = tokenizer_of(style)
    tokenizer.pad_token = tokenizer.eos_token
    data = section([TWO_TURNS], template="alpaca" if style == "base" else "auto")
    prepared, template = prepare(tokenizer, data)
    for index in range(len(prepared.train)):
        ids, supervised = prepared.train[index]
        stop = template.stop_token_ids[0]
        assert ids[-1] == stop and supervised[-1]
    if style != "llama3" and style != "gemma":
        assert template.stop_token_ids[0] == tokenizer.pad_token_id


def test_rewritten_earlier_turns_give_one_sample_per_turn(
    tokenizer_of: Callable[[str], Any], section: Callable[..., Any]
) -> None:
    tokenizer = tokenizer_of("qwen3")
    row = chat("hello", "<think>\nk\n</think>\n\nk", QUESTION, "<think>\none\n</think>\n\nParis.")
    prepared, _ = prepare(tokenizer, section([row]))
    assert prepared.ledger.sources[0].rows_one_sample_per_turn == 1
    texts = [tokenizer.decode(ids[mask]) for ids, mask in map(prepared.train.__getitem__, range(2))]
    assert texts == ["<think>\nk\n</think>\n\nk<|im_end|>", "<think>\none\n</think>\n\nParis.<|im_end|>"]
    for index, end in enumerate((1, 3)):
        ids, mask = prepared.train[index]
        prompt = tokenizer.apply_chat_template(row["messages"][:end], add_generation_prompt=True, return_dict=False)
        assert ids[: int(np.argmax(mask))].tolist() == prompt


def test_a_token_across_the_border_is_taken_apart(
    tokenizer_of: Callable[[str], Any], section: Callable[..., Any]
) -> None:
    tokenizer = tokenizer_of("base")
    row = {"instruction": "hello", "input": "", "output": "\n\nParis."}
    prepared, _ = prepare(tokenizer, section([row], template="alpaca"))
    assert prepared.ledger.sources[0].rows_encoded_in_parts == 1
    ids, mask = prepared.train[0]
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hello"}], add_generation_prompt=True, return_dict=False
    )
    assert ids[: len(prompt)].tolist() == prompt and not mask[: len(prompt)].any()
    assert tokenizer.decode(ids[mask]) == "\n\nParis.</s>"


@pytest.mark.parametrize("answer", ["k", "d", "end"])  # two of them lie in the terminator
def test_a_prompt_beyond_what_turns_open_with_is_kept(
    answer: str, tokenizer_of: Callable[[str], Any], section: Callable[..., Any]
) -> None:
    tokenizer = tokenizer_of("qwen3")
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
    )
    prepared, _ = prepare(tokenizer, section([chat("hello", answer)]))
    ids, mask = prepared.train[0]
    prompt = "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n<think>\n"
    assert tokenizer.decode(ids) == f"{prompt}{answer}<|im_end|>"
    assert tokenizer.decode(ids[mask]) == f"{answer}<|im_end|>"


def test_a_turn_that_does_not_open_with_its_prompt_is_rejected(
    tokenizer_of: Callable[[str], Any], section: Callable[..., Any]
) -> None:
    tokenizer = tokenizer_of("qwen3")
    tokenizer.chat_template = (
        "{% if messages and messages[0]['role'] != 'system' %}"
        "<|im_start|>system\nBe kind<|im_end|>\n{% endif %}"
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    opens = {"messages": [{"role": "assistant", "content": "hello"}, *chat("one", "two")["messages"]]}
    with pytest.raises(DataError, match=r"rows.jsonl:1: the template does not open this assistant turn"):
        prepare(tokenizer, section([opens]))
    prepared, _ = prepare(tokenizer, section([opens], train_on="last_assistant"))
    ids, mask = prepared.train[0]
    assert tokenizer.decode(ids[mask]) == "two<|im_end|>"


@pytest.mark.parametrize(
    ("train_on", "expected"),
    [
        ("last_assistant", "The capital is\n\nParis.<|eot_id|>"),
        ("all_assistant", "good morning<|eot_id|>The capital is\n\nParis.<|eot_id|>"),
    ],
)
def test_train_on(
    train_on: str, expected: str, tokenizer_of: Callable[[str], Any], section: Callable[..., Any]
) -> None:
    tokenizer = tokenizer_of("llama3")
    prepared, _ = prepare(tokenizer, section([TWO_TURNS], train_on=train_on))
    ids, mask = prepared.train[0]
    assert tokenizer.decode(ids[mask]) == expected


def test_train_on_everything(tokenizer_of: Callable[[str], Any], section: Callable[..., Any]) -> None:
    prepared, _ = prepare(tokenizer_of("llama3"), section([TWO_TURNS], train_on="everything"))
    ids, mask = prepared.train[0]
    assert mask.all()
    assert prepared.train.num_supervised.tolist() == [len(ids) - 1]


def weighted(*weights: int) -> dict[str, Any]:
    row = chat("hello", "one", "good", "two", "world", "three")
    for turn, weight in zip(row["messages"][1::2], weights, strict=True):
        turn["weight"] = weight
    return row


@pytest.mark.parametrize(
    ("weights", "train_on", "expected"),
    [
        ((1, 0, 1), "all_assistant", "one<|eot_id|>three<|eot_id|>"),
        ((0, 1, 0), "all_assistant", "two<|eot_id|>"),
        ((0, 0, 1), "last_assistant", "three<|eot_id|>"),
    ],
)
def test_a_turn_of_weight_0_is_context(
    weights: tuple[int, ...],
    train_on: str,
    expected: str,
    tokenizer_of: Callable[[str], Any],
    section: Callable[..., Any],
) -> None:
    tokenizer = tokenizer_of("llama3")
    loop = "{%- for message in messages %}"
    tokenizer.chat_template = tokenizer.chat_template.replace(loop, loop + "{{- message['weight'] }}")
    data = section([weighted(*weights)], train_on=train_on)
    prepared, template = prepare(tokenizer, data)
    ids, mask = prepared.train[0]
    assert tokenizer.decode(ids[mask]) == expected
    assert "0" not in tokenizer.decode(ids)
    (row,) = prepare_rows(data.sources[0], data, tokenizer, template)
    assert expected.endswith(f"{row.expected}<|eot_id|>")
    assert "0" not in tokenizer.decode(encode_prompt(tokenizer, template, row.messages))


def test_a_row_of_weights_0_has_no_label(tokenizer_of: Callable[[str], Any], section: Callable[..., Any]) -> None:
    rows = [
        weighted(0, 0, 0),
        weighted(1, 1, 0),
        weighted(1, 1, 1),
        chat("hello", "one", "good", "two", "world", "three"),
    ]
    prepared, _ = prepare(tokenizer_of("llama3"), section(rows))
    assert prepared.ledger.sources[0].dropped == {"no label": 1} and prepared.ledger.duplicate_rows == 1
    prepared, _ = prepare(tokenizer_of("llama3"), section(rows, train_on="last_assistant"))
    assert prepared.ledger.sources[0].dropped == {"no label": 2}
    with pytest.raises(DataError, match=r"rows.jsonl:1: a turn has weight 0, and data.train_on is everything"):
        prepare(tokenizer_of("llama3"), section(rows, train_on="everything"))


def test_fm10_over_long_rows_are_counted_and_dropped(
    tokenizer_of: Callable[[str], Any], section: Callable[..., Any]
) -> None:
    rows = [chat("hello", "hi"), chat("hello " * 50, "hi"), chat("hello", "one two " * 50)]
    data = section(rows, max_seq_len=40, max_over_length_share=0.9)
    prepared, _ = prepare(tokenizer_of("llama3"), data)
    account = prepared.ledger.sources[0]
    assert len(prepared.train) == 1
    assert account.dropped == {"over length": 2} and account.rows_over_length == 2
    assert [row.origin.rsplit(":", 1)[1] for row in prepared.ledger.rejected] == ["2", "3"]
    with pytest.raises(DataError, match=r"2 of 3 rows \(66\.7%\).*max_over_length_share.*max_seq_len"):
        prepare(tokenizer_of("llama3"), section(rows, max_seq_len=40))
    with pytest.raises(DataError, match=r"rows.jsonl:2: \d+ tokens"):
        prepare(tokenizer_of("llama3"), section(rows, max_seq_len=40, over_length="error"))


def test_fm10_truncation_keeps_the_beginning_and_drops_what_lost_its_answer(
    tokenizer_of: Callable[[str], Any], section: Callable[..., Any]
) -> None:
    rows = [chat("hello", "one two " * 50), chat("hello " * 50, "hi")]
    data = section(rows, max_seq_len=40, over_length="truncate", max_over_length_share=1.0)
    prepared, _ = prepare(tokenizer_of("llama3"), data)
    account = prepared.ledger.sources[0]
    assert account.rows_truncated == 1 and account.dropped == {"no label": 1}
    assert prepared.train.lengths.tolist() == [40]
    assert prepared.train[0][1].any()


def test_fm10_a_wholly_masked_data_set_is_an_error(
    tokenizer_of: Callable[[str], Any], section: Callable[..., Any]
) -> None:
    data = section([chat("hello " * 50, "hi")], max_seq_len=20, over_length="truncate", max_over_length_share=1.0)
    with pytest.raises(DataError, match="nothing to learn"):
        prepare(tokenizer_of("llama3"), data)


def test_text_is_split_and_every_token_is_predicted_once(
    tokenizer_of: Callable[[str], Any], section: Callable[..., Any]
) -> None:
    tokenizer = tokenizer_of("base")
    text = "The capital of France is Paris. " * 9
    prepared, _ = prepare(tokenizer, section([{"text": text}], source={"format": "text"}, max_seq_len=16))
    whole = [*tokenizer(text).input_ids, tokenizer.eos_token_id]
    assert whole[0] == tokenizer.bos_token_id
    targets: list[int] = []
    for index in range(len(prepared.train)):
        ids, mask = prepared.train[index]
        assert len(ids) <= 16
        targets.extend(ids[1:][mask[1:]].tolist())
    assert targets == whole[1:]
    assert prepared.train.num_supervised.sum() == len(whole) - 1
    assert prepared.ledger.sources[0].rows_split == 1


@pytest.mark.parametrize("style", ["base", "gpt2"])
def test_text_gets_no_second_bos_and_eos(
    style: str, tokenizer_of: Callable[[str], Any], section: Callable[..., Any]
) -> None:
    tokenizer = tokenizer_of(style)
    bos, eos = tokenizer.bos_token or "", tokenizer.eos_token
    rows = [{"text": text} for text in (f"{bos}hello{eos}", "hello", f"{bos}hello", f"hello{eos}", f"hello{eos}\n")]
    prepared, _ = prepare(tokenizer, section(rows, source={"format": "text"}))
    texts = [tokenizer.decode(prepared.train[index][0]) for index in range(len(rows))]
    assert texts == [f"{bos}hello{eos}"] * 4 + [f"{bos}hello{eos}\n{eos}"]


@pytest.mark.parametrize("style", ["llama3", "gemma", "mistral", "qwen3", "base"])
def test_fm12_training_prefix_is_the_saved_tokenizers_prompt(
    style: str, tokenizer_of: Callable[[str], Any], section: Callable[..., Any], tmp_path: Path
) -> None:
    rows = [TWO_TURNS, chat(QUESTION, "\n\n Paris"), chat(" one \n", " two")]
    data = section(rows, template="alpaca" if style == "base" else "auto", train_on="last_assistant")
    tokenizer = tokenizer_of(style)
    prepared, _ = prepare(tokenizer, data)
    tokenizer.save_pretrained(tmp_path / "adapter")
    served = AutoTokenizer.from_pretrained(tmp_path / "adapter")
    for index, row in enumerate(rows):
        ids, mask = prepared.train[index]
        prompt = served.apply_chat_template(row["messages"][:-1], add_generation_prompt=True, return_dict=False)
        assert ids[: int(np.argmax(mask))].tolist() == prompt
        if served.bos_token_id is not None:
            assert ids.tolist().count(served.bos_token_id) == 1 and ids[0] == served.bos_token_id
