"""`finetune recipes`: lists the shipped recipes and copies one to start from."""

from __future__ import annotations

import json
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.errors import EXIT_OK, BadInputError, RecipeError

if TYPE_CHECKING:
    from finetune.recipe.shipped import ShippedRecipe


def configure(parser: ArgumentParser) -> None:
    """Add the command's arguments."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION")
    show = actions.add_parser("list", help="list the shipped recipes (the default)")
    show.add_argument("--json", action="store_true", help="print them as JSON")
    copy = actions.add_parser("copy", help="copy one to edit", description="Copy a shipped recipe to edit.")
    copy.add_argument("name", metavar="NAME", help="a name from the list")
    copy.add_argument("dest", metavar="DEST", nargs="?", type=Path, default=Path(), help="file or folder (default: .)")
    copy.add_argument("--force", action="store_true", help="overwrite DEST")


def run(arguments: Namespace) -> int:
    """List the shipped recipes, or copy one."""
    if arguments.action == "copy":
        print(_copy(arguments.name, arguments.dest, arguments.force))
    else:
        recipes = _gallery()
        as_json = getattr(arguments, "json", False)
        print(json.dumps([vars(recipe) for recipe in recipes], indent=2) if as_json else "\n".join(map(_show, recipes)))
    return EXIT_OK


def _gallery() -> list[ShippedRecipe]:
    from finetune.recipe.shipped import describe_recipe, shipped_recipes

    recipes = shipped_recipes()
    if not recipes:
        raise RecipeError("no shipped recipes were found; the installation is incomplete")
    return [describe_recipe(name, path) for name, path in recipes.items()]


def _show(recipe: ShippedRecipe) -> str:
    """Some lines: they read well on any width, where a table of seven columns would not."""
    rows = [("model", recipe.model), ("method", recipe.method), ("hardware", recipe.hardware)]
    measured = [recipe.time, recipe.memory, recipe.result]
    if set(measured) == {"not measured"}:
        rows.append(("result", "not measured"))
    else:
        rows += zip(("time", "memory", "result"), measured, strict=True)
    lines = [f"  {label:<10}{value}" for label, value in rows if value]
    return "\n".join([f"{recipe.name}  {recipe.purpose}".rstrip(), *lines, ""])


def _copy(name: str, dest: Path, force: bool) -> Path:
    """Copy the recipe and return where it went; its relative paths are written absolute, so it still runs."""
    from finetune.files import write_atomic
    from finetune.recipe.shipped import copied_text, find_recipe

    source = find_recipe(name)
    target = dest / source.name if dest.is_dir() else dest
    if target.exists() and not force:
        raise BadInputError(f"{target} exists; name another file, or pass --force to overwrite it")
    if not target.parent.is_dir():
        raise BadInputError(f"{target}: cannot be written: there is no directory {target.parent}")
    try:
        write_atomic(target, copied_text(source))
    except OSError as error:
        raise BadInputError(f"{target}: cannot be written: {error.strerror}") from None
    return target
