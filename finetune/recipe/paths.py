"""Which values of a recipe are local paths, and what they are relative to."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from finetune.recipe.lines import KeyPath
from finetune.recipe.overrides import Origins

_MODEL_SUFFIXES = (".gguf",)
_DATA_SUFFIXES = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".txt", ".gz", ".zst")
_TEMPLATE_SUFFIXES = (".jinja", ".jinja2")
_GLOB = frozenset("*?[")


class PathValue(NamedTuple):
    """A key whose text may name a local file."""

    path: KeyPath
    section: dict[str, Any]
    suffixes: tuple[str, ...]  # endings that only a local file has
    may_exist: bool = True  # whether a bare word that exists beside the recipe is that file

    @property
    def text(self) -> str:
        """The value."""
        return str(self.section[self.path[-1]])

    def absolute(self, base: Path) -> str:
        """The value as an absolute path if it names something local; hub ids and `scheme://` stay."""
        if "://" in self.text:
            return self.text
        local = os.path.join(base.absolute(), os.path.expanduser(self.text))
        looks_local = self.text.startswith(("./", "../", "/", "~")) or self.text in (".", "..")
        has_suffix = self.text.lower().endswith(self.suffixes)
        exists = self.may_exist and (bool(_GLOB & set(self.text)) or os.path.exists(local))
        if looks_local or has_suffix or exists:
            return _normal(local)
        return self.text


def _normal(path: str) -> str:
    """Without `.` and `..`; behind a linked folder `..` is the parent of what the link names, as the system has it."""
    parent = re.fullmatch(r"(.*/\.\.)(/.*)?", path, re.DOTALL)
    if parent and os.path.realpath(parent[1]) != os.path.realpath(os.path.normpath(parent[1])):
        path = os.path.realpath(parent[1]) + (parent[2] or "")
    return os.path.normpath(path)


def resolve_paths(data: dict[str, Any], recipe_file: Path, origins: Origins) -> None:
    """Make the local paths in `data` absolute.

    Those of the file are relative to it, those of overrides to the working directory.
    """
    for value in path_values(data):
        base = recipe_file.parent if origins.override_of(value.path) is None else Path()
        value.section[value.path[-1]] = value.absolute(base)


def path_values(data: dict[str, Any]) -> Iterator[PathValue]:
    """The values in `data` that may be local paths: models, adapters, data sources and the template."""
    model, sources = ("model",), _get(data, "data", "sources")
    places = [
        PathValue((*model, "name"), _get(data, *model), _MODEL_SUFFIXES),
        PathValue((*model, "tokenizer"), _get(data, *model), ()),
        PathValue(("adapter", "start_from"), _get(data, "adapter"), ()),
        PathValue(("data", "template"), _get(data, "data"), _TEMPLATE_SUFFIXES, may_exist=False),
    ]
    for index, source in enumerate(sources if isinstance(sources, list) else ()):
        places.append(PathValue(("data", "sources", str(index), "path"), source, _DATA_SUFFIXES))
    for above in (("data", "validation", "source"), ("evaluation", "source")):
        places.append(PathValue((*above, "path"), _get(data, *above), _DATA_SUFFIXES))
    for place in places:
        if isinstance(place.section, dict) and isinstance(place.section.get(place.path[-1]), str) and place.text:
            yield place


def _get(data: Any, *keys: str) -> Any:
    for key in keys:
        data = data.get(key) if isinstance(data, dict) else None
    return data
