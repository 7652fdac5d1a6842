"""The shape of one split's wording: every template a ticket message can be made from.

A template holds slots in braces (`{order}`) and alternatives in angle brackets
(`<bought|ordered>`). Text is written in lower case where it may follow a comma; the writer
capitalises sentence starts. A `topic` ends in a colon: the issue then starts a new sentence.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, fields

_CHOICE = re.compile(r"<([^<>]*)>")


@dataclass(frozen=True)
class Wording:
    """All templates of one split.

    Mappings are keyed by the slots a template states, in the order product, order, date
    ("product+date"), by issue category, or by the kind of distractor. `urgent_item` is for those
    who want the product, `urgent_by` names a deadline.
    """

    greetings: tuple[str, ...]
    intros: tuple[str, ...]
    signoffs: tuple[str, ...]
    closings: tuple[str, ...]
    leads: dict[str, tuple[str, ...]]
    items: dict[str, tuple[str, ...]]
    nouns: dict[str, tuple[str, ...]]
    headers: dict[str, tuple[str, ...]]
    follows: dict[str, tuple[str, ...]]
    issues: dict[str, dict[str, tuple[str, ...]]]
    urgent_first: tuple[str, ...]
    urgent: tuple[str, ...]
    urgent_item: tuple[str, ...]
    urgent_by: tuple[str, ...]
    calm: tuple[str, ...]
    fillers: tuple[str, ...]
    second_dates: dict[str, tuple[str, ...]]
    numbers: dict[str, tuple[str, ...]]


def expand(template: str) -> list[str]:
    """Every string that the alternatives of a template allow."""
    match = _CHOICE.search(template)
    if match is None:
        return [template]
    head, tail = template[: match.start()], template[match.end() :]
    return [text for option in match[1].split("|") for text in expand(head + option + tail)]


def templates(wording: Wording) -> Iterator[tuple[str, str]]:
    """Yield (field name, template) for every template of a wording."""
    for field in fields(wording):
        pending = [getattr(wording, field.name)]
        while pending:
            value = pending.pop()
            if isinstance(value, str):
                yield field.name, value
            else:
                pending.extend(value.values() if isinstance(value, dict) else value)
