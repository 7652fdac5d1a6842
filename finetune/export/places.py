"""What a RUN on the command line names: a directory, or a repository on the Hub; and where what is made of it goes."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.errors import ModelError
from finetune.files import sha256_file
from finetune.recipe.hub_address import HUB_SCHEME, parse_address, resolve_repo
from finetune.run_dir import MERGE_RECORD, RunDir

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"

_EXPORTS = "export"


@dataclass(frozen=True)
class RunPlace:
    """A run, an adapter or a merged model, on disk."""

    given: str  # as the user wrote it
    folder: Path
    run: RunDir | None  # the run's directory that it is, or whose final adapter or merged model it is
    merged: Path  # where its merged model is, or goes
    exports: Path  # where its exports go

    @property
    def is_merged(self) -> bool:
        """Whether it is a model that `finetune merge` wrote."""
        return is_merged(self.folder)


def find_place(given: str | Path) -> RunPlace:
    """The files behind `given`: a directory, or hf://ORG/NAME[@REVISION], which is downloaded into the Hub's cache.

    What is made of a repository goes to the working directory, of an adapter without its run beside the adapter.

    Raises:
        BadInputError: the address is malformed, there is no such directory, or the repository holds no adapter.
        FinetuneError: there is no such repository, no access, or no network and nothing cached.
    """
    text = str(given)
    if text.startswith(HUB_SCHEME):
        return _hub_place(text)
    path = Path(given).expanduser()
    if not path.is_dir():
        raise ModelError(f"{path}: no such directory; give a run's directory, such as runs/my-run, or hf://ORG/NAME")
    if is_merged(path):
        return RunPlace(text, path, _run_of_merged(path), path, path.resolve().parent / _EXPORTS)
    if not (path / ADAPTER_CONFIG).is_file():
        run = RunDir(path)
        return RunPlace(text, path, run if run.recipe.is_file() else None, run.merged, path / _EXPORTS)
    real = path.resolve()
    run = RunDir(real.parent)
    if run.adapter == real and run.recipe.is_file():
        return RunPlace(text, path, run, run.merged, run.root / _EXPORTS)
    return RunPlace(text, path, None, real.with_name(f"{real.name}-merged"), real.parent / _EXPORTS)


def is_merged(folder: Path) -> bool:
    """Whether `finetune merge` wrote a model there."""
    return (folder / MERGE_RECORD).is_file() and (folder / "config.json").is_file()


def read_record(folder: Path) -> dict[str, Any]:
    """What `finetune merge` wrote down about a model; empty where another program made it.

    Raises:
        ModelError: the record is damaged.
    """
    path = folder / MERGE_RECORD
    if not path.is_file():
        return {}
    try:
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{path}: is damaged: {error}; merge again: finetune merge RUN") from None
    return record


def staleness(folder: Path, adapter: Path | None) -> str | None:
    """A warning where the merged model in `folder` was made from another adapter than the one at hand."""
    recorded = read_record(folder).get("adapter_sha256")
    if adapter is None or recorded is None or sha256_file(adapter / ADAPTER_WEIGHTS) == recorded:
        return None
    return f"{folder} was merged from another adapter than {adapter}; run finetune merge again for the new one"


def _hub_place(address: str) -> RunPlace:
    repo_id = parse_address(address)[0]
    folder = resolve_repo(address)
    missing = [name for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS) if not (folder / name).is_file()]
    if missing:
        raise ModelError(f"{address}: holds no {missing[0]}, so it is no adapter; give a repository of a LoRA adapter")
    name = repo_id.rpartition("/")[2]
    return RunPlace(address, folder, None, Path(f"{name}-merged"), Path(_EXPORTS))


def _run_of_merged(folder: Path) -> RunDir | None:
    real = folder.resolve()
    above = RunDir(real.parent)
    if above.merged == real and above.recipe.is_file():
        return above
    recorded = read_record(folder).get("run")
    run = RunDir(Path(recorded)) if recorded else None
    return run if run is not None and run.recipe.is_file() else None
