"""From the recipe's data section to token data sets: tokenize what is not cached, and keep the ledger."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np

from finetune.console import progress_bar, say, warn
from finetune.data.answers import expected_answer
from finetune.data.cache import Store, cache_key, open_store, write_store
from finetune.data.dataset import TokenDataset
from finetune.data.formats import Message, RowError, Tools, digest_of, is_trained, recognize_format
from finetune.data.ledger import (
    SPLIT,
    TRUNCATED,
    Ledger,
    RejectedRow,
    SourceLedger,
    check_no_over_length,
    check_source,
    first_rows,
)
from finetune.data.masking import MALFORMED, Chunk, Encoder
from finetune.data.shares import Opened, choose_validation, train_set, validation_set
from finetune.data.sources import RawRow, Source, columns_of, held_out_names, open_source, unused_columns
from finetune.data.template import ChatTemplate, added_tokens, backend, bos_habit, special_tokens_of
from finetune.data.workers import encode_stream
from finetune.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from finetune.recipe.schema import DataSection, SourceSection

# Rows that are looked at to tell the columns: a JSON line may leave optional ones out.
_PEEKED_ROWS = 100

_TEST_ROWS = "evaluation.source"

# Keys of the data section that do not shape a source's samples. A new key does until it is listed here.
_NOT_IN_KEY = {
    "sources",
    "template",  # its text is in the key, with its variables, and with the date where it prints one
    "template_variables",
    "date",
    "packing",
    "max_tokens",
    "validation",
    "max_rejected_share",
    "max_over_length_share",
    "num_workers",
}


@dataclass(frozen=True)
class PreparedData:
    """What training needs of the data."""

    train: TokenDataset
    validation: TokenDataset | None
    ledger: Ledger


@dataclass(frozen=True)
class Row:
    """A row for task metrics."""

    messages: list[Message]
    """The prompt: everything before the last assistant turn that is trained, with the default system prompt."""
    expected: str
    """The text of that turn, as a completion's has it."""
    origin: str
    tools: Tools = None
    digest: int = 0
    """The content of the whole row, as a data set's `row_hashes` has it."""
    opening: str = ""
    """What the template writes before that text, and a model trained with it therefore too."""


def prepare_data(
    data: DataSection, tokenizer: PreTrainedTokenizerBase, template: ChatTemplate, *, seed: int
) -> PreparedData:
    """Training and validation samples of `data`, tokenized unless the cache has them.

    `seed` decides which rows are split off for validation and which of a fractional weight are shown.

    Raises:
        DataError: a source is missing, empty or of unknown shape, too many rows are malformed or over length,
            nothing is supervised, or the validation split takes everything.
    """
    ledger = Ledger(template.name, data.train_on, data.max_seq_len)
    opened = [
        _open(section, data, tokenizer, template, f"data.sources[{index}]", "train", ledger)
        for index, section in enumerate(data.sources)
    ]
    for each in opened:
        if names := held_out_names(each.source):
            warn(f"{each.source.title}: {', '.join(names)} is trained on as well; a glob in path leaves it out")
    if data.system is not None and all(each.account.format == "text" for each in opened):
        warn("data.system has no effect on text rows, which are trained as they are; generate and chat show it")
    held_out = None
    if data.validation.source is not None:
        held_out = _open(
            data.validation.source, data, tokenizer, template, "data.validation.source", "validation", ledger
        )
    hashes = np.concatenate([each.store.hashes for each in opened])
    ordered = np.sort(hashes)  # np.unique would import numpy.ma, which takes 0.2 s
    ledger.duplicate_rows = int((ordered[1:] == ordered[:-1]).sum())
    in_validation = np.zeros(len(hashes), dtype=bool)
    if held_out is None and data.validation.size:
        in_validation = choose_validation(hashes, data.validation.size, seed)
    train = train_set(opened, in_validation, seed)
    validation = validation_set(opened, in_validation, held_out)
    if held_out is not None:
        ledger.validation_rows_in_train = int(np.isin(held_out.store.hashes, hashes).sum())
        if ledger.validation_rows_in_train:
            warn(f"{ledger.validation_rows_in_train:,} validation rows are also in the training data")
    _check_supervised(train, validation, ledger)
    _count(ledger, train, validation)
    return PreparedData(train, validation, ledger)


def prepare_test(
    source: SourceSection, data: DataSection, tokenizer: PreTrainedTokenizerBase, template: ChatTemplate, *, seed: int
) -> TokenDataset:
    """Samples of a source that is measured alone; raises as `prepare_data` does."""
    ledger = Ledger(template.name, data.train_on, data.max_seq_len)
    opened = _open(source, data, tokenizer, template, _TEST_ROWS, "test", ledger)
    test = train_set([opened], np.zeros(len(opened.store.hashes), dtype=bool), seed)
    _check_supervised(test, None, ledger)
    return test


def prepare_rows(
    source: SourceSection,
    data: DataSection,
    tokenizer: PreTrainedTokenizerBase,
    template: ChatTemplate,
    *,
    max_rows: int | None = None,
    where: str = _TEST_ROWS,
) -> list[Row]:
    """Prompts and expected answers of a source, for task metrics; empty for plain text, which has no prompts.

    Raises:
        DataError: the source is missing, empty or of unknown shape, or too many rows are malformed.
    """
    opened, rows = _first_rows(source, where)
    encoder = _encoder(source, data, tokenizer, template, _recognize(source, rows, opened))
    return _rows(opened, encoder, source, data, limit=max_rows)


def prepare_validation_rows(
    data: DataSection,
    tokenizer: PreTrainedTokenizerBase,
    template: ChatTemplate,
    *,
    seed: int,
    max_rows: int | None = None,
) -> list[Row]:
    """Prompts and expected answers of the validation rows, the same ones that `prepare_data` holds out.

    Raises:
        DataError: as `prepare_data` does.
    """
    if data.validation.source is not None:
        where = "data.validation.source"
        return prepare_rows(data.validation.source, data, tokenizer, template, max_rows=max_rows, where=where)
    validation = prepare_data(data, tokenizer, template, seed=seed).validation
    if validation is None:
        return []
    held_out = {validation.row(index) for index in range(len(validation))}
    found: list[Row] = []
    for index, section in enumerate(data.sources):
        opened, rows = _first_rows(section, f"data.sources[{index}]")
        encoder = _encoder(section, data, tokenizer, template, _recognize(section, rows, opened))
        wanted = {(file, number) for place, file, number in held_out if place == index}
        found.extend(_rows(opened, encoder, section, data, wanted=wanted))
    return found[:max_rows]


def _open(
    section: SourceSection,
    data: DataSection,
    tokenizer: PreTrainedTokenizerBase,
    template: ChatTemplate,
    where: str,
    role: str,
    ledger: Ledger,
) -> Opened:
    source, first = _first_rows(section, where)
    encoder = _encoder(section, data, tokenizer, template, _recognize(section, first, source))
    key = cache_key(key_parts(source, section, data, tokenizer, template, encoder.format))
    store = open_store(key)
    cache = "found"
    if store is None:
        cache = "made"
        unused = unused_columns(encoder.format, section.columns, columns_of(source, first))
        chunks = _encode(source, section, encoder, unused, data.num_workers)
        store = write_store(key, chunks, vocab_size=len(tokenizer), extra={"format": encoder.format})
    account = _account(source, section, store, role, encoder.format, cache)
    rejected = [RejectedRow(source.origin(row.file, row.number), row.kind, row.reason) for row in store.rejected]
    ledger.sources.append(account)
    ledger.rejected.extend(rejected)
    if data.over_length == "error":
        check_no_over_length(account, rejected)
    check_source(
        account,
        rejected,
        max_rejected_share=data.max_rejected_share,
        max_over_length_share=data.max_over_length_share,
    )
    for name, count in store.meta["counts"].items():
        if name.startswith(hidden := "hidden "):
            what = f"{count:,} rows have {name.removeprefix(hidden)}"
            warn(f"{source.title}: {what}, which the chat template ({template.name}) does not show")
    say(f"{source.title}: {account.rows_kept:,} rows, format {account.format}, cache {cache}")
    return Opened(source, store, account)


def key_parts(
    source: Source,
    section: SourceSection,
    data: DataSection,
    tokenizer: PreTrainedTokenizerBase,
    template: ChatTemplate,
    format_name: str,
) -> dict[str, object]:
    """Everything of the recipe, the data and the tokenizer that shapes the samples of one source."""
    return {
        "data": source.digest,
        "tokenizer": hashlib.sha256(backend(tokenizer).to_str().encode()).hexdigest(),
        "special_tokens": special_tokens_of(tokenizer.special_tokens_map),
        "bos_habit": bos_habit(tokenizer),
        "template": [template.source, template.tail, template.terminator, template.system_role],
        "section": data.model_dump(mode="json", exclude=_NOT_IN_KEY),
        "source": {
            "reader": source.kind,
            "format": format_name,
            "columns": section.columns,
            "max_rows": section.max_rows,
        },
    }


def _first_rows(section: SourceSection, where: str) -> tuple[Source, list[RawRow]]:
    source = open_source(section, where)
    rows = list(islice(source.rows(), _PEEKED_ROWS))
    if not rows:
        raise DataError(f"{where}.path: {section.path} holds no rows.")
    return source, rows


def _recognize(section: SourceSection, rows: list[RawRow], source: Source) -> str:
    return recognize_format(section.format, section.columns, columns_of(source, rows), source.where)


def _encoder(
    section: SourceSection,
    data: DataSection,
    tokenizer: PreTrainedTokenizerBase,
    template: ChatTemplate,
    format_name: str,
) -> Encoder:
    return Encoder(
        rust=backend(tokenizer),
        source=template.source,
        special_tokens=special_tokens_of(tokenizer.special_tokens_map),
        added=added_tokens(tokenizer),
        tail=template.tail,
        terminator=template.terminator,
        system_role=template.system_role,
        bos_id=tokenizer.bos_token_id if bos_habit(tokenizer) else None,
        eos_id=tokenizer.eos_token_id,
        format=format_name,
        columns=dict(section.columns),
        system=data.system,
        train_on=data.train_on,
        max_seq_len=data.max_seq_len,
        over_length=data.over_length,
    )


def _encode(
    source: Source, section: SourceSection, encoder: Encoder, unused: list[str], num_workers: int | None
) -> Iterator[Chunk]:
    total = min(source.num_rows_hint, section.max_rows or source.num_rows_hint)
    notes = ["told from its columns"] if section.format == "auto" else []
    notes += [f"not used: {', '.join(unused)}"] if unused else []
    say(f"{source.title}: format {encoder.format}" + (f" ({'; '.join(notes)})" if notes else ""))
    with progress_bar(f"tokenizing {source.title}", total) as bar:
        for chunk in encode_stream(encoder, islice(source.rows(), section.max_rows), num_workers):
            bar.advance(chunk.counts["rows_read"])
            yield chunk


def _account(
    source: Source, section: SourceSection, store: Store, role: str, format_name: str, cache: str
) -> SourceLedger:
    meta = store.meta
    counts = meta["counts"]
    prefix = "dropped "
    total, supervised = meta["num_tokens"], meta["num_supervised"]
    return SourceLedger(
        where=source.where,
        path=source.title,
        role=role,
        format=format_name,
        rows_read=counts.get("rows_read", 0),
        rows_kept=counts.get("rows_kept", 0),
        rows_truncated=int((store.fates == TRUNCATED).sum()),
        rows_split=int((store.fates == SPLIT).sum()),
        rows_over_length=counts.get("rows_over_length", 0),
        rows_one_sample_per_turn=counts.get("rows_one_sample_per_turn", 0),
        rows_encoded_in_parts=counts.get("rows_encoded_in_parts", 0),
        turns_dropped=counts.get("turns_dropped", 0),
        dropped={name[len(prefix) :]: count for name, count in counts.items() if name.startswith(prefix)},
        samples=len(store),
        total_tokens=total,
        supervised_tokens=supervised,
        label_coverage=supervised / total if total else 0.0,
        lengths=meta["lengths"],
        length_histogram=meta["length_histogram"],
        weight=section.weight,
        cache=cache,
    )


def _check_supervised(train: TokenDataset, validation: TokenDataset | None, ledger: Ledger) -> None:
    left_out = f"\n{first_rows(ledger.rejected)}" if ledger.rejected else " every row was cut before its answer."
    for name, dataset in (("training", train), ("validation", validation)):
        if dataset is not None and not dataset.num_supervised.sum():
            raise DataError(
                f"data: no token of the {name} data is supervised, so there is nothing to learn:{left_out}\n"
                "Mend the rows, or look at data.max_seq_len, data.over_length and data.train_on."
            )


def _count(ledger: Ledger, train: TokenDataset, validation: TokenDataset | None) -> None:
    ledger.train_samples = len(train)
    ledger.train_tokens = int(train.lengths.sum(dtype=np.int64))
    ledger.train_supervised_tokens = int(train.num_supervised.sum(dtype=np.int64))
    if validation is not None:
        ledger.validation_samples = len(validation)
        ledger.validation_tokens = int(validation.lengths.sum(dtype=np.int64))
        ledger.validation_supervised_tokens = int(validation.num_supervised.sum(dtype=np.int64))


def _rows(
    source: Source,
    encoder: Encoder,
    section: SourceSection,
    data: DataSection,
    *,
    wanted: set[tuple[int, int]] | None = None,
    limit: int | None = None,
) -> list[Row]:
    """Prompts and answers of a source, or of its rows `wanted` by file and number; at most `limit`.

    Rows that cannot be used, or whose prompt the template refuses, count against `data.max_rejected_share`.
    """
    found: list[Row] = []
    bad: list[str] = []
    num_rows = 0
    for raw in islice(source.rows(), section.max_rows if encoder.format != "text" else 0):
        if len(found) == limit or (bad and not data.max_rejected_share):
            break
        if wanted is not None and (raw.file, raw.number) not in wanted:
            continue
        num_rows += 1
        origin = source.origin(raw.file, raw.number)
        try:
            conversation = encoder.conversation(raw)
            messages, tools = conversation
            last = max((i for i, message in enumerate(messages) if is_trained(message)), default=None)
            if last is None:
                continue
            opening, expected = expected_answer(encoder, messages[: last + 1], tools)
        except (RowError, DataError) as error:
            bad.append(f"{origin}: {error}")
            continue
        found.append(Row(messages[:last], expected, origin, tools, digest_of(conversation), opening))
    # a few rows say nothing about the share in all of them
    share = data.max_rejected_share if len(found) != limit else float(data.max_rejected_share > 0)
    if len(bad) > share * num_rows:
        raise DataError(
            f"{source.where}: {len(bad):,} of {num_rows:,} rows cannot be used ({MALFORMED}), "
            f"and data.max_rejected_share is {data.max_rejected_share}:\n  {bad[0]}"
        )
    if bad and source.where == _TEST_ROWS:  # what became of others is in the ledger
        warn(f"{source.title}: {len(bad):,} of {num_rows:,} rows cannot be used and are not measured: {bad[0]}")
    return found


__all__ = ["PreparedData", "Row", "prepare_data", "prepare_rows", "prepare_validation_rows"]
