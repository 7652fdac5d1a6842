"""The recipes that come with the project: in a checkout's `recipes/`, or in an installed package's data."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

from finetune.errors import RecipeError
from finetune.recipe.load import load_recipe, read_document
from finetune.recipe.paths import path_values
from finetune.recipe.schema import QUANTIZED_4BIT, Recipe
from finetune.recipe.suggest import nearest

_PACKAGE = Path(__file__).resolve().parents[1]
_DIRECTIVE = "yaml-language-server:"  # tells editors the schema
_SUFFIXES = (".yaml", ".yml")
NOT_MEASURED = "not measured"


def shipped_root() -> Path:
    """The directory that holds `recipes/` and `data/`: the checkout, else the package's own copy."""
    checkout = _PACKAGE.parent
    if (checkout / "pyproject.toml").is_file() and (checkout / "recipes").is_dir():
        return checkout
    return _PACKAGE / "_shipped"


def shipped_recipes() -> dict[str, Path]:
    """Name to file of every shipped recipe, sorted; a recipe in a subfolder is named `folder/name`."""
    folder = shipped_root() / "recipes"
    files = sorted(path for path in folder.rglob("*") if path.suffix in _SUFFIXES)
    return {path.relative_to(folder).with_suffix("").as_posix(): path for path in files}


def find_recipe(text: str) -> Path:
    """The recipe that `text` names: a file, or a shipped recipe by name (`x`) or by path (`recipes/x.yaml`).

    Raises:
        RecipeError: there is neither such a file nor such a shipped recipe.
    """
    path = Path(text).expanduser()
    if path.is_file():
        return path
    shipped = shipped_recipes()
    name = text.removeprefix("./").removeprefix("recipes/")
    for suffix in _SUFFIXES:
        name = name.removesuffix(suffix)
    if name in shipped:
        return shipped[name]
    if path.is_dir():
        raise RecipeError(f"{text}: is a directory; name the recipe in it")
    near = nearest(name, shipped)
    hint = (
        f"did you mean {near}?"
        if near
        else "`finetune recipes` lists those that are shipped, `finetune new` writes one for your data"
    )
    raise RecipeError(f"{text}: there is no such file and no shipped recipe of that name; {hint}")


@dataclass(frozen=True)
class ShippedRecipe:
    """A shipped recipe as the gallery shows it: its opening comment, and what its keys say."""

    name: str
    purpose: str
    model: str
    method: str
    hardware: str
    time: str
    """`not measured` where the recipe says so, as for the next two."""
    memory: str
    result: str


def describe_recipe(name: str, path: Path) -> ShippedRecipe:
    """What a recipe's opening comment and keys say of it."""
    said = _opening(path)
    recipe = load_recipe(path)
    measured = said.get("Measured", "")
    is_measured = bool(measured) and not measured.startswith(NOT_MEASURED)
    # The rest of a line that was not measured is why, or what is expected; neither is a result.
    time = re.search(r"[\d.]+ (?:s|min|minutes|h|hours)\b(?: \d+ (?:min|s)\b)?", measured) if is_measured else None
    memory = re.search(r"[\d.]+ [GM]B\b", measured) if is_measured else None
    quantization = recipe.model.quantization
    method = ["QLoRA" if quantization in QUANTIZED_4BIT else "LoRA", f"rank {recipe.adapter.rank}"]
    method += [quantization] if quantization != "none" else []
    method += [f"{recipe.distributed.strategy} on {recipe.distributed.devices}"] if _is_spread(recipe) else []
    return ShippedRecipe(
        name=name,
        purpose=said.get("Purpose", ""),
        model=recipe.model.name,
        method=", ".join(method),
        hardware=said.get("Hardware", "").rstrip("."),
        time=time[0] if time else NOT_MEASURED,
        memory=memory[0] if memory else NOT_MEASURED,
        result=measured.partition(";")[0].rstrip(".") if is_measured else NOT_MEASURED,
    )


def _is_spread(recipe: Recipe) -> bool:
    return recipe.distributed.devices not in ("auto", 1)


def _opening(path: Path) -> dict[str, str]:
    """The labelled lines of a recipe's opening comment: `# Purpose:  ...`."""
    said: dict[str, str] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        label, colon, text = line.strip("# ").partition(":")
        if colon and label.isalpha():
            said[label] = text.strip()
    return said


def copied_text(path: Path) -> str:
    """A recipe's text for another folder: its relative paths written absolute, all else kept.

    Raises:
        RecipeError: the file cannot be read.
    """
    document = read_document(path)
    text = path.read_text(encoding="utf-8-sig")
    edits: list[tuple[int, int, str]] = []
    for value in path_values(document.value):
        absolute = value.absolute(path.parent)
        if absolute != value.text and not Path(value.text).is_absolute() and value.path in document.spans:
            edits.append((*document.spans[value.path], absolute))
    for start, end, absolute in sorted(edits, reverse=True):
        text = text[:start] + json.dumps(absolute, ensure_ascii=False) + text[end:]
    schema = _PACKAGE / "recipe" / "schema.json"
    return re.sub(rf"^# {_DIRECTIVE} \$schema=.*$", lambda _: f"# {_DIRECTIVE} $schema={schema}", text, flags=re.M)
