"""The data's part of the report: what became of every row, and how long the samples are."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from pathlib import PurePath
from typing import Any

from finetune.report import numbers
from finetune.report.charts import draw_histogram, draw_percentiles
from finetune.report.page import facts, table
from finetune.report.run_files import RunFiles

SHOWN_REJECTED = 20
_PERCENTILES = ("p5", "p50", "p95", "max")


def data_section(run: RunFiles) -> str:
    """Totals, a table of the sources, lengths, and the rejected rows with their reasons."""
    if not run.ledger:
        return '<p class="empty">No ledger: the data has not been prepared, or ledger.json is absent.</p>'
    sources = [source for source in _list(run.ledger.get("sources")) if isinstance(source, dict)]
    figures = "".join(_lengths(source, run, alone=len(sources) == 1) for source in sources)
    return _totals(run.ledger) + _sources(sources) + f'<div class="charts below">{figures}</div>' + _rejected(run)


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _totals(ledger: dict[str, Any]) -> str:
    def number(name: str) -> int:
        value = ledger.get(name)
        return value if isinstance(value, int) else 0

    tokens, supervised = number("train_tokens"), number("train_supervised_tokens")
    share = f"{supervised / tokens:.0%} of the tokens carry loss" if tokens else ""
    pairs = [
        ("training samples", numbers.count(number("train_samples")), f"{numbers.count(tokens)} tokens"),
        ("supervised tokens", numbers.count(supervised), share),
    ]
    if number("validation_samples"):
        remark = f"{numbers.count(number('validation_tokens'))} tokens"
        pairs.append(("validation samples", numbers.count(number("validation_samples")), remark))
    pairs.append(("rejected", numbers.count(number("rejected")), "rows or turns"))
    if number("duplicate_rows"):
        pairs.append(("duplicates", numbers.count(number("duplicate_rows")), "rows that repeat another"))
    if number("validation_rows_in_train"):
        remark = "validation rows that are also trained on"
        pairs.append(("leaked", numbers.count(number("validation_rows_in_train")), remark))
    if number("test_rows_in_train"):
        remark = "test rows that are also trained on"
        pairs.append(("leaked", numbers.count(number("test_rows_in_train")), remark))
    return facts(pairs)


def _sources(sources: list[dict[str, Any]]) -> str:
    head = ["source", "rows read", "kept", "dropped", "cut", "samples", "tokens", "supervised"]
    rows = []
    for source in sources:
        path = str(source.get("path", "?"))
        passes = source.get("weight", 1.0)
        remark = f"{source.get('role', '')}, {source.get('format', '')}"
        remark += f", {passes:g} passes an epoch" if isinstance(passes, int | float) and passes != 1 else ""
        coverage = source.get("label_coverage")
        rows.append(
            [
                f'<span class="key" title="{escape(path)}">{escape(PurePath(path).name)}</span>'
                f"<small>{escape(remark)}</small>",
                numbers.count(source.get("rows_read")),
                numbers.count(source.get("rows_kept")),
                _dropped(source),
                numbers.count(source.get("rows_truncated", 0) + source.get("rows_split", 0)),
                numbers.count(source.get("samples")),
                numbers.count(source.get("total_tokens")),
                numbers.MISSING if coverage is None else f"{coverage:.0%}",
            ]
        )
    return f'<div class="below">{table(head, rows)}</div>'


def _dropped(source: dict[str, Any]) -> str:
    reasons = source.get("dropped")
    reasons = reasons if isinstance(reasons, dict) else {}
    lines = "".join(f"<small>{escape(reason)} {numbers.count(number)}</small>" for reason, number in reasons.items())
    return numbers.count(sum(reasons.values())) + lines


def _lengths(source: dict[str, Any], run: RunFiles, *, alone: bool) -> str:
    lengths = source.get("lengths")
    title = "Sample lengths" if alone else f"Sample lengths of {PurePath(str(source.get('path', '?'))).name}"
    limit = run.ledger.get("max_seq_len")
    marks: dict[str, float] = {}
    histogram = source.get("length_histogram")
    if isinstance(lengths, dict) and all(name in lengths for name in _PERCENTILES):
        marks = {f"median {lengths['p50']:,}": lengths["p50"], f"95 % up to {lengths['p95']:,}": lengths["p95"]}
        # A limit far beyond the longest sample would squeeze the figure into a corner.
        if isinstance(limit, int) and limit <= 2 * lengths["max"]:
            marks[f"max_seq_len {limit:,}"] = limit
    if isinstance(histogram, dict):
        edges, counts = _list(histogram.get("edges")), _list(histogram.get("counts"))
        if len(edges) == len(counts) + 1 > 1:
            return draw_histogram(edges, counts, marks, title=title)
    if marks and isinstance(lengths, dict):
        return draw_percentiles(lengths, marks, title=title)
    return ""


def _rejected(run: RunFiles) -> str:
    rows = list(_rejected_rows(run))
    if not rows:
        return ""
    more = len(run.rejected) - SHOWN_REJECTED
    note = f'<p class="note">{more:,} more are in rejected.jsonl.</p>' if more > 0 else ""
    shown = table(["row", "kind", "reason"], rows, text_columns=(0, 1, 2))
    return f"<details><summary>Rejected rows ({len(run.rejected):,})</summary>{shown}{note}</details>"


def _rejected_rows(run: RunFiles) -> Iterator[list[str]]:
    for row in run.rejected[:SHOWN_REJECTED]:
        origin = str(row.get("origin", "?"))
        yield [
            f'<span class="key" title="{escape(origin)}">{escape(PurePath(origin).name)}</span>',
            escape(str(row.get("kind", ""))),
            escape(str(row.get("reason", ""))),
        ]
