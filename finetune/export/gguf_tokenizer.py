"""A tokenizer as llama.cpp reads it from a GGUF file: byte-level BPE (its `gpt2`) or SentencePiece's BPE (`llama`).

llama.cpp splits text by rules that it knows by name, so the tokenizer's own rules are matched with that name;
rules that match none are refused, since another split would give other tokens than those trained on.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gguf import GGUFWriter, TokenType

from finetune.errors import ModelError

_REMEDY = "serve the merged model (finetune merge RUN) with vLLM or transformers instead"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = _CONTRACTIONS + _WORDS + r"\p{N}{1,3}" + _REST
_QWEN2 = _CONTRACTIONS + _WORDS + r"\p{N}" + _REST
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_OPENING = r"[^\r\n\p{L}\p{N}]?"
_TEKKEN = (
    f"{_OPENING}{_UPPER}*{_LOWER}+|{_OPENING}{_UPPER}+{_LOWER}*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# (the steps of tokenizer.json's pre_tokenizer, ignore_merges) to llama.cpp's name of the same split.
# Source: llama.cpp, src/llama-vocab.cpp, the expressions of `llm_tokenizer_bpe`.
PRE_TOKENIZERS: dict[tuple[tuple[str, ...], bool], str] = {
    (("ByteLevel words",), False): "gpt-2",
    (("Digits one by one", "ByteLevel words"), False): "smollm",
    ((_LLAMA3, "ByteLevel"), True): "llama-bpe",
    ((_LLAMA3, "ByteLevel"), False): "smaug-bpe",
    ((_QWEN2, "ByteLevel"), False): "qwen2",
    ((_TEKKEN, "ByteLevel"), True): "tekken",
    (("Punctuation Contiguous", "ByteLevel words", "Digits", "[0-9][0-9][0-9]"), False): "falcon",
}
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_LOOKS_SPECIAL = re.compile(r"<\|.*\|>")
_SPACE = "▁"
# A file's names of the tokens that end a turn, as many as it has; llama.cpp tells the usual others by their text.
END_OF_TURN = ("eos", "eot", "eom")
_UNMERGED = -1e9  # score of a piece that no merge makes


@dataclass(frozen=True)
class Special:
    """Special tokens: their ids by use (bos, eos, eot, eom, unk, pad), and which are added to plain text."""

    ids: dict[str, int]
    add_bos: bool
    add_eos: bool


@dataclass(frozen=True)
class Vocabulary:
    """What a GGUF file says about the tokenizer."""

    model: str  # gpt2 or llama
    pre: str
    tokens: list[str]
    types: list[int]
    special: Special
    merges: list[str] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    add_space_prefix: bool = False
    chat_template: str | None = None


def read_vocabulary(folder: Path, num_rows: int) -> Vocabulary:
    """The tokenizer of a model's directory, one token for each of the embedding's `num_rows` rows.

    Raises:
        ModelError: llama.cpp has no such tokenizer, or it has more tokens than rows.
    """
    tokenizer = load_tokenizer(folder)
    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    if parts["model"]["type"] != "BPE":
        raise ModelError(f"{folder}: a {parts['model']['type']} tokenizer cannot be written as GGUF yet; {_REMEDY}")
    tokens, types = _list_tokens(tokenizer, parts, num_rows, folder)
    common: dict[str, Any] = {
        "tokens": tokens,
        "types": types,
        "special": read_special(folder, tokenizer),
        "chat_template": _template(tokenizer),
    }
    merges = [tuple(merge.split(" ") if isinstance(merge, str) else merge) for merge in parts["model"]["merges"]]
    if parts["model"].get("byte_fallback"):
        prefix = _adds_space(parts)
        return Vocabulary("llama", "default", scores=_scores(tokens, merges), add_space_prefix=prefix, **common)
    return Vocabulary("gpt2", pre_tokenizer_name(parts), merges=[" ".join(pair) for pair in merges], **common)


def add_vocabulary(writer: GGUFWriter, vocabulary: Vocabulary) -> None:
    """Add the tokenizer's keys to a file."""
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    if vocabulary.scores:
        writer.add_token_scores(vocabulary.scores)
    if vocabulary.merges:
        writer.add_token_merges(vocabulary.merges)
    for name, token_id in vocabulary.special.ids.items():
        getattr(writer, f"add_{name}_token_id")(token_id)
    writer.add_add_bos_token(vocabulary.special.add_bos)
    writer.add_add_eos_token(vocabulary.special.add_eos)
    writer.add_add_space_prefix(vocabulary.add_space_prefix)
    if vocabulary.chat_template is not None:
        writer.add_chat_template(vocabulary.chat_template)


def pre_tokenizer_name(parts: dict[str, Any]) -> str:
    """llama.cpp's name for the split of a byte-level tokenizer.json.

    Raises:
        ModelError: it knows no such split.
    """
    normalizer = (parts.get("normalizer") or {}).get("type")
    steps = _steps(parts.get("pre_tokenizer"))
    # llama.cpp normalizes nothing; NFC changes only text that is not composed yet.
    found = PRE_TOKENIZERS.get((steps, bool(parts["model"].get("ignore_merges"))))
    if normalizer not in (None, "NFC") or found is None:
        split = f"{normalizer}, {', '.join(steps)}" if normalizer else ", ".join(steps)
        raise ModelError(f"GGUF: llama.cpp has no name for this tokenizer's split ({split}); {_REMEDY}")
    return found


def _steps(pre_tokenizer: dict[str, Any] | None) -> tuple[str, ...]:
    """Every step of a pre-tokenizer in words."""
    if pre_tokenizer is None:
        return ("none",)
    kind = pre_tokenizer["type"]
    if kind == "Sequence":
        return tuple(step for part in pre_tokenizer["pretokenizers"] for step in _steps(part))
    if kind == "ByteLevel" and not pre_tokenizer.get("add_prefix_space"):
        return ("ByteLevel words" if pre_tokenizer.get("use_regex", True) else "ByteLevel",)
    if kind == "Digits":
        return ("Digits one by one" if pre_tokenizer["individual_digits"] else "Digits",)
    if kind == "Punctuation":
        return (f"Punctuation {pre_tokenizer['behavior']}",)
    if kind == "Split" and pre_tokenizer["behavior"] == "Isolated" and not pre_tokenizer["invert"]:
        return (str(pre_tokenizer["pattern"].get("Regex", pre_tokenizer["pattern"])),)
    return (json.dumps(pre_tokenizer, ensure_ascii=False),)


def load_tokenizer(folder: Path) -> Any:
    """The fast tokenizer of a model's directory.

    Raises:
        ModelError: there is none.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except Exception as error:
        raise ModelError(f"{folder}: cannot load a tokenizer: {error}") from error
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise ModelError(f"{folder}: {type(tokenizer).__name__} has no tokenizer.json; {_REMEDY}")
    return tokenizer


def _list_tokens(tokenizer: Any, parts: dict[str, Any], num_rows: int, folder: Path) -> tuple[list[str], list[int]]:
    by_id = {index: text for text, index in tokenizer.get_vocab().items()}
    added = tokenizer.added_tokens_decoder
    unknown = parts["model"].get("unk_token")
    if max(by_id) >= num_rows:
        raise ModelError(f"{folder}: the tokenizer has {max(by_id) + 1} tokens, the embedding {num_rows} rows")
    tokens, types = [], []
    for index in range(num_rows):
        text = by_id.get(index)
        if text is None:
            kind, text = TokenType.UNUSED, f"[PAD{index}]"
        elif parts["model"].get("byte_fallback") and text == unknown:
            kind = TokenType.UNKNOWN
        elif index in added:
            is_control = added[index].special or _LOOKS_SPECIAL.fullmatch(text)
            kind = TokenType.CONTROL if is_control else TokenType.USER_DEFINED
            text = text if is_control else text.replace(_SPACE, " ")  # llama.cpp looks for it in the plain text
        elif parts["model"].get("byte_fallback") and _BYTE.fullmatch(text):
            kind = TokenType.BYTE
        else:
            kind = TokenType.NORMAL
        tokens.append(text)
        types.append(int(kind))
    return tokens, types


def _scores(tokens: list[str], merges: list[tuple[str, ...]]) -> list[float]:
    """SentencePiece joins the pair whose piece has the highest score; the first merge of a piece gives its rank."""
    ranks: dict[str, float] = {}
    for rank, pair in enumerate(merges):
        ranks.setdefault("".join(pair), -float(rank))
    return [ranks.get(token, _UNMERGED) for token in tokens]


def _adds_space(parts: dict[str, Any]) -> bool:
    """Whether the tokenizer puts a space before the first word; spaces must become U+2581, as in SentencePiece."""
    text = json.dumps([parts.get("normalizer"), parts.get("pre_tokenizer")], ensure_ascii=False)
    if _SPACE not in text:
        raise ModelError(f"GGUF: this tokenizer does not write spaces as SentencePiece does; {_REMEDY}")
    return '"Prepend"' in text or '"prepend_scheme": "first"' in text or '"prepend_scheme": "always"' in text


def read_special(folder: Path, tokenizer: Any) -> Special:
    """The special tokens of a model's directory; the ones that end a turn are the first of its configuration."""
    files = (folder / name for name in ("generation_config.json", "config.json"))
    stops = next((found for file in files if (found := _stop_ids(file))), [tokenizer.eos_token_id])
    ids = {
        "bos": tokenizer.bos_token_id,
        **dict(zip(END_OF_TURN, stops, strict=False)),
        "unk": tokenizer.unk_token_id,
        "pad": tokenizer.pad_token_id,
    }
    sample = list(tokenizer("x").input_ids)
    return Special(
        {name: token_id for name, token_id in ids.items() if token_id is not None},
        add_bos=len(sample) > 1 and sample[0] == tokenizer.bos_token_id,
        add_eos=len(sample) > 1 and sample[-1] == tokenizer.eos_token_id,
    )


def _stop_ids(path: Path) -> list[int]:
    if not path.is_file():
        return []
    found = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
    return [found] if isinstance(found, int) else list(found or [])


def _template(tokenizer: Any) -> str | None:
    template = tokenizer.chat_template
    return template.get("default") if isinstance(template, dict) else template
