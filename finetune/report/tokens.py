"""The rows of a forward pass as people read them: tokens with their text, in segments that share prefixes or do not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any, Literal

import numpy as np

from finetune.data.batches import round_up, row_length
from finetune.data.dataset import TokenDataset
from finetune.data.packing import PackedRow

_BROKEN = "\ufffd"
# A UTF-8 character has four bytes, so no more byte tokens than these make one up.
_MAX_PARTS = 4


@dataclass(frozen=True)
class Token:
    """One token of a row."""

    id: int
    text: str
    position: int
    """Position id that the model gets."""
    supervised: bool
    special: bool


@dataclass(frozen=True)
class Segment:
    """Tokens of one sample, or of a prefix that several share, or of the padding at a row's end."""

    kind: Literal["sample", "prefix", "padding"]
    tokens: list[Token]
    origin: str = ""
    """`path/to/file.jsonl:12` of a sample."""
    number: int = 0
    """1-based, of the samples of the row."""
    in_group: bool = False
    """Whether a sample goes on from the prefix above it."""
    shared_by: int = 0
    """Samples that go on from a prefix."""

    @property
    def num_supervised(self) -> int:
        """Tokens that carry loss."""
        return sum(token.supervised for token in self.tokens)

    @property
    def heading(self) -> str:
        """What the segment is, in a line."""
        length = f"{len(self.tokens):,} tokens"
        if self.kind == "padding":
            return f"padding, {length}"
        if self.kind == "prefix":
            return f"shared prefix, {length}, computed once for {self.shared_by} samples"
        first, last = self.tokens[0].position, self.tokens[-1].position
        goes_on = f", goes on at position {first:,}" if self.in_group else f", positions {first:,} to {last:,}"
        return (
            f"sample {self.number}, {short_origin(self.origin)}, {length}, {self.num_supervised:,} supervised{goes_on}"
        )


@dataclass(frozen=True)
class RowView:
    """One row of a forward pass."""

    number: int
    """1-based, in the order of training."""
    step: int
    """1-based optimizer step."""
    segments: list[Segment] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        """Tokens that are computed, padding included."""
        return sum(len(segment.tokens) for segment in self.segments)

    @property
    def heading(self) -> str:
        """What the row is, in a line."""
        samples = [segment for segment in self.segments if segment.kind == "sample"]
        supervised = sum(segment.num_supervised for segment in samples)
        prefixes = [segment for segment in self.segments if segment.kind == "prefix"]
        saved = sum(len(segment.tokens) * (segment.shared_by - 1) for segment in prefixes)
        padding = sum(len(segment.tokens) for segment in self.segments if segment.kind == "padding")
        parts = [
            f"{len(samples)} sample{'s' if len(samples) != 1 else ''}",
            f"{self.num_tokens:,} tokens",
            f"{supervised:,} supervised",
        ]
        parts += [f"{saved:,} saved by shared prefixes"] if saved else []
        parts += [f"{padding:,} padding"] if padding else []
        return f"row {self.number:,}, step {self.step:,}: " + ", ".join(parts)


def short_origin(origin: str) -> str:
    """A row's file, its folder and its line: enough to tell sources apart."""
    return "/".join(PurePath(origin).parts[-2:])


class TokenTexts:
    """The text of single tokens as they stand within a text."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._special = set(tokenizer.all_special_ids)
        added = getattr(tokenizer, "added_tokens_decoder", {})
        self._special.update(number for number, token in added.items() if getattr(token, "special", False))
        self._known: dict[int, str] = {}

    def is_special(self, token_id: int) -> bool:
        """Whether the template or the model gives the token a meaning of its own."""
        return token_id in self._special

    def of(self, ids: Sequence[int]) -> list[str]:
        """One text a token; of a character that several tokens make up, the first has it and the others are empty."""
        texts: list[str] = []
        while len(texts) < len(ids):
            start = len(texts)
            text = self._single(ids[start])
            texts.append(text)
            if _BROKEN not in text:
                continue
            for count in range(2, _MAX_PARTS + 1):
                joined = self._decode(ids[start : start + count])
                if _BROKEN not in joined and start + count <= len(ids):
                    texts[start:] = [joined, *[""] * (count - 1)]
                    break
        return texts

    def _single(self, token_id: int) -> str:
        if token_id not in self._known:
            # Alone, a tokenizer may swallow a token's leading space: the second of two shows it.
            once, twice = self._decode([token_id]), self._decode([token_id, token_id])
            self._known[token_id] = twice[len(once) :]
        return self._known[token_id]

    def _decode(self, ids: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text


def packed_row(dataset: TokenDataset, row: PackedRow, texts: TokenTexts, pad_id: int, multiple: int) -> list[Segment]:
    """The segments of a packed row: samples for themselves, and prefixes with the samples that go on from them.

    `multiple` is what training pads rows to: `data.row_multiple`.
    """
    segments: list[Segment] = []
    number = 0
    for group in row.groups:
        prefix = group.prefix_len
        if prefix:
            tokens = _tokens(*dataset[group.samples[0]], texts)[:prefix]
            segments.append(Segment("prefix", tokens, shared_by=len(group.samples)))
        for sample in group.samples:
            number += 1
            tokens = _tokens(*dataset[sample], texts)[prefix:]
            segments.append(Segment("sample", tokens, dataset.origin(sample), number, in_group=prefix > 0))
    return segments + _padding(row_length(row.num_tokens, multiple) - row.num_tokens, pad_id, texts)


def padded_rows(dataset: TokenDataset, samples: Sequence[int], texts: TokenTexts, pad_id: int) -> list[list[Segment]]:
    """The rows of a right-padded batch: one sample and its padding each."""
    width = round_up(max(int(dataset.lengths[sample]) for sample in samples))
    rows = []
    for sample in samples:
        tokens = _tokens(*dataset[sample], texts)
        padding = _padding(width - len(tokens), pad_id, texts, start=len(tokens))
        rows.append([Segment("sample", tokens, dataset.origin(sample), 1), *padding])
    return rows


def _tokens(input_ids: np.ndarray, supervised: np.ndarray, texts: TokenTexts) -> list[Token]:
    ids = input_ids.tolist()
    # Nothing predicts a sample's first token.
    carries = [False, *supervised[1:].tolist()]
    return [
        Token(token_id, text, position, flag, texts.is_special(token_id))
        for position, (token_id, text, flag) in enumerate(zip(ids, texts.of(ids), carries, strict=True))
    ]


def _padding(count: int, pad_id: int, texts: TokenTexts, start: int = 0) -> list[Segment]:
    if count <= 0:
        return []
    text = texts.of([pad_id])[0]
    return [Segment("padding", [Token(pad_id, text, start + index, False, True) for index in range(count)])]
