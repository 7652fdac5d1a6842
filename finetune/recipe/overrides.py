"""Overrides from the command line (`training.optimizer.lr=1e-3`), and what set a key: file or override."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from finetune.recipe.lines import KeyPath, YamlError, parse_yaml

FORM = "write KEY.PATH=VALUE, e.g. training.optimizer.lr=1e-3"


@dataclass(frozen=True)
class Override:
    """One `KEY.PATH=VALUE`, its value read as YAML."""

    text: str
    path: KeyPath
    value: Any


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with a recipe: what is said, after the key that it is said of."""

    path: KeyPath
    text: str


@dataclass(frozen=True)
class Origins:
    """Where the value at a key path came from: a line of the file or an override."""

    file: str
    lines: dict[KeyPath, int]
    overrides: Sequence[Override] = ()

    def override_of(self, path: KeyPath) -> int | None:
        """The position of the override that set `path`, or something beneath a key that the file lacks."""
        for position in range(len(self.overrides) - 1, -1, -1):
            given = self.overrides[position].path
            if path[: len(given)] == given or (path and path not in self.lines and given[: len(path)] == path):
                return position
        return None

    def line_of(self, path: KeyPath) -> int:
        """The line of `path`, or of the section that it would stand in."""
        while path and path not in self.lines:
            path = path[:-1]
        return self.lines.get(path, 1)

    def describe(self, problem: Problem) -> str:
        """The problem as one line that opens with `file:line` or with the override."""
        key = ".".join(problem.path)
        position = self.override_of(problem.path)
        if position is None:
            return f"{self.file}:{self.line_of(problem.path)}: {key}: {problem.text}"
        override = self.overrides[position]
        named = "" if override.path == problem.path else f"{key}: "
        return f"override {override.text}: {named}{problem.text}"

    def order(self, problem: Problem) -> tuple[int, int]:
        """What sorts problems by line, those of overrides last."""
        position = self.override_of(problem.path)
        return (0, self.line_of(problem.path)) if position is None else (1, position)


def override_path(text: str) -> KeyPath:
    """The key path of `KEY.PATH=VALUE`; messages write data.sources[0].path, which is data.sources.0.path."""
    key = re.sub(r"\[(\d+)\]", r".\1", text.partition("=")[0])
    return tuple(piece.strip() for piece in key.split("."))


def parse_override(text: str) -> Override:
    """Split `KEY.PATH=VALUE` and read the value as YAML; an empty value is null.

    Raises:
        ValueError: there is no `=`, an empty part in the path, or the value is not YAML.
    """
    _, equals, value = text.partition("=")
    path = override_path(text)
    if not equals or not all(path):
        raise ValueError(FORM)
    try:
        return Override(text, path, parse_yaml(value).value)
    except YamlError as error:
        raise ValueError(f"the value is not YAML: {error.problem}") from None


def apply_override(recipe: dict[str, Any], override: Override) -> None:
    """Set the override's value in `recipe`, creating sections on the way; one past a list's end appends.

    Raises:
        ValueError: a part of the path is beneath a value, or an index is out of range.
    """
    at: Any = recipe
    for position, piece in enumerate(override.path):
        last = position == len(override.path) - 1
        where = ".".join(override.path[:position])
        if isinstance(at, list):
            if not piece.isdecimal() or int(piece) > len(at):
                raise ValueError(f"{where} is a list; give an index from 0 to {len(at)}, not {piece}")
            if int(piece) == len(at):
                at.append(None)
            key: Any = int(piece)
        elif isinstance(at, dict):
            key = piece
        else:
            raise ValueError(f"{where} is the value {at!r}, which has no keys beneath it")
        if last:
            at[key] = override.value
            return
        below = at[key] if isinstance(at, list) else at.get(key)
        if below is None:
            below = [] if override.path[position + 1].isdecimal() else {}
            at[key] = below
        at = below
