"""The schema as a tree of key paths: which keys a section has, and what a key accepts, in words."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

from finetune.recipe.lines import KeyPath
from finetune.recipe.schema import Recipe


@cache
def json_schema() -> dict[str, Any]:
    """The recipe's JSON schema as pydantic writes it."""
    return Recipe.model_json_schema()


@dataclass(frozen=True)
class Place:
    """What the schema has at one key path: a JSON schema node."""

    node: dict[str, Any]

    @property
    def branches(self) -> list[dict[str, Any]]:
        """The alternatives of a union, references followed; one where there is no union."""
        node = self.node
        if "$ref" in node:
            return Place(json_schema()["$defs"][node["$ref"].rsplit("/", 1)[-1]]).branches
        options = node.get("anyOf") or node.get("oneOf")
        return [branch for option in options for branch in Place(option).branches] if options else [node]

    @property
    def keys(self) -> dict[str, Place]:
        """The keys of a section; empty for a value."""
        return {key: Place(node) for branch in self.branches for key, node in branch.get("properties", {}).items()}

    @property
    def takes_any_key(self) -> bool:
        """Whether it is a mapping whose keys the recipe makes up."""
        return any(isinstance(branch.get("additionalProperties"), dict) for branch in self.branches)

    @property
    def choices(self) -> list[Any]:
        """The values of a closed choice; empty where others are accepted as well as none."""
        return [
            choice
            for branch in self.branches
            for choice in branch.get("enum", [branch["const"]] if "const" in branch else [])
        ]

    def below(self, piece: str | int) -> Place | None:
        """The place one key or list index further down; None where the schema has nothing there."""
        if str(piece) in self.keys:
            return self.keys[str(piece)]
        for branch in self.branches:
            if str(piece).isdecimal() and branch.get("type") == "array":
                items = branch.get("prefixItems", [])
                return Place(items[int(piece)] if int(piece) < len(items) else branch.get("items", {}))
            if isinstance(branch.get("additionalProperties"), dict):
                return Place(branch["additionalProperties"])
        return None

    def describe(self) -> str:
        """What is accepted here, in words."""
        words = [_describe(branch) for branch in self.branches]
        return ", or ".join(dict.fromkeys(words))


def root() -> Place:
    """The top of the recipe."""
    return Place(json_schema())


def place_at(path: KeyPath) -> Place | None:
    """What the schema has at `path`; None where it has nothing."""
    place: Place | None = root()
    for piece in path:
        place = place.below(piece) if place else None
    return place


def follow(location: tuple[str | int, ...], unknown_last: bool = False) -> KeyPath:
    """The key path of a pydantic error's location: without the names of union branches that it contains."""
    path: list[str] = []
    place = root()
    for position, piece in enumerate(location):
        below = place.below(piece)
        if below is not None:
            path.append(str(piece))
            place = below
        elif unknown_last and position == len(location) - 1:
            path.append(str(piece))
    return tuple(path)


@cache
def all_keys() -> tuple[str, ...]:
    """Every key of the schema with its section, dotted; the first item stands for a list's items."""
    return tuple(_walk(root(), ""))


def _walk(place: Place, prefix: str) -> Iterator[str]:
    for key, below in place.keys.items():
        yield prefix + key
        yield from _walk(below, f"{prefix}{key}.")
        item = below.below(0)
        if item is not None and item.keys:
            yield from _walk(item, f"{prefix}{key}.0.")


def _describe(node: dict[str, Any]) -> str:
    if "enum" in node or "const" in node:
        choices = [str(choice) for choice in node.get("enum", [node.get("const")])]
        return choices[0] if len(choices) == 1 else "one of " + ", ".join(choices)
    kind = node.get("type")
    if kind in ("integer", "number"):
        return ("an integer" if kind == "integer" else "a number") + _describe_bounds(node)
    if node.get("format") == "date":
        return "a date (YYYY-MM-DD)"
    if kind == "string":
        return f"text that matches {node['pattern']}" if "pattern" in node else "text"
    if kind == "array":
        items = node.get("prefixItems", [node.get("items", {})])
        size = len(items) if "prefixItems" in node else node.get("minItems")
        exact = "" if "prefixItems" in node else "at least "
        return f"a list{f' of {exact}{size}' if size else ''} (each item: {Place(items[0]).describe()})"
    if kind == "object" and "properties" in node:
        return "a section with the keys " + ", ".join(node["properties"])
    if kind == "object":
        return f"a mapping of names, each to {Place(node['additionalProperties']).describe()}"
    return {"boolean": "true or false", "null": "null"}.get(str(kind), "any value")


def _describe_bounds(node: dict[str, Any]) -> str:
    low = ""
    if "exclusiveMinimum" in node:
        low = f" above {_number(node['exclusiveMinimum'])}"
    elif "minimum" in node:
        low = f" from {_number(node['minimum'])}"
    if "exclusiveMaximum" in node:
        return f"{low} and below {_number(node['exclusiveMaximum'])}"
    if "maximum" not in node:
        return low
    return f"{low}{', at most' if 'exclusiveMinimum' in node else ' to'} {_number(node['maximum'])}"


def _number(bound: float) -> str:
    return str(bound) if isinstance(bound, int) else f"{bound:g}"  # %g rounds to six digits


def flatten(value: Any, *, split_lists: bool = False, prefix: str = "") -> dict[str, Any]:
    """Dotted key to value for every leaf of nested mappings and lists of mappings.

    Other lists are leaves, or with `split_lists` have one for each item.
    """
    children: list[tuple[Any, Any]] = []
    if isinstance(value, dict):
        children = list(value.items())
    elif isinstance(value, list) and value and (split_lists or isinstance(value[0], dict)):
        children = list(enumerate(value))
    if not children:
        return {prefix: value}
    leaves: dict[str, Any] = {}
    for key, below in children:
        leaves |= flatten(below, split_lists=split_lists, prefix=f"{prefix}.{key}" if prefix else str(key))
    return leaves
