"""A tokenizer's files as other programs read them: many still run transformers 4, such as TGI and older vLLM."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

TOKENIZER_CONFIG = "tokenizer_config.json"

# Arguments of the call that loaded the tokenizer.
_STRAYS = ("backend", "is_local", "local_files_only")


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Write a tokenizer, its chat template both as a file of its own and where older programs look for it."""
    tokenizer.save_pretrained(folder)
    path = folder / TOKENIZER_CONFIG
    values = json.loads(path.read_text(encoding="utf-8"))
    if tokenizer.chat_template:
        values.setdefault("chat_template", tokenizer.chat_template)
    path.write_text(tokenizer_config_text(values), encoding="utf-8")


def tokenizer_config_text(values: dict[str, Any]) -> str:
    """A tokenizer_config.json in names that transformers 4 knows; transformers 5 reads the same tokenizer from it.

    Source: `PreTrainedTokenizerBase.__init__` and `_from_pretrained` of transformers 4.57 and 5.
    """
    values = {name: value for name, value in values.items() if name not in _STRAYS}
    if values.get("tokenizer_class") == "TokenizersBackend":
        values["tokenizer_class"] = "PreTrainedTokenizerFast"
    named = values.pop("model_specific_special_tokens", None) or {}
    extra = values.pop("extra_special_tokens", None)
    if isinstance(extra, list):
        values["additional_special_tokens"] = extra
    elif extra:
        named = {**extra, **named}
    if named:  # such as Gemma 3's image_token; a list under this name is what transformers 4 fails on
        values["extra_special_tokens"] = named
    return json.dumps(values, indent=2, ensure_ascii=False) + "\n"
