"""Reads a recipe: file and overrides in, a checked `Recipe` out, or every mistake at once with its line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from finetune.errors import RecipeError
from finetune.recipe.checks import find_conflicts
from finetune.recipe.explain import explain
from finetune.recipe.lines import Document, RecipeDumper, YamlError, parse_yaml
from finetune.recipe.overrides import Origins, Override, Problem, apply_override, parse_override
from finetune.recipe.paths import resolve_paths
from finetune.recipe.schema import Recipe


def load_recipe(path: str | Path, overrides: Sequence[str] = (), *, was_run: bool = False) -> Recipe:
    """The checked recipe of a YAML file, with `KEY.PATH=VALUE` overrides applied and local paths absolute.

    `was_run`: an earlier version ran it, and combinations that are refused since keep nobody from its adapter.

    Raises:
        RecipeError: the file cannot be read, or anything in it or in an override is wrong; one line a
            mistake, in the order of the file.
    """
    document = read_document(path)
    data = _copy(document.value)
    applied, mistakes = _apply(data, overrides)
    origins = Origins(str(path), document.lines, applied)
    resolve_paths(data, Path(path), origins)
    problems = [
        Problem(key, f"given twice, first on line {first}; keep one of the two")
        for key, _, first in document.duplicates
    ]
    recipe = None
    try:
        recipe = Recipe.model_validate(data)
        problems += [] if was_run else find_conflicts(recipe)
    except ValidationError as error:
        problems += explain(error, data)
    lines = [origins.describe(problem) for problem in sorted(problems, key=origins.order)] + mistakes
    if lines or recipe is None:
        raise RecipeError("\n".join(dict.fromkeys(lines)))
    return recipe


def read_document(path: str | Path) -> Document:
    """A recipe file as plain values with the line of every key, before it is checked.

    Raises:
        RecipeError: the file cannot be read, is not YAML, or is not a mapping of keys to values.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        document = parse_yaml(text)
    except FileNotFoundError:
        raise RecipeError(f"{path}: there is no such file") from None
    except IsADirectoryError:
        raise RecipeError(f"{path}: is a directory; name the recipe in it") from None
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise RecipeError(f"{path}:{line}: is not UTF-8 text ({error.reason}); save it as UTF-8") from None
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read: {error.strerror}") from None
    except YamlError as error:
        raise RecipeError(f"{path}:{error.line}:{error.column}: is not valid YAML: {error.problem}") from None
    if document.value is None:
        raise RecipeError(f"{path}:1: is empty; a recipe needs name, model, data and training")
    if not isinstance(document.value, dict):
        kind = "a list" if isinstance(document.value, list) else "a single value"
        raise RecipeError(f"{path}:1: is {kind}; a recipe is a mapping such as `name: my-run`")
    return document


def _copy(value: Any) -> Any:
    """A deep copy that shares nothing: YAML aliases do share, and an override changes one place only."""
    if isinstance(value, dict):
        return {key: _copy(below) for key, below in value.items()}
    return [_copy(below) for below in value] if isinstance(value, list) else value


def _apply(data: dict[str, Any], overrides: Sequence[str]) -> tuple[list[Override], list[str]]:
    """The overrides that were applied to `data`, and a line for each one that cannot be."""
    applied: list[Override] = []
    mistakes: list[str] = []
    for text in overrides:
        try:
            override = parse_override(text)
            apply_override(data, override)
            applied.append(override)
        except ValueError as error:
            mistakes.append(f"override {text}: {error}")
    return applied, mistakes


def dump_recipe(recipe: Recipe) -> str:
    """The recipe as YAML with every default written out; `load_recipe` reads back an equal one."""
    return yaml.dump(
        recipe.model_dump(mode="json"), Dumper=RecipeDumper, sort_keys=False, allow_unicode=True, width=110
    )
