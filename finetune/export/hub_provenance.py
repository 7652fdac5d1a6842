"""From a pushed adapter, or an adapter's directory, back to the run that made it: recipe, revisions, fingerprints."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.console import say, warn
from finetune.errors import BadInputError, ModelError
from finetune.export.hub_client import HubClient
from finetune.export.hub_contents import ADAPTER_CONFIG, FINGERPRINTS, RECIPE, name_base
from finetune.recipe.load import load_recipe, read_document
from finetune.recipe.paths import path_values
from finetune.recipe.shipped import shipped_root
from finetune.run_dir import RunDir

HUB_SCHEME = "hf://"
_ADDRESS = re.compile(r"hf://([\w.-]+/[\w.-]+?)(?:@([\w./-]+))?/?")
# What an adapter's repository holds; a merged model or a GGUF file beside it is not fetched.
_ADAPTER_FILES = ("adapter_*", "*.json", "*.yaml", "*.jinja", "*.model", "*.txt", "README.md")
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


def resolve_repo(
    address: str,
    *,
    endpoint: str | None = None,
    token: str | None = None,
    patterns: Sequence[str] = _ADAPTER_FILES,
) -> Path:
    """The local folder of `hf://ORG/NAME[@REVISION]`, its adapter's files downloaded into the Hub's cache.

    Raises:
        BadInputError: the address is malformed.
        FinetuneError: there is no such repository or revision, no access, or no network and nothing cached.
    """
    match = _ADDRESS.fullmatch(address)
    if match is None:
        raise BadInputError(f"{address}: write it as hf://ORG/NAME, or hf://ORG/NAME@REVISION")
    from huggingface_hub import snapshot_download

    repo_id, revision = match.groups()
    client = HubClient(endpoint=endpoint, token=token)

    def download() -> str:
        return snapshot_download(
            repo_id, revision=revision, endpoint=endpoint, token=token, allow_patterns=list(patterns), max_workers=4
        )

    return Path(client.call(repo_id, download))


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
    recipe = load_recipe(path)
    base = name_base(recipe, fingerprints)
    found = [f"name={recipe.name}-again", "hub.push=false"]
    taken = {override.partition("=")[0].strip() for override in overrides}
    pinned = base.on_hub and base.revision is not None and recipe.model.gguf_file is None
    if pinned and not taken & {"model", "model.name", "model.revision"}:
        found.append(f"model.revision={json.dumps(base.revision)}")
    found += _find_files(given, path, taken)
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
    if any(override.split(".")[0] in _SHAPING for override in overrides):
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


def _find_files(given: str, recipe_path: Path, taken: Set[str]) -> list[str]:
    """Overrides for local files of the recipe that are not beside it but elsewhere; keys in `taken` are left out."""
    data = read_document(recipe_path).value
    found = []
    for value in path_values(data):
        key = ".".join(value.path)
        if value.path == ("data", "template") or any(key == one or key.startswith(f"{one}.") for one in taken):
            continue
        if "://" in value.text or not _is_local(value.text, value.suffixes):
            continue
        places = [Path(value.absolute(recipe_path.parent)), shipped_root() / value.text, Path.cwd() / value.text]
        place = next((place for place in places if _exists(place)), None)
        if place is None:
            raise BadInputError(
                f"{given}: {key}: {value.text} was a file of the machine that trained it and is not here; "
                f"give yours: finetune run {given} {key}=PATH"
            )
        if place != places[0]:
            found.append(f"{key}={json.dumps(str(place), ensure_ascii=False)}")
    return found


def _is_local(text: str, suffixes: tuple[str, ...]) -> bool:
    return text.startswith((".", "/", "~")) or text.lower().endswith(suffixes) or any(mark in text for mark in "*?[")


def _exists(path: Path) -> bool:
    return any(path.parent.glob(path.name)) if any(mark in path.name for mark in "*?[") else path.exists()
