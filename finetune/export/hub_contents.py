"""What a push holds: the files of an adapter, a merged model or a GGUF file, with a recipe that others can use.

Nothing on disk is changed: files that name places of this machine are rewritten in memory.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from finetune.errors import BadInputError, ModelError, first_line
from finetune.export.places import ADAPTER_CONFIG, ADAPTER_WEIGHTS, RunPlace, find_place, staleness
from finetune.models.tokenizer_files import TOKENIZER_CONFIG, tokenizer_config_text
from finetune.privacy import holds_local_path, holds_secret
from finetune.recipe.hub_address import SNAPSHOT
from finetune.recipe.load import dump_recipe
from finetune.recipe.moved import load_moved_recipe
from finetune.recipe.paths import path_values
from finetune.recipe.schema import Recipe
from finetune.recipe.shipped import shipped_root
from finetune.run_dir import FINGERPRINTS, MERGE_RECORD, RECIPE, UNUSABLE, RunDir

Kind = Literal["adapter", "merged", "gguf", "gguf-lora"]

TEMPLATE = "chat_template.jinja"
# A checkpoint's state, and a card that is written anew.
_LEFT_OUT = {"trainer_state.pt", "manifest.json", "README.md"}
_VOCABULARY = {"tokenizer.json", "vocab.json", "merges.txt"}
_TEXT_SUFFIXES = {".json", ".yaml", ".yml", ".jinja", ".md", ".txt"}


@dataclass(frozen=True)
class BaseModel:
    """The base as others can name it."""

    name: str
    revision: str | None
    on_hub: bool


@dataclass
class Contents:
    """The files of one push by their path in the repository, and what their model card is written from."""

    kind: Kind
    files: dict[str, Path | bytes]
    original: Recipe
    """The recipe as it was run, with this machine's paths."""
    recipe: Recipe
    """The recipe as it is pushed."""
    base: BaseModel
    fingerprints: dict[str, Any]
    run: RunDir | None
    """The run's directory, where the adapter's is in one."""
    warnings: list[str] = field(default_factory=list)

    @property
    def is_merged(self) -> bool:
        """Whether it holds a whole model, and not the adapter that was measured."""
        return self.kind in ("merged", "gguf")

    def public_names(self) -> list[str]:
        """Names that others are meant to read: of the run, the base, the data sets and the repository."""
        given = [value.text for value in path_values(self.recipe.model_dump(mode="json")) if "://" not in value.text]
        return [self.recipe.name, self.base.name, *given, *filter(None, [self.recipe.hub.repo_id])]

    def sizes(self) -> dict[str, int]:
        """Path in the repository to size in bytes, sorted."""
        sizes = {
            name: content.stat().st_size if isinstance(content, Path) else len(content)
            for name, content in self.files.items()
        }
        return dict(sorted(sizes.items()))


def collect(given: str | Path, *, merged: bool = False, gguf: Path | None = None) -> Contents:
    """What a push holds of a run, an adapter or a merged model: the adapter, the merged model, or one GGUF file.

    A merged model's own directory gives that model.

    Raises:
        ModelError: there is no adapter, no merged model, or no such GGUF file.
        RecipeError: the run's recipe cannot be read.
        BadInputError: a file that would be pushed holds a token or key.
    """
    place = find_place(given)
    origin = _origin(place)
    original = load_moved_recipe(origin / RECIPE)
    fingerprints = _read_json(origin / FINGERPRINTS)
    base = name_base(original, fingerprints)
    kind: Kind = "merged" if merged or place.is_merged else "adapter"
    files: dict[str, Path | bytes] = {}
    warnings = []
    if gguf is not None:
        kind = _gguf_kind(gguf)
        files[gguf.name] = gguf
    elif kind == "merged":
        files.update(_files_of(_require_merged(place)))
        warnings += [] if place.is_merged else [text for text in [staleness(place.merged, origin)] if text]
    else:
        files.update(_files_of(origin))
    if MERGE_RECORD in files:
        files[MERGE_RECORD] = _merge_record(files[MERGE_RECORD], base)
    if isinstance(settings := files.get(TOKENIZER_CONFIG), Path):  # perhaps of an earlier version
        files[TOKENIZER_CONFIG] = tokenizer_config_text(_read_json(settings)).encode()
    recipe = portable_recipe(original, base, has_template=TEMPLATE in files)
    if "base" in fingerprints:
        fingerprints = {**fingerprints, "base": {**fingerprints["base"], "name": base.name}}
    files[RECIPE] = dump_recipe(recipe).encode()
    if fingerprints:
        files[FINGERPRINTS] = (json.dumps(fingerprints, indent=2) + "\n").encode()
    if kind == "adapter":
        files[ADAPTER_CONFIG] = _adapter_config(origin, base)
    contents = Contents(kind, files, original, recipe, base, fingerprints, place.run, warnings)
    if kind == "adapter" and not base.on_hub:
        contents.warnings.append(_no_hub_base(base))
    _check_texts(contents)
    return contents


def _origin(place: RunPlace) -> Path:
    """Where recipe and fingerprints are: the final adapter's directory, or that of the merged model itself.

    Raises:
        ModelError: there is no finished adapter.
    """
    if place.is_merged:
        if not (place.folder / RECIPE).is_file():
            raise _no_recipe(place)
        return place.folder.resolve()
    folder = place.folder.resolve()
    folder = folder if (folder / ADAPTER_CONFIG).is_file() else RunDir(folder).adapter
    missing = [name for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS, RECIPE) if not (folder / name).is_file()]
    if missing == [RECIPE]:
        raise _no_recipe(place)
    if missing:
        raise ModelError(
            f"{place.given}: holds no finished adapter ({missing[0]} is missing); train first: finetune run RECIPE"
        )
    return folder


def _no_recipe(place: RunPlace) -> ModelError:
    return ModelError(
        f"{place.given}: holds no recipe.yaml, as what another program trained, and the model card is written from "
        f"that; send it as it is: hf upload ORG/NAME {place.given}"
    )


def name_base(recipe: Recipe, fingerprints: dict[str, Any]) -> BaseModel:
    """The base's hub id and commit where it is a hub model (also one loaded from the Hub's cache), else its name."""
    name = recipe.model.name
    if match := SNAPSHOT.search(name):
        return BaseModel(f"{match.group(1)}/{match.group(2)}", match.group(3), True)
    if "://" in name:
        return BaseModel(name, None, False)
    if os.path.isabs(name):
        # `./` because a bare word would be taken for a hub id, perhaps someone else's.
        return BaseModel(f"./{Path(name).name}", None, False)
    commit = fingerprints.get("base", {}).get("revision")
    return BaseModel(name, commit or recipe.model.revision, True)


def portable_recipe(recipe: Recipe, base: BaseModel, *, has_template: bool) -> Recipe:
    """The recipe without this machine's paths: what ships with the project relative to it, other files by name."""
    data = recipe.model_dump(mode="json")
    for value in path_values(data):
        if value.path == ("model", "name"):
            value.section["name"] = base.name
        elif not os.path.isabs(value.text):
            continue
        elif value.path == ("data", "template"):
            value.section["template"] = f"./{TEMPLATE}" if has_template else "auto"
        elif value.path == ("model", "tokenizer"):
            value.section["tokenizer"] = "."  # the tokenizer is saved beside the recipe
        else:
            value.section[value.path[-1]] = _portable_path(Path(value.text))
    if base.on_hub and recipe.model.gguf_file is None:
        data["model"]["revision"] = base.revision
    if os.path.isabs(data["output_dir"]) or data["output_dir"].startswith("~"):
        data["output_dir"] = type(recipe).model_fields["output_dir"].default
    return Recipe.model_validate(data)


def _portable_path(path: Path) -> str:
    """`./` because a bare word would be taken for a hub data set's id."""
    root = shipped_root()
    return f"./{path.relative_to(root).as_posix() if path.is_relative_to(root) else path.name}"


def _no_hub_base(base: BaseModel) -> str:
    what = "a file of a Python package" if "://" in base.name else "a local directory or file"
    return (
        f"the base model is {what}, not a hub model: adapter_config.json names it {base.name}, and others can load "
        "the adapter only with a base that they have (PeftModel.from_pretrained(base, ...)). To let them load it by "
        "name alone, train with model.name: ORG/NAME, or push the merged model (--merged)"
    )


def _files_of(folder: Path) -> dict[str, Path | bytes]:
    found = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name not in _LEFT_OUT)
    names = ((path.relative_to(folder), path) for path in found)
    return {name.as_posix(): path for name, path in names if not any(part.startswith(".") for part in name.parts)}


def _require_merged(place: RunPlace) -> Path:
    folder = place.merged
    if not (folder / "config.json").is_file():
        raise ModelError(
            f"{place.given}: holds no merged model; make it first: finetune merge {place.given}. One that was merged "
            "with --out DIR is pushed by its own name: finetune push DIR ORG/NAME"
        )
    if (folder / UNUSABLE).is_file():
        raise ModelError(f"{folder}: its check failed, see {UNUSABLE} in it; merge again: finetune merge RUN")
    return folder


def _gguf_kind(path: Path) -> Kind:
    """Whether a file is a model, or a LoRA adapter for one; `general.type` says it."""
    from gguf import GGUFReader

    if path.suffix != ".gguf" or not path.is_file():
        raise ModelError(f"--gguf {path}: no such GGUF file; make it first: finetune export RUN --to gguf")
    try:
        field = GGUFReader(path).get_field("general.type")
    except Exception as error:
        raise ModelError(
            f"--gguf {path}: cannot be read as a GGUF file, export it again: {first_line(error)}"
        ) from None
    return "gguf-lora" if field is not None and field.contents() == "adapter" else "gguf"


def _adapter_config(adapter: Path, base: BaseModel) -> bytes:
    config = _read_json(adapter / ADAPTER_CONFIG)
    config["base_model_name_or_path"] = base.name
    config["revision"] = base.revision
    # In the file's order: PEFT takes the first of several rank patterns that match.
    return (json.dumps(config, indent=2) + "\n").encode()


def _merge_record(path: Path | bytes, base: BaseModel) -> bytes:
    assert isinstance(path, Path)
    record = _read_json(path)
    record["base_model"] = {"name": base.name, "revision": base.revision}
    record.pop("run", None)  # a place of this machine
    return (json.dumps(record, indent=1) + "\n").encode()


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{path}: is damaged: {error}; take a checkpoint's file or train again") from None
    return content if isinstance(content, dict) else {}


def _check_texts(contents: Contents) -> None:
    public = contents.public_names()
    for name, content in contents.files.items():
        if Path(name).suffix not in _TEXT_SUFFIXES or Path(name).name in _VOCABULARY:
            continue
        text = (content.read_bytes() if isinstance(content, Path) else content).decode("utf-8", errors="replace")
        if holds_secret(text, keep=public):
            raise BadInputError(
                f"{name} holds what looks like a token or key, and was not pushed; remove it from the recipe or "
                "the tokenizer's files, revoke it if it was ever shared, then push again"
            )
        if holds_local_path(text):
            contents.warnings.append(f"{name} names a path of this machine; everyone who can read {name} will see it")
