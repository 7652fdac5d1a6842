from __future__ import annotations

import io

import pytest
from rich.console import Console
from rich.table import Table

from finetune.evaluation.tables import comparison_table, samples_table
from finetune.evaluation.task import Sample


def shown(table: Table, width: int = 80) -> str:
    console = Console(file=io.StringIO(), width=width, highlight=False)
    console.print(table)
    return console.file.getvalue()  # type: ignore[attr-defined]


def cells(line: str) -> list[str]:
    return line.split()


def test_shares_are_percentages_and_less_perplexity_is_better() -> None:
    table = comparison_table({"exact_match": 0.0, "perplexity": 12.5}, {"exact_match": 0.875, "perplexity": 2.25})
    text = shown(table)
    lines = [cells(line) for line in text.splitlines() if line.strip()]
    assert ["exact_match", "0.0%", "87.5%", "+87.5", "points"] in lines
    assert ["perplexity", "12.500", "2.250", "-10.250"] in lines
    styles = [getattr(cell, "style", None) for cell in table.columns[3]._cells]
    assert styles == ["green", "green"]


def test_what_was_not_measured_is_a_dash() -> None:
    assert ["exact_match", "–", "50.0%", "–"] in [
        cells(line) for line in shown(comparison_table(None, {"exact_match": 0.5})).splitlines()
    ]


@pytest.mark.parametrize("width", [80, 120])
def test_samples_stand_under_each_other_and_fit(width: int) -> None:
    after = [
        Sample("long " * 200 + "end", '{"a": 1}', '{ "a": 1 }', True),
        Sample("[bold]x[/bold]", "yes", "", False),
    ]
    before = [Sample(after[0].prompt, '{"a": 1}', "no idea", True)]
    table = samples_table(before, after)
    text = shown(table, width)
    assert max(map(len, text.splitlines())) <= width
    assert "[bold]x[/bold]" in text and "(nothing) [cut]" in text and "[…]" in text and "end" in text
    assert [cells(line)[0] for line in text.splitlines() if line[:1].isalpha()] == [
        "prompt",
        "expected",
        "before",
        "after",
        "prompt",
        "expected",
        "after",
    ]
