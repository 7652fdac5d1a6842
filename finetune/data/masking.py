"""Rows to samples: render, tokenize once, and say which tokens are the assistant's.

A turn's text lies between the rendered prompt (`add_generation_prompt=True`) and the end of its terminator.
Where a template rewrites earlier turns, or a token would straddle the border, each turn becomes a sample of
its own, whose prompt is, id for id, the prompt that a server would send.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from finetune.data.formats import (
    FORMATS,
    Conversation,
    Message,
    RowError,
    Tools,
    digest_of,
    is_trained,
    parse_conversation,
)
from finetune.data.ledger import SPLIT, TRUNCATED, WHOLE
from finetune.data.sources import RawRow
from finetune.data.template import apply_system, check_shown, hidden_keys, render, token_pattern
from finetune.errors import DataError

MALFORMED = "malformed"
OVER_LENGTH = "over length"
NO_LABEL = "no label"

_MAX_KNOWN_SECTIONS = 10_000


class Rejected(NamedTuple):
    """A row, or a turn of it, that gives no sample."""

    file: int
    number: int
    kind: str
    reason: str


class Turn(NamedTuple):
    """A rendered conversation up to an assistant turn's terminator; the turn itself is `text[start:]`."""

    text: str
    start: int


class Sample(NamedTuple):
    """Tokens of one sample, before its length is looked at."""

    ids: list[int]
    spans: list[tuple[int, int]]
    """Supervised tokens, as index ranges."""


@dataclass
class Chunk:
    """What a batch of raw rows became; arrays are concatenated over its samples."""

    ids: np.ndarray
    supervised: np.ndarray
    lengths: np.ndarray
    row_of_sample: np.ndarray
    """int32 [num_samples]: index among the chunk's kept rows."""
    origins: np.ndarray
    """int32 [num_rows, 2]: file and number of each kept row."""
    hashes: np.ndarray
    """uint64 [num_rows]: the content of each kept row."""
    fates: np.ndarray
    """uint8 [num_rows]: what became of each kept row: WHOLE, TRUNCATED or SPLIT."""
    full_lengths: np.ndarray
    """int32: tokens of every sample before it was cut, split or dropped."""
    rejected: list[Rejected]
    counts: Counter[str]


@dataclass
class Pending:
    """A usable row on its way through the batch."""

    raw: RawRow
    digest: int
    turns: list[Turn] = field(default_factory=list)
    """One text with several turns inside, or one text per turn."""
    starts: list[int] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)
    text: str | None = None
    """Text that is supervised whole."""
    is_plain: bool = False
    """True for the text format: BOS and EOS are added, and long text is split."""
    samples: list[Sample] = field(default_factory=list)


@dataclass
class Encoder:
    """Everything that turns raw rows into samples; pickled once to every worker."""

    rust: Any
    source: str
    special_tokens: dict[str, Any]
    added: dict[str, int]
    tail: str
    terminator: str
    system_role: bool
    bos_id: int | None
    """Set where the tokenizer opens plain text with BOS."""
    eos_id: int | None
    format: str
    columns: dict[str, str]
    system: str | None
    train_on: str
    max_seq_len: int
    over_length: str
    known_sections: dict[str, list[int]] = field(default_factory=dict)

    @cached_property
    def pattern(self) -> Any:
        """Finds the tokens that no other token can reach across."""
        return token_pattern(self.added) if self.added else None

    def encode(self, rows: list[RawRow]) -> Chunk:
        """Render, tokenize and mask `rows`; bad ones are listed, never raised."""
        counts: Counter[str] = Counter(rows_read=len(rows))
        rejected: list[Rejected] = []
        pending: list[Pending] = []
        for raw in rows:
            try:
                pending.append(self.render_row(raw, counts))
            except (RowError, DataError) as error:
                kind = NO_LABEL if isinstance(error, NoAssistantTurn) else MALFORMED
                rejected.append(Rejected(raw.file, raw.number, kind, str(error)))
                counts[f"dropped {kind}"] += 1
        self._tokenize(pending, counts)
        return self._assemble(pending, rejected, counts)

    def conversation(self, raw: RawRow) -> Conversation:
        """The row's messages, with the default system prompt, and its tools.

        Raises:
            RowError: the row cannot be used.
        """
        row = parse_conversation(raw.payload, FORMATS[self.format], self.columns)
        if self.format == "text":
            return row
        return row._replace(messages=apply_system(row.messages, self.system, self.system_role))

    def render_row(self, raw: RawRow, counts: Counter[str]) -> Pending:
        """The row's texts and where the assistant's turns lie in them.

        Raises:
            RowError: the row or what the template makes of it cannot be used.
        """
        conversation = self.conversation(raw)
        messages, tools = conversation
        pending = Pending(raw, digest_of(conversation))
        counts.update(f"hidden {key}" for key in hidden_keys(self.source, conversation))
        if self.format == "text":
            pending.text, pending.is_plain = messages[0]["content"], True
            return pending
        if self.train_on == "everything":
            if any("weight" in message for message in messages):
                raise RowError("a turn has weight 0, and data.train_on is everything; set it to all_assistant")
            pending.text = self._render(messages, tools, prompt=False)
            return pending
        at = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        if not at:
            raise NoAssistantTurn("the conversation has no assistant turn to train on")
        meant = at if self.train_on == "all_assistant" else at[-1:]
        wanted = [index for index in meant if is_trained(messages[index])]
        if not wanted:
            raise NoAssistantTurn(f"every assistant turn that data.train_on ({self.train_on}) means has weight 0")
        turns = [self.render_turn(messages[: index + 1], tools) for index in wanted]
        for index, turn in zip(wanted, turns, strict=True):
            check_shown(turn.text[turn.start :].removesuffix(self.terminator), messages[index])
        last = turns[-1]
        if all(last.text.startswith(turn.text) for turn in turns):
            pending.turns = [last]
            pending.starts = [turn.start for turn in turns]
            pending.ends = [len(turn.text) for turn in turns]
        else:  # the template rewrites earlier turns (Qwen3 drops their <think>)
            counts["rows_one_sample_per_turn"] += 1
            pending.turns = turns
        return pending

    def _render(self, messages: list[Message], tools: Tools, *, prompt: bool) -> str:
        return render(self.source, self.special_tokens, messages, tools, add_generation_prompt=prompt)

    def render_turn(self, messages: list[Message], tools: Tools) -> Turn:
        """The conversation up to the terminator of its last, assistant, turn."""
        prompt = self._render(messages[:-1], tools, prompt=True)
        text = self._render(messages, tools, prompt=False)
        if not text.startswith(prompt):
            return self._join_prompt(prompt, text, messages[-1])
        return Turn(text[: self._turn_end(text, len(prompt))], len(prompt))

    def _join_prompt(self, prompt: str, text: str, message: Message) -> Turn:
        """The serving prompt and the answer, where the prompt goes on beyond what the turn opens with.

        DeepSeek-R1's prompt ends in `<think>`, which its turns lack. Anything less plain is refused.
        """
        content = str(message.get("content", "")).strip()
        # Before the terminator, which may hold a short answer: `d` lies in `<|im_end|>`.
        at = text.removesuffix(self.tail).rfind(content) if content else -1
        if at < 0 or not prompt.startswith(text[:at].rstrip()):
            raise RowError("the template does not open this assistant turn with its own generation prompt")
        return Turn(prompt + text[at : self._turn_end(text, at)], len(prompt))

    def _turn_end(self, text: str, start: int) -> int:
        """Where the terminator ends: what follows it (a newline, often) is not the assistant's."""
        tail_at = len(text) - len(self.tail)
        if tail_at >= start and text.endswith(self.tail):
            return text.index(self.terminator, tail_at) + len(self.terminator)
        # a turn of another kind, such as a tool call, may end with a token of its own
        found = list(self.pattern.finditer(text, start)) if self.pattern else []
        if not found or text[found[-1].end() :].strip():
            raise RowError("the template ends this assistant turn with no special token")
        return int(found[-1].end())

    def _tokenize(self, pending: list[Pending], counts: Counter[str]) -> None:
        """Fill in every row's samples."""
        jobs: list[tuple[Pending, str, list[int], list[int]]] = []
        for row in pending:
            if row.text is not None:
                jobs.append((row, row.text, [], []))
            elif row.starts:
                jobs.append((row, row.turns[0].text, row.starts, row.ends))
            else:
                jobs.extend((row, turn.text, [turn.start], [len(turn.text)]) for turn in row.turns)
        encodings = self._encode_batch([text for _, text, _, _ in jobs])
        barriers = [[self._barrier(text, start) for start in starts] for _, text, starts, _ in jobs]
        self._learn_sections(
            [
                text[barrier:start]
                for (_, text, starts, _), found in zip(jobs, barriers, strict=True)
                for start, barrier in zip(starts, found, strict=True)
            ]
        )
        for (row, text, starts, ends), encoding, found in zip(jobs, encodings, barriers, strict=True):
            ids = encoding.ids
            if row.text is not None:
                row.samples.append(self._whole_sample(row, ids))
                continue
            spans = self._token_spans(text, encoding, ids, starts, ends, found)
            if spans is not None:
                row.samples.append(Sample(ids, spans))
            else:
                counts["rows_encoded_in_parts"] += 1
                row.samples.extend(
                    self._encode_apart(text[:end], start) for start, end in zip(starts, ends, strict=True)
                )

    def _encode_batch(self, texts: list[str]) -> list[Any]:
        return list(self.rust.encode_batch(texts, add_special_tokens=False)) if texts else []

    def _barrier(self, text: str, start: int) -> int:
        """Where the last added token before `start` begins: no token reaches across it."""
        begin = 0
        if self.pattern is not None:
            for found in self.pattern.finditer(text, 0, start):
                begin = found.start()
        return begin

    def _learn_sections(self, sections: list[str]) -> None:
        """Tokenize the stretches between barriers and turns; with most templates they are all alike."""
        if len(self.known_sections) > _MAX_KNOWN_SECTIONS:
            self.known_sections.clear()
        unknown = list(dict.fromkeys(section for section in sections if section not in self.known_sections))
        for section, encoding in zip(unknown, self._encode_batch(unknown), strict=True):
            self.known_sections[section] = encoding.ids

    def _token_spans(
        self,
        text: str,
        encoding: Any,
        ids: list[int],
        starts: list[int],
        ends: list[int],
        barriers: list[int],
    ) -> list[tuple[int, int]] | None:
        """Token ranges of the turns, or None where a prompt's ids are not a prefix of the whole's."""
        spans = []
        for start, end, barrier in zip(starts, ends, barriers, strict=True):
            section = self.known_sections[text[barrier:start]]
            first = 0 if barrier == 0 else encoding.char_to_token(barrier)
            last = encoding.char_to_token(end - 1)
            if first is None or last is None or (not section and start > barrier):
                return None
            border = first + len(section)
            if ids[first:border] != section or border > last:
                return None
            spans.append((border, last + 1))
        return spans

    def _encode_apart(self, text: str, start: int) -> Sample:
        """Prompt and turn tokenized apart, so that the prompt's ids are the server's."""
        prompt = self.rust.encode(text[:start], add_special_tokens=False).ids
        # behind a token, so that a tokenizer that puts a space before the first word does not put one here
        behind = self.rust.encode(self.terminator, add_special_tokens=False).ids
        turn = self.rust.encode(self.terminator + text[start:], add_special_tokens=False).ids[len(behind) :]
        return Sample(prompt + turn, [(len(prompt), len(prompt) + len(turn))])

    def _whole_sample(self, row: Pending, ids: list[int]) -> Sample:
        if row.is_plain:
            # text that was rendered before it came here may hold both
            if self.bos_id is not None and ids[:1] != [self.bos_id]:
                ids = [self.bos_id, *ids]
            if self.eos_id is not None and ids[-1:] != [self.eos_id]:
                ids = [*ids, self.eos_id]
        return Sample(ids, [(0, len(ids))])

    def _assemble(self, pending: list[Pending], rejected: list[Rejected], counts: Counter[str]) -> Chunk:
        """Cut, split or drop by length, and lay the rest end to end."""
        ids: list[np.ndarray] = []
        masks: list[np.ndarray] = []
        row_of_sample: list[int] = []
        origins: list[tuple[int, int]] = []
        hashes: list[int] = []
        fates: list[int] = []
        full_lengths: list[int] = []
        for row in pending:
            lost: list[Rejected] = []
            kept = 0
            is_over = any(len(sample.ids) > self.max_seq_len for sample in row.samples)
            for sample in row.samples:
                full_lengths.append(len(sample.ids))
                tokens = np.asarray(sample.ids, dtype=np.int32)
                mask = np.zeros(len(tokens), dtype=bool)
                for start, end in sample.spans:
                    mask[start:end] = True
                problem, pieces = self._fit(row, tokens, mask)
                if problem is not None:
                    lost.append(Rejected(row.raw.file, row.raw.number, *problem))
                for piece, piece_mask in pieces:
                    ids.append(piece)
                    masks.append(piece_mask)
                    row_of_sample.append(len(hashes))
                    kept += 1
            counts["rows_over_length"] += is_over and not row.is_plain
            rejected.extend(lost)
            if kept:
                counts["rows_kept"] += 1
                counts["turns_dropped"] += len(lost)
                origins.append((row.raw.file, row.raw.number))
                hashes.append(row.digest)
                cut = SPLIT if row.is_plain else TRUNCATED if self.over_length == "truncate" else WHOLE
                fates.append(cut if is_over else WHOLE)
            else:
                counts[f"dropped {lost[0].kind}"] += 1
        return Chunk(
            ids=np.concatenate(ids) if ids else np.zeros(0, np.int32),
            supervised=np.concatenate(masks) if masks else np.zeros(0, bool),
            lengths=np.array([len(piece) for piece in ids], np.int32),
            row_of_sample=np.array(row_of_sample, np.int32),
            origins=np.array(origins, np.int32).reshape(-1, 2),
            hashes=np.array(hashes, np.uint64),
            fates=np.array(fates, np.uint8),
            full_lengths=np.array(full_lengths, np.int32),
            rejected=rejected,
            counts=counts,
        )

    def _fit(
        self, row: Pending, tokens: np.ndarray, mask: np.ndarray
    ) -> tuple[tuple[str, str] | None, list[tuple[np.ndarray, np.ndarray]]]:
        """The sample's pieces of at most `max_seq_len` tokens, and why it is dropped where there are none."""
        limit = self.max_seq_len
        pieces = [(tokens, mask)]
        if len(tokens) > limit:
            if row.is_plain:
                pieces = _split(tokens, mask, limit)
            elif self.over_length == "truncate":
                pieces = [(tokens[:limit], mask[:limit])]
            else:
                return (OVER_LENGTH, f"{len(tokens)} tokens, and data.max_seq_len is {limit}"), []
        pieces = [(piece, kept) for piece, kept in pieces if kept[1:].any()]
        if not pieces:
            cut = f" within the first {limit} of its {len(tokens)} tokens" if len(tokens) > limit else ""
            return (NO_LABEL, f"no supervised token{cut}"), []
        return None, pieces


class NoAssistantTurn(RowError):
    """A conversation in which nobody answers, or no answer is to be trained."""


def _split(tokens: np.ndarray, mask: np.ndarray, limit: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Pieces that overlap by one token, supervised once: every token is predicted, and once only."""
    pieces = []
    for start in range(0, len(tokens) - 1, max(1, limit - 1)):
        kept = mask[start : start + limit].copy()
        kept[0] = kept[0] and start == 0
        pieces.append((tokens[start : start + limit], kept))
    return pieces
