"""From a pushed adapter, or an adapter's directory, back to the run that made it: recipe, revisions, fingerprints."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.console import say, warn
from finetune.errors import BadInputError, ModelError
from finetune.export.hub_contents import name_base
from finetune.export.places import ADAPTER_CONFIG
from finetune.recipe.hub_address import HUB_SCHEME, resolve_repo
from finetune.recipe.load import load_recipe
from finetune.recipe.moved import find_files
from finetune.recipe.overrides import override_path
from finetune.run_dir import FINGERPRINTS, RECIPE, RunDir

_SMALL_FILES = (RECIPE, FINGERPRINTS, "adapter_config.json", "chat_template.jinja", "*token*.json", "tokenizer*")
# Overrides of these may change what a run is made from.
_SHAPING = ("model", "data")


@dataclass(frozen=True)
class Provenance:
    """A run that can be made again: `load_recipe(recipe, [*overrides, *the user's own])` is its recipe."""

    given: str
    recipe: Path
    overrides: list[str]
    """The base's commit, files that stand elsewhere here, a name of its own, and no push."""
    fingerprints: dict[str, Any]


def is_provenance(text: str) -> bool:
    """Whether `text` names a pushed repository or a directory that holds an adapter's or a run's recipe."""
    return text.startswith(HUB_SCHEME) or (Path(text).expanduser() / RECIPE).is_file()


def load_provenance(
    given: str, overrides: Sequence[str] = (), *, endpoint: str | None = None, token: str | None = None
) -> Provenance:
    """What is needed to make a run again from `given`: hf://ORG/NAME[@REVISION], an adapter's directory, or a run's.

    Local files that the recipe names are looked for beside it, in the project's own data and in the working
    directory, unless the user's `overrides` name them; the fingerprints decide whether they are the right ones.

    Raises:
        BadInputError: it holds no recipe, or a file that the recipe names is nowhere to be found.
        FinetuneError: the Hub cannot provide it.
    """
    if given.startswith(HUB_SCHEME):
        folder = resolve_repo(given, endpoint=endpoint, token=token, patterns=_SMALL_FILES)
    else:
        folder = Path(given).expanduser().resolve()
        if not (folder / ADAPTER_CONFIG).is_file() and RunDir(folder).adapter.is_dir():
            folder = RunDir(folder).adapter
    path = folder / RECIPE
    if not path.is_file():
        raise ModelError(f"{given}: holds no recipe.yaml, so it was not made by finetune; give a recipe instead")
    fingerprints = _read_fingerprints(folder / FINGERPRINTS)
    recipe = load_recipe(path, was_run=True)
    base = name_base(recipe, fingerprints)
    found = [f"name={recipe.name}-again", "hub.push=false"]
    taken = {".".join(override_path(override)) for override in overrides}
    pinned = base.on_hub and base.revision is not None and recipe.model.gguf_file is None
    if pinned and not taken & {"model", "model.name", "model.revision"}:
        found.append(f"model.revision={json.dumps(base.revision)}")
    moved, missing = find_files(path, taken)
    for value in missing:
        key = ".".join(value.path)
        raise BadInputError(
            f"{given}: {key}: {value.text} was a file of the machine that trained it and is not here; "
            f"give yours: finetune run {given} {key}=PATH"
        )
    found += moved
    if not fingerprints:
        warn(f"{given}: holds no fingerprints, so it cannot be told whether base and data are the same")
    return Provenance(given, path, found, fingerprints)


def check_fingerprints(provenance: Provenance, actual: Mapping[str, Any], overrides: Sequence[str] = ()) -> None:
    """Compare base and data of the run about to start (`actual`) with those of the run that is made again.

    A difference stops the run, unless the user's `overrides` change model or data: then it is said.

    Raises:
        BadInputError: base or data are not the same.
    """
    differences = compare_fingerprints(provenance.fingerprints, actual)
    if not differences:
        if provenance.fingerprints:
            say(f"base and data are those of {provenance.given}")
        return
    text = f"this is not the run of {provenance.given}:\n" + "\n".join(f"  {line}" for line in differences)
    paths = [override_path(override) for override in overrides]
    if any(path[0] in _SHAPING or path[:2] == ("adapter", "start_from") for path in paths):
        warn(f"{text}\n  It goes on, because model or data are overridden.")
        return
    raise BadInputError(f"{text}\n  To train on what is here instead, run the recipe itself: {provenance.recipe}")


def compare_fingerprints(expected: Mapping[str, Any], actual: Mapping[str, Any]) -> list[str]:
    """One line for each part of `expected` (base, training and validation data) that `actual` does not match."""
    lines = []
    old, new = expected.get("base") or {}, actual.get("base") or {}
    if old and old.get("sha256") != new.get("sha256"):
        lines.append(f"base model: {_describe(old)} then, {_describe(new)} now")
    old, new = expected.get("data") or {}, actual.get("data") or {}
    for part, label in (("train", "training data"), ("validation", "validation data")):
        if part in old and old[part] != new.get(part):
            lines.append(f"{label}: samples of hash {_short(old[part])} then, {_short(new.get(part))} now")
    if "start" in expected and expected["start"] != actual.get("start"):
        lines.append(
            f"adapter.start_from: weights of hash {_short(expected['start'])} then, {_short(actual.get('start'))} now"
        )
    return lines


def _describe(base: Mapping[str, Any]) -> str:
    revision = f" at {base['revision'][:12]}" if base.get("revision") else ""
    return f"{base.get('name')}{revision} (hash {_short(base.get('sha256'))})"


def _short(value: Any) -> str:
    return str(value)[:12] if value else "none"


def _read_fingerprints(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
