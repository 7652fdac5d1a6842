"""Licences of the base and of the data, as far as they are known: from the Hub, a package, or a README nearby."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from finetune.recipe.schema import Recipe

# (repository, "model" or "dataset") to the licence that its card states.
Lookup = Callable[[str, str], str | None]

# Source: the Hub's documentation, "Licenses": identifiers that are also SPDX's, in lower case.
_IDENTIFIERS = {
    *("apache-2.0", "mit", "bsd", "bsd-2-clause", "bsd-3-clause", "isc", "unlicense", "zlib", "artistic-2.0"),
    *("gpl", "gpl-2.0", "gpl-3.0", "lgpl", "lgpl-2.1", "lgpl-3.0", "agpl-3.0", "mpl-2.0", "epl-2.0", "eupl-1.2"),
    *("cc0-1.0", "cc-by-2.0", "cc-by-3.0", "cc-by-4.0", "cc-by-sa-3.0", "cc-by-sa-4.0", "cc-by-nc-4.0", "odbl"),
    *("cc-by-nd-4.0", "cc-by-nc-nd-4.0", "cc-by-nc-sa-4.0", "openrail", "gemma", "pddl", "odc-by"),
    *("llama2", "llama3", "llama3.1", "llama3.2", "llama3.3", "llama4"),
}
_HEADING = re.compile(r"^#+ *licen[cs]e\b.*\n+(.+?)(?:\n\s*\n|\n#|\Z)", re.IGNORECASE | re.MULTILINE | re.DOTALL)
_LONGEST_STATEMENT = 300


@dataclass(frozen=True)
class Licences:
    """What is known; None where nothing is."""

    base: str | None = None
    data: dict[str, str | None] = field(default_factory=dict)
    """By a source's `path` in the recipe as it was run."""

    @property
    def identifier(self) -> str | None:
        """The base's licence in the form that the Hub's metadata takes."""
        text = (self.base or "").strip().lower()
        return text if text in _IDENTIFIERS else None


def find_licences(recipe: Recipe, base_id: str | None, lookup: Lookup | None) -> Licences:
    """Licences of the recipe's base (`base_id`, where it is a hub model) and of its data sources.

    `lookup` asks the Hub; without it only this machine is asked.
    """
    name = recipe.model.name
    if base_id is not None:
        base = lookup(base_id, "model") if lookup else None
    elif name.startswith("package://"):
        base = _of_package(name.removeprefix("package://").partition("/")[0])
    else:
        base = _near(Path(name))
    data: dict[str, str | None] = {}
    for source in recipe.data.sources:
        path = Path(source.path)
        if path.is_absolute():
            data[source.path] = _near(path)
        else:
            data[source.path] = lookup(source.path, "dataset") if lookup else None
    return Licences(base, data)


def _of_package(package: str) -> str | None:
    for distribution in metadata.packages_distributions().get(package, ()):
        about: Any = metadata.metadata(distribution)
        for key in ("License-Expression", "License"):
            stated = about.get(key)
            if stated and "\n" not in stated.strip():
                return str(stated).strip()
    return None


def _near(path: Path) -> str | None:
    """What a README beside a file, or in a folder, states: its metadata, else its section on the licence."""
    readme = (path if path.is_dir() else path.parent) / "README.md"
    if not readme.is_file():
        return None
    text = readme.read_text(encoding="utf-8", errors="replace")
    if text.startswith("---\n") and (end := text.find("\n---", 4)) > 0:
        try:
            stated = yaml.safe_load(text[4:end])
        except yaml.YAMLError:
            stated = None
        if isinstance(stated, dict) and isinstance(stated.get("license"), str):
            return str(stated["license"])
    if match := _HEADING.search(text):
        statement = " ".join(match.group(1).split())
        return statement if len(statement) <= _LONGEST_STATEMENT else None
    return None
