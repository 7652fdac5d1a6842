"""Local files of a recipe that has moved, as one that was pushed and pulled: where they are on this machine."""

from __future__ import annotations

from collections.abc import Set
from json import dumps
from pathlib import Path

from finetune.recipe.load import load_recipe, read_document
from finetune.recipe.paths import PathValue, path_values
from finetune.recipe.schema import Recipe
from finetune.recipe.shipped import shipped_root


def load_moved_recipe(path: Path) -> Recipe:
    """The recipe at `path`, with its local files where they are found here; the others keep the name given.

    Raises:
        RecipeError: as `load_recipe`.
    """
    return load_recipe(path, find_files(path)[0], was_run=True)


def find_files(path: Path, taken: Set[str] = frozenset()) -> tuple[list[str], list[PathValue]]:
    """Overrides for local files that are not where the recipe at `path` says, and the values found nowhere.

    They are looked for beside the recipe, in the project's own data and in the working directory; keys in `taken`
    are left out.
    """
    found, missing = [], []
    for value in path_values(read_document(path).value):
        key = ".".join(value.path)
        if value.path == ("data", "template") or any(key == one or key.startswith(f"{one}.") for one in taken):
            continue
        if "://" in value.text or not _is_local(value.text, value.suffixes):
            continue
        places = [Path(value.absolute(path.parent)), shipped_root() / value.text, Path.cwd() / value.text]
        place = next((place for place in places if _exists(place)), None)
        if place is None:
            missing.append(value)
        elif place != places[0]:
            found.append(f"{key}={dumps(str(place), ensure_ascii=False)}")
    return found, missing


def _is_local(text: str, suffixes: tuple[str, ...]) -> bool:
    return text.startswith((".", "/", "~")) or text.lower().endswith(suffixes) or any(mark in text for mark in "*?[")


def _exists(path: Path) -> bool:
    return any(path.parent.glob(path.name)) if any(mark in path.name for mark in "*?[") else path.exists()
