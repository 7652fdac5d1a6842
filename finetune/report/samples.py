"""Samples before, during and after training, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

from finetune.report.run_files import RunFiles

MAX_SAMPLES = 12
# More columns than these are no longer side by side.
MAX_DURING = 3


@dataclass
class Card:
    """One prompt and what the model made of it at several moments."""

    prompt: str
    expected: str
    before: dict[str, Any] | None = None
    after: dict[str, Any] | None = None
    during: dict[int, dict[str, Any]] = field(default_factory=dict)


def collect_cards(run: RunFiles) -> list[Card]:
    """Samples of the results joined with those written while training: same answer, and the prompt within the other.

    The one is written as the user's text, the other as the model was given it: of several texts within it, the longest.
    Rows that are alike have a card each.
    """
    cards: list[Card] = []
    for when in ("before", "after"):
        part = run.results.get(when)
        rows = part.get("samples") if isinstance(part, dict) else None
        for row in _valid(rows):
            same = [card for card in _answering(cards, row) if card.prompt == row["prompt"]]
            free = [card for card in same if getattr(card, when) is None]
            setattr(free[0] if free else _add(cards, row), when, row)
    for row in _valid(run.samples):
        if isinstance(step := row.get("step"), int):
            within = [card for card in _answering(cards, row) if card.prompt.strip() in row["prompt"]]
            longest = max((len(card.prompt.strip()) for card in within), default=0)
            best = [card for card in within if len(card.prompt.strip()) == longest] or [_add(cards, row)]
            next((card for card in best if step not in card.during), best[0]).during[step] = row
    return cards


def _valid(rows: Any) -> list[dict[str, Any]]:
    keys = ("prompt", "expected", "completion")
    return [
        row
        for row in (rows if isinstance(rows, list) else [])
        if isinstance(row, dict) and all(isinstance(row.get(key), str) for key in keys)
    ]


def _answering(cards: list[Card], row: dict[str, Any]) -> list[Card]:
    return [card for card in cards if card.expected.strip() == row["expected"].strip()]


def _add(cards: list[Card], row: dict[str, Any]) -> Card:
    cards.append(Card(row["prompt"], row["expected"]))
    return cards[-1]


def samples_section(run: RunFiles) -> str:
    """All samples; those without a completion from before or after come last."""
    cards = sorted(collect_cards(run), key=lambda card: card.before is None and card.after is None)
    if not cards:
        return (
            '<p class="empty">No samples: evaluation.num_samples is 0, or the run has not come to its first ones.</p>'
        )
    left = len(cards) - MAX_SAMPLES
    note = f'<p class="note">{left:,} more are in results.json and samples.jsonl.</p>' if left > 0 else ""
    if run.key("evaluation.every_steps") is None:
        note += '<p class="note">None were taken while training: evaluation.every_steps is not set.</p>'
    return "".join(_draw(card) for card in cards[:MAX_SAMPLES]) + note


def spread(steps: Sequence[int], limit: int) -> list[int]:
    """At most `limit` of the steps, evenly, the first and the last among them."""
    if len(steps) <= limit:
        return list(steps)
    return [steps[round(index * (len(steps) - 1) / (limit - 1))] for index in range(limit)]


def _draw(card: Card) -> str:
    columns = [] if card.before is None else [_column("before", card.before, card, "")]
    shown = spread(sorted(card.during), MAX_DURING)
    columns += [_column(f"step {step:,}", card.during[step], card, "") for step in shown]
    if card.after is not None:
        columns.append(_column("after", card.after, card, ' class="last"'))
    return (
        f'<article class="sample"><div><h4>Prompt</h4><div class="text">{escape(card.prompt.strip())}</div></div>'
        f'<div class="expected"><h4>Expected</h4><div class="text">{escape(card.expected.strip())}</div></div>'
        f'<div class="columns" style="--columns:{len(columns)}">{"".join(columns)}</div></article>'
    )


def _column(heading: str, row: dict[str, Any], card: Card, kind: str) -> str:
    text = row["completion"].strip()
    tag = ""
    if text == card.expected.strip():
        tag = '<span class="tag good">as expected</span>'
    elif row.get("stopped") is False:
        tag = '<span class="tag soft">cut at the limit</span>'
    shown = escape(text) if text else '<span class="soft">(nothing)</span>'
    return f'<div{kind}><h4>{escape(heading)}{tag}</h4><div class="text">{shown}</div></div>'
