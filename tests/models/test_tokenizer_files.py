"""A saved tokenizer: transformers 5 reads the same one again, and nothing in it stops transformers 4."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from finetune.models.tokenizer_files import TOKENIZER_CONFIG, save_tokenizer, tokenizer_config_text
from tests.tiny import CHATML, write_tokenizer

TEXTS = ("the red fox", "<a>the<b>  boats\n<|im_end|> é <image>", "")
EXTRA = ["<a>", "<b>"]


def loaded(folder: Path, **special: Any) -> Any:
    """A tokenizer as a run has it: read from a base's directory."""
    write_tokenizer(folder, template=CHATML)
    PreTrainedTokenizerFast.from_pretrained(folder, **special).save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def reads_a_list_beside_names(folder: Path) -> bool:
    """Of a file as transformers 4 writes it; 5.17 does not, and 5.23 does."""
    write_tokenizer(folder)
    path = folder / TOKENIZER_CONFIG
    values = json.loads(path.read_text(encoding="utf-8"))
    values |= {"additional_special_tokens": EXTRA, "extra_special_tokens": {"image_token": "<image>"}}
    path.write_text(json.dumps(values), encoding="utf-8")
    return bool(AutoTokenizer.from_pretrained(folder).extra_special_tokens == EXTRA)


@pytest.mark.parametrize(
    ("special", "extra", "named"),
    [
        ({}, None, None),
        ({"extra_special_tokens": EXTRA}, EXTRA, None),
        ({"image_token": "<image>"}, None, {"image_token": "<image>"}),
        ({"extra_special_tokens": EXTRA, "image_token": "<image>"}, EXTRA, {"image_token": "<image>"}),
    ],
)
def test_the_same_tokenizer_comes_back(
    tmp_path: Path, special: dict[str, Any], extra: list[str] | None, named: dict[str, str] | None
) -> None:
    tokenizer = loaded(tmp_path / "base", **special)
    save_tokenizer(tokenizer, tmp_path)
    values = json.loads((tmp_path / TOKENIZER_CONFIG).read_text(encoding="utf-8"))
    assert values["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert (values.get("additional_special_tokens"), values.get("extra_special_tokens")) == (extra, named)
    assert values["chat_template"] == CHATML
    assert not {"backend", "is_local", "local_files_only", "model_specific_special_tokens"} & values.keys()

    again = AutoTokenizer.from_pretrained(tmp_path)
    assert type(again) is type(tokenizer)
    assert [again(text).input_ids for text in TEXTS] == [tokenizer(text).input_ids for text in TEXTS]
    assert again.get_vocab() == tokenizer.get_vocab()
    assert again.special_tokens_map == tokenizer.special_tokens_map
    assert again.chat_template == tokenizer.chat_template
    # What is written of it once more, as by a push of a run that an earlier version made, is the same again.
    assert tokenizer_config_text(values) == (tmp_path / TOKENIZER_CONFIG).read_text(encoding="utf-8")
    if extra and named and not reads_a_list_beside_names(tmp_path / "probe"):
        pytest.skip("this transformers forgets a list of special tokens beside named ones")
    assert again.all_special_tokens == tokenizer.all_special_tokens
    assert again.extra_special_tokens == tokenizer.extra_special_tokens == (extra or [])


def test_a_class_that_both_know_keeps_its_name() -> None:
    assert json.loads(tokenizer_config_text({"tokenizer_class": "GemmaTokenizer"}))["tokenizer_class"] == (
        "GemmaTokenizer"
    )
