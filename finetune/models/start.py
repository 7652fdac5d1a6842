"""The adapter that training starts from (adapter.start_from): where it is, and whether the recipe describes it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from finetune.console import warn
from finetune.errors import FinetuneError, ModelError
from finetune.files import sha256_file
from finetune.models.adapters import CONFIG_NAME, WEIGHTS_NAME, init_off_the_base, token_indices
from finetune.models.saved import read_settings, recorded_base, unlike_lora
from finetune.recipe.hub_address import resolve_repo
from finetune.recipe.schema import LoraSection
from finetune.run_dir import RunDir

KEY = "adapter.start_from"
# What scales an update and so changes it without a word: tensors of another shape are refused when they are loaded.
_SETTINGS = {
    "rank": "r",
    "alpha": "lora_alpha",
    "use_rslora": "use_rslora",
    "use_dora": "use_dora",
    "rank_pattern": "rank_pattern",
    "alpha_pattern": "alpha_pattern",
}


@dataclass(frozen=True)
class Start:
    """An adapter's files."""

    folder: Path | None  # None where a checkpoint took its weights over and it is gone
    sha256: str  # of its weights


def find_start(adapter: LoraSection, tokenizer: Any, *, recorded: str | None = None) -> Start | None:
    """The adapter that the recipe starts from, if any.

    `recorded` is the hash of its weights in the checkpoint from which the run goes on: then it may be gone.

    Raises:
        ModelError: there is no adapter, or one of another rank, scale or other tokens than the recipe's.
    """
    if adapter.start_from is None:
        return None
    try:
        folder = _folder(adapter.start_from)
    except ModelError:
        if recorded is None:
            raise
        return Start(None, recorded)
    config = read_settings(folder)
    init = init_off_the_base(config)
    if what := unlike_lora(config) or (f"fits only a base that {init} has changed" if init else None):
        raise ModelError(f"{KEY}: the adapter in {folder} {what}; start from a plain LoRA adapter")
    values = {name: config.get(theirs) or _nothing(adapter, name) for name, theirs in _SETTINGS.items()}
    others = [
        f"adapter.{name}: {json.dumps(value)}" for name, value in values.items() if not _same(adapter, name, value)
    ]
    if not _has_tokens(adapter, tokenizer, folder, config):
        others.append("adapter.trainable_tokens: the same tokens in the same order")
    if others:
        raise ModelError(
            f"{KEY}: the adapter in {folder} has other settings than the recipe; write what it has:\n  "
            + "\n  ".join(others)
        )
    return Start(folder, sha256_file(folder / WEIGHTS_NAME))


def keep_start(adapter: LoraSection, root: Path) -> None:
    """Refuse to put `root` aside for a run that starts from what is in it.

    Raises:
        ModelError: naming both.
    """
    start = adapter.start_from
    if start is not None and "://" not in start and Path(start).resolve().is_relative_to(root.resolve()):
        raise ModelError(f"{KEY}: {start} is in {root}, which --fresh puts aside; give this run another name")


def _nothing(adapter: LoraSection, name: str) -> Any:
    # PEFT writes null, or leaves the key out, for what is off or empty.
    return type(getattr(adapter, name))()


def _same(adapter: LoraSection, name: str, value: Any) -> bool:
    own = getattr(adapter, name)
    # In their order: PEFT takes the first pattern that matches.
    return list(own.items()) == list(value.items()) if isinstance(own, dict) else bool(own == value)


def _has_tokens(adapter: LoraSection, tokenizer: Any, folder: Path, config: dict[str, Any]) -> bool:
    """Whether the adapter's trained tokens are the recipe's: rows of the same number would go to any others."""
    theirs = config.get("trainable_token_indices") or []
    if theirs != token_indices(adapter, tokenizer):
        return False
    saved = folder / "tokenizer.json"
    if not theirs or not saved.is_file():
        return True
    vocabulary = Tokenizer.from_file(str(saved))
    return all(vocabulary.id_to_token(index) == tokenizer.convert_ids_to_tokens(index) for index in theirs)


def compare_base(folder: Path, base: dict[str, Any]) -> None:
    """Warn if the adapter in `folder` was trained on another model than that of the fingerprint `base`, if it says."""
    recorded = recorded_base(folder)
    name = recorded.get("name") or read_settings(folder).get("base_model_name_or_path")
    if recorded:
        differs = recorded["sha256"] != base["sha256"]
    else:
        differs = bool(name) and Path(str(name)).name != Path(str(base["name"])).name
    if differs:
        warn(
            f"{KEY}: the adapter in {folder} was trained on {name} and the recipe's model is {base['name']}: "
            "what changes one model's answers may spoil another's"
        )


def _folder(given: str) -> Path:
    if "://" in given:
        return _downloaded(given)
    path = Path(given)
    if not path.is_dir():
        raise ModelError(
            f"{KEY}: {path}: no such directory; give an adapter's, a run's or a checkpoint's, or hf://ORG/NAME"
        )
    for folder in (path, RunDir(path).adapter):
        if (folder / CONFIG_NAME).is_file() and (folder / WEIGHTS_NAME).is_file():
            return folder
    raise ModelError(
        f"{KEY}: {path} holds no adapter ({CONFIG_NAME}, {WEIGHTS_NAME}); give an adapter's directory, a finished "
        "run's or a checkpoint's"
    )


def _downloaded(address: str) -> Path:
    try:
        folder = resolve_repo(address)
    except FinetuneError as error:
        raise ModelError(f"{KEY}: {error}") from error
    if missing := [name for name in (CONFIG_NAME, WEIGHTS_NAME) if not (folder / name).is_file()]:
        raise ModelError(f"{KEY}: {address} holds no {missing[0]}, so it is no adapter")
    return folder
