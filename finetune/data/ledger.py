"""The ledger: what became of every row. Kept, cut, split and dropped, by source and by reason."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from finetune.errors import DataError
from finetune.files import write_atomic
from finetune.run_dir import RunDir

_SHOWN_ROWS = 5

# What became of a row that is kept: as it is, cut to the first tokens, or all of it in several pieces.
WHOLE, TRUNCATED, SPLIT = range(3)


@dataclass(frozen=True)
class RejectedRow:
    """A row, or a turn of it, that is not trained."""

    origin: str
    """`path/to/file.jsonl:12`."""
    kind: str
    """`malformed`, `over length` or `no label`."""
    reason: str


@dataclass
class SourceLedger:
    """What became of one source's rows. Lengths are of samples before cutting, in tokens."""

    where: str
    path: str
    role: str
    format: str
    rows_read: int = 0
    rows_kept: int = 0
    rows_truncated: int = 0
    rows_split: int = 0
    rows_over_length: int = 0
    rows_one_sample_per_turn: int = 0
    rows_encoded_in_parts: int = 0
    turns_dropped: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    samples: int = 0
    total_tokens: int = 0
    supervised_tokens: int = 0
    label_coverage: float = 0.0
    lengths: dict[str, int] = field(default_factory=dict)
    length_histogram: dict[str, list[int]] = field(default_factory=dict)
    weight: float = 1.0
    cache: str = ""


@dataclass
class Ledger:
    """The ledger of a run's data."""

    template: str
    train_on: str
    max_seq_len: int
    sources: list[SourceLedger] = field(default_factory=list)
    rejected: list[RejectedRow] = field(default_factory=list)
    train_samples: int = 0
    train_tokens: int = 0
    train_supervised_tokens: int = 0
    validation_samples: int = 0
    validation_tokens: int = 0
    validation_supervised_tokens: int = 0
    duplicate_rows: int = 0
    """Rows of the training sources that repeat another one."""
    validation_rows_in_train: int = 0
    """Rows of a validation source that are also trained on; rows split off never are."""
    test_rows_in_train: int = 0
    """Rows of the evaluation's source that are also trained on."""

    def to_json(self) -> dict[str, Any]:
        """Everything but the rejected rows, which have a file of their own."""
        content = asdict(self)
        content["rejected"] = len(self.rejected)
        return content

    def write(self, run_dir: RunDir) -> None:
        """Write `ledger.json` and `rejected.jsonl`."""
        write_atomic(run_dir.ledger, json.dumps(self.to_json(), indent=2, ensure_ascii=False) + "\n")
        lines = (json.dumps(asdict(row), ensure_ascii=False) + "\n" for row in self.rejected)
        write_atomic(run_dir.rejected, "".join(lines))

    def summary_lines(self) -> list[str]:
        """A few lines for people."""
        lines = [line for source in self.sources for line in _source_lines(source, self.max_seq_len)]
        lines.append(
            f"training: {self.train_samples:,} samples, {self.train_tokens:,} tokens, "
            f"{self.train_supervised_tokens:,} supervised ({self.train_on})"
        )
        if self.validation_samples:
            lines.append(f"validation: {self.validation_samples:,} samples, {self.validation_tokens:,} tokens")
        if self.duplicate_rows:
            lines.append(f"{self.duplicate_rows:,} rows repeat another row")
        if self.validation_rows_in_train:
            lines.append(f"{self.validation_rows_in_train:,} validation rows are also in the training data")
        if self.test_rows_in_train:
            lines.append(f"{self.test_rows_in_train:,} test rows are also in the training data")
        return lines


def percentiles(lengths: np.ndarray) -> dict[str, int]:
    """p5, p50, p95, p99 and the maximum of `lengths` [N]; empty where N is 0."""
    if not len(lengths):
        return {}
    names = {"p5": 5, "p50": 50, "p95": 95, "p99": 99, "max": 100}
    values = np.percentile(lengths, list(names.values()), method="nearest")
    return {name: int(value) for name, value in zip(names, values, strict=True)}


def length_histogram(lengths: np.ndarray) -> dict[str, list[int]]:
    """Edges and counts of about 30 equal bins of whole tokens; empty where N is 0."""
    if not len(lengths):
        return {}
    low, high = int(lengths.min()), int(lengths.max()) + 1
    edges = np.arange(low, high + (width := max(1, -(-(high - low) // 30))), width)
    return {"edges": edges.tolist(), "counts": np.histogram(lengths, edges)[0].tolist()}


def check_source(
    source: SourceLedger,
    rejected: list[RejectedRow],
    *,
    max_rejected_share: float,
    max_over_length_share: float,
) -> None:
    """Hold one source against the recipe's thresholds.

    Raises:
        DataError: no rows, or too many that are malformed or over length.
    """
    if not source.rows_read:
        raise DataError(f"{source.where}.path: {source.path} holds no rows.")
    malformed = [row for row in rejected if row.kind == "malformed"]
    if len(malformed) > max_rejected_share * source.rows_read:
        share = len(malformed) / source.rows_read
        raise DataError(
            f"{source.where}: {len(malformed):,} of {source.rows_read:,} rows ({share:.2%}) cannot be used, "
            f"and data.max_rejected_share is {max_rejected_share}:\n{first_rows(malformed)}\n"
            "Mend the rows, or raise data.max_rejected_share to leave them out."
        )
    over = source.rows_over_length
    if over > max_over_length_share * source.rows_read:
        raise DataError(
            f"{source.where}: {over:,} of {source.rows_read:,} rows ({over / source.rows_read:.1%}) are "
            f"longer than data.max_seq_len, and data.max_over_length_share is {max_over_length_share}. "
            f"Lengths in tokens: {_join(source.lengths)}. "
            "Raise data.max_seq_len, or data.max_over_length_share to go on "
            f"{'with them cut' if source.rows_truncated else 'without them'}."
        )


def check_no_over_length(source: SourceLedger, rejected: list[RejectedRow]) -> None:
    """Hold one source against `data.over_length: error`.

    Raises:
        DataError: a row is over length.
    """
    over = [row for row in rejected if row.kind == "over length"]
    if over:
        raise DataError(
            f"{source.where}: {source.rows_over_length:,} rows are over length, and data.over_length is error"
            f":\n{first_rows(over)}\nRaise data.max_seq_len, or set data.over_length: drop or truncate."
        )


def first_rows(rows: list[RejectedRow]) -> str:
    """The first rows with their reasons, a line each, and how many more there are."""
    lines = [f"  {row.origin}: {row.reason}" for row in rows[:_SHOWN_ROWS]]
    if len(rows) > _SHOWN_ROWS:
        lines.append(f"  and {len(rows) - _SHOWN_ROWS:,} more")
    return "\n".join(lines)


def _join(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in counts.items())


def _source_lines(source: SourceLedger, max_seq_len: int) -> list[str]:
    lines = [
        f"{source.path} ({source.role}, {source.format}): {source.rows_kept:,} of {source.rows_read:,} rows "
        f"kept, {source.supervised_tokens:,} of {source.total_tokens:,} tokens supervised "
        f"({source.label_coverage:.0%})"
    ]
    if source.lengths:
        lines.append(f"  tokens per sample: {_join(source.lengths)} (max_seq_len {max_seq_len:,})")
    if source.dropped:
        lines.append(f"  dropped: {_join(source.dropped)}")
    notes = {
        "truncated": source.rows_truncated,
        "split into pieces": source.rows_split,
        "rows of one sample per turn (the template rewrites earlier turns)": source.rows_one_sample_per_turn,
        "rows whose prompt and answer are tokenized apart": source.rows_encoded_in_parts,
        "turns dropped": source.turns_dropped,
    }
    lines.extend(f"  {note}: {count:,}" for note, count in notes.items() if count)
    return lines
