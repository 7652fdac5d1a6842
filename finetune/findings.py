"""What a check has found: errors, warnings and facts, each with a topic, a line for people and values for programs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from finetune.errors import FinetuneError

Level = Literal["error", "warning", "fact"]
LEVELS: tuple[Level, ...] = ("error", "warning", "fact")

Subject = TypeVar("Subject")


@dataclass(frozen=True)
class Finding:
    """One thing found. `values` are plain JSON values."""

    level: Level
    topic: str
    text: str
    values: dict[str, Any] = field(default_factory=dict)


def error(topic: str, text: str, **values: Any) -> Finding:
    """What keeps a run from working."""
    return Finding("error", topic, text, values)


def warning(topic: str, text: str, **values: Any) -> Finding:
    """What will work, and probably not as it was meant."""
    return Finding("warning", topic, text, values)


def fact(topic: str, text: str, **values: Any) -> Finding:
    """What is good to know."""
    return Finding("fact", topic, text, values)


def run_checks(rows: Mapping[str, Callable[[Subject], Iterable[Finding]]], subject: Subject) -> Iterator[Finding]:
    """What every row finds in `subject`; a `FinetuneError` is an error of the row's topic, and the next row goes on."""
    for topic, check in rows.items():
        try:
            yield from check(subject)
        except FinetuneError as problem:
            yield error(topic, str(problem))


def in_order(findings: Iterable[Finding]) -> list[Finding]:
    """Errors, then warnings, then facts, each in the order found."""
    return sorted(findings, key=lambda finding: LEVELS.index(finding.level))
