"""Turns pydantic's errors into what a user needs: key, value given, what is accepted, what was meant."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from typing import Any

from pydantic import ValidationError

from finetune.recipe.keys import Place, follow, place_at
from finetune.recipe.lines import KeyPath, YamlError, parse_yaml
from finetune.recipe.overrides import Problem
from finetune.recipe.suggest import meant_keys, nearest

_UNKNOWN = ("extra_forbidden", "invalid_key")
_LONGEST_VALUE = 60
_SPOKEN = {"yes": "true", "on": "true", "y": "true", "no": "false", "off": "false", "n": "false"}


def explain(error: ValidationError, data: dict[str, Any]) -> list[Problem]:
    """One problem for every key that pydantic refused, less missing keys that an unknown one meant."""
    unknown, missing, refused = [], [], []
    for detail in error.errors(include_url=False, include_context=False):
        path = follow(detail["loc"], unknown_last=detail["type"] in _UNKNOWN)
        if detail["type"] in _UNKNOWN:
            unknown.append(path)
        elif detail["type"] == "missing" and not path[-1].isdecimal():
            missing.append(path)
        elif detail["loc"][-1] == "[key]":
            refused.append(Problem(path, "keys here are text; put the key in quotes, with something between them"))
        else:
            at = path[:-1] if detail["type"] == "missing" else path  # a list too short for its items
            refused.append(Problem(at, _explain_value(at, _value_at(data, at))))
    meant = {key for path in unknown for key in meant_keys(path)[0]}
    return [
        *(Problem(path, _explain_unknown(path, _value_at(data, path))) for path in unknown),
        *(Problem(path, _explain_missing(path)) for path in missing if ".".join(path) not in meant),
        *_deepest(refused),
    ]


def _deepest(problems: Iterable[Problem]) -> list[Problem]:
    """One problem a key: a union reports each of its branches; the one that got furthest was meant."""
    kept: dict[KeyPath, Problem] = {problem.path: problem for problem in problems}
    return [
        problem
        for path, problem in kept.items()
        if not any(len(other) > len(path) and other[: len(path)] == path for other in kept)
    ]


def _explain_unknown(path: KeyPath, value: Any) -> str:
    keys, hint = meant_keys(path, value)
    if keys:
        return f"unknown key; did you mean {' or '.join(keys)}?" + (f" ({hint})" if hint else "")
    place = place_at(path[:-1])
    section = ".".join(path[:-1]) or "a recipe"
    return f"unknown key; {section} accepts {', '.join(place.keys if place else ())}"


def _explain_missing(path: KeyPath) -> str:
    place = place_at(path)
    about = place.node.get("description", "") if place else ""
    where = f"under {'.'.join(path[:-1])}" if len(path) > 1 else "at the top level"
    accepted = f"; accepts {place.describe()}" if place else ""
    return f"missing; add `{path[-1]}:` {where}{accepted}" + (f" ({about.rstrip('.')})" if about else "")


def _explain_value(path: KeyPath, value: Any) -> str:
    place = place_at(path) or Place({})
    if value is None and place.keys:
        return f"is empty; write its keys ({', '.join(place.keys)}) beneath it, or remove it"
    shown = json.dumps(value, default=str, ensure_ascii=False)
    if len(shown) > _LONGEST_VALUE:
        shown = shown[: _LONGEST_VALUE - 3] + "..."
    hint = _hint(place, value)
    return f"got {shown}; accepts {place.describe()}" + (f"; {hint}" if hint else "")


def _hint(place: Place, value: Any) -> str:
    kinds = {branch.get("type") for branch in place.branches}
    choices = [str(choice) for choice in place.choices]
    if value is None and "none" in choices:
        return "did you mean none?"
    if isinstance(value, float) and not math.isfinite(value):
        return "it must be finite"
    if not isinstance(value, str):
        return ""
    if not value:
        return "it must not be empty"
    if re.search("[\ud800-\udfff]", value):
        return "it is not UTF-8; rename the file or folder"
    near = nearest(value, choices) or (_SPOKEN.get(value.lower()) if "boolean" in kinds else None)
    if near:
        return f"did you mean {near}?"
    if kinds & {"integer", "number", "boolean"} and not isinstance(_as_yaml(value), str):
        return "remove the quotes"
    return f"write {_as_list(place, value)}" if "array" in kinds else ""


def _as_list(place: Place, value: str) -> str:
    """A list of one item that `value` was meant for: of its section's one required key, if the items are sections."""
    items = place.below(0)
    required = [key for branch in items.branches for key in branch.get("required", ())] if items else []
    return f"[{{{required[0]}: {value}}}]" if len(required) == 1 else f"[{value}]"


def _as_yaml(text: str) -> Any:
    try:
        return parse_yaml(text).value
    except YamlError:
        return text


def _value_at(data: Any, path: KeyPath) -> Any:
    for piece in path:
        if isinstance(data, list):
            data = data[int(piece)]
        elif isinstance(data, dict):
            data = data.get(piece)
    return data
