"""One copy of a base for all processes and runs of a machine: converted once into the cache, and mapped from there.

Weights that lie on disk as the model computes with them are mapped, not read: all processes share the pages, and the
system can drop them. A base to be quantized, or of another dtype, is first written as it will be used.
"""

from __future__ import annotations

import hashlib
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from finetune.console import say, warn
from finetune.errors import FinetuneError, ModelError, OutOfMemory
from finetune.files import cache_dir, locked, new_directory
from finetune.machine import release_freed_memory
from finetune.models.load import base_dtype, load_base, load_config, quantization_config, stored_as
from finetune.models.sources import CONVERSION_VERSION, ModelSource, snapshot_folder
from finetune.recipe.schema import QUANTIZED_4BIT, ModelSection


def mapped_source(
    model: ModelSection, source: ModelSource, *, precision: str, on_cpu: bool, sharded: bool = False
) -> ModelSource:
    """Where to load the base from, for training and inference alike: `source` itself if it is to be read from there.

    Raises:
        FinetuneError: if the base is to be sharded and the cache cannot be written.
        ModelError: if the base cannot be loaded.
    """
    if sharded:
        return shared_source(model, source, precision=precision)
    return quantized_source(model, source, precision=precision) if on_cpu else source


def shared_source(model: ModelSection, source: ModelSource, *, precision: str) -> ModelSource:
    """Where all processes of this machine can map the base from; made by the first that comes, for whom others wait.

    Raises:
        FinetuneError: if the cache cannot be written.
        ModelError: if the base cannot be loaded.
    """
    folder = shared_folder(model, source, precision=precision)
    if folder is None:
        return source
    try:
        with locked(folder.with_name(f"{folder.name}.lock")):
            if not folder.is_dir():
                _convert(model, source, precision, folder)
    except (OSError, SafetensorError) as error:
        raise FinetuneError(
            f"{folder}: cannot be written: {error}. All processes of this machine share the base "
            "from there; make room, or set FINETUNE_CACHE to another folder"
        ) from error
    return ModelSource(source.name, str(folder), None)


def shared_folder(model: ModelSection, source: ModelSource, *, precision: str) -> Path | None:
    """Where the copy is, or will be, that `shared_source` makes; None where the base is mapped as it is."""
    quantized = model.quantization in QUANTIZED_4BIT
    as_on_disk = not quantized and load_config(model, source).dtype == base_dtype(model, precision)
    if as_on_disk or model.trust_remote_code:  # code of its own is not written with the weights
        return None
    name = f"{Path(source.location).name}-{model.quantization}-{_key(model, source, precision)}"
    return cache_dir() / "models" / name


def quantized_source(model: ModelSection, source: ModelSource, *, precision: str) -> ModelSource:
    """Where a CPU maps a 4-bit base from, which would otherwise be quantized at every start; `source` for all others.

    `source` too where the cache cannot be written: the run does not need it.

    Raises:
        ModelError: if the base cannot be loaded.
    """
    if model.quantization not in QUANTIZED_4BIT:
        return source
    try:
        return shared_source(model, source, precision=precision)
    except FinetuneError as error:
        if isinstance(error, ModelError | OutOfMemory):
            raise
        warn(f"the base is quantized anew at every start: {error}")
        return source


def _convert(model: ModelSection, source: ModelSource, precision: str, folder: Path) -> None:
    say(f"converting {source.name} to {stored_as(model, precision)}, once; later starts load it from {folder}")
    base: Any = load_base(model, source, precision=precision, attention_name="sdpa", shardable=True, announce=False)
    # transformers writes on global rank 0 alone; here it is whoever came first on this machine.
    base.should_save_on_this_rank = lambda is_main_process: is_main_process
    with new_directory(folder) as temporary:
        base.save_pretrained(temporary)
    del base
    release_freed_memory()


def _key(model: ModelSection, source: ModelSource, precision: str) -> str:
    """Hash of what the converted weights follow from; local files count by name, size and time, not by content."""
    folder = Path(source.location) if source.is_local else snapshot_folder(source)
    # A hub model's folder is named by its commit, and may not hold all its files yet.
    stats = {path.name: path.stat() for path in sorted(folder.iterdir()) if path.is_file() and source.is_local}
    quantization = quantization_config(model, precision, shardable=True)
    parts = {
        "folder": str(folder.resolve()),
        "files": {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()},
        "dtype": str(base_dtype(model, precision)),
        "quantization": None if quantization is None else quantization.to_dict(),
        "libraries": {name: version(name) for name in ("transformers", "bitsandbytes")},
        "conversion": CONVERSION_VERSION,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]
