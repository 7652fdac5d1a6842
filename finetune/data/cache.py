"""The token cache: one folder per source and everything that shapes it, named by their hash.

Written beside its place, fsynced and renamed, with meta.json last: a folder either is whole or is not there.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from finetune.console import warn
from finetune.data.ledger import length_histogram, percentiles
from finetune.data.masking import Chunk, Rejected
from finetune.errors import FinetuneError
from finetune.files import cache_dir, fsync_path

_LIBRARIES = ("tokenizers", "transformers", "jinja2")
_ARRAYS = ("offsets", "num_supervised", "row_of_sample", "origins", "hashes", "fates")
_STALE_SECONDS = 86_400


def cache_key(parts: Mapping[str, Any]) -> str:
    """Hash of `parts` (JSON values), of the versions of what tokenizes, and of this package's own code."""
    everything = {
        "parts": parts,
        "libraries": {name: version(name) for name in _LIBRARIES},
        "code": code_digest(),
    }
    text = json.dumps(everything, sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def code_digest() -> str:
    """sha256 of this package's Python files: a changed mask rule is a changed data set."""
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


@dataclass(frozen=True)
class Store:
    """An open cache folder: samples of one source, memory-mapped, and mapped anew after pickling."""

    folder: Path
    meta: dict[str, Any]

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder, "meta": self.meta}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    @cached_property
    def tokens(self) -> np.ndarray:
        """uint16 or int32 [num_tokens], sample after sample."""
        return _map(self.folder / "tokens.bin", np.dtype(self.meta["dtype"]))

    @cached_property
    def supervised(self) -> np.ndarray:
        """bool [num_tokens]."""
        return _map(self.folder / "mask.bin", np.dtype(bool))

    @cached_property
    def offsets(self) -> np.ndarray:
        """int64 [num_samples + 1]: where each sample begins."""
        return self._load("offsets")

    @cached_property
    def num_supervised(self) -> np.ndarray:
        """int32 [num_samples]: supervised tokens that can carry loss."""
        return self._load("num_supervised")

    @cached_property
    def row_of_sample(self) -> np.ndarray:
        """int32 [num_samples]: the row that each sample comes from, among the kept ones."""
        return self._load("row_of_sample")

    @cached_property
    def origins(self) -> np.ndarray:
        """int32 [num_rows, 2]: file index and line or row number."""
        return self._load("origins")

    @cached_property
    def hashes(self) -> np.ndarray:
        """uint64 [num_rows]: content of the row's messages."""
        return self._load("hashes")

    @cached_property
    def fates(self) -> np.ndarray:
        """uint8 [num_rows]: what became of the row: `ledger.WHOLE`, TRUNCATED or SPLIT."""
        return self._load("fates")

    @property
    def rejected(self) -> list[Rejected]:
        """Rows that gave no sample."""
        lines = (self.folder / "rejected.jsonl").read_text(encoding="utf-8").splitlines()
        return [Rejected(*json.loads(line)) for line in lines]

    def __len__(self) -> int:
        return int(self.meta["num_samples"])

    def _load(self, name: str) -> np.ndarray:
        return np.asarray(np.load(self.folder / f"{name}.npy", mmap_mode="r"))


def open_store(key: str) -> Store | None:
    """The finished cache folder of `key`; None where there is none, or it is damaged."""
    folder = _folder(key)
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        sizes = {name: (folder / name).stat().st_size for name in meta["files"]}
    except FileNotFoundError:
        if folder.exists():
            warn(f"the data cache {folder} is incomplete; making it anew")
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        warn(f"the data cache {folder} is unreadable ({error}); making it anew")
        return None
    if sizes != meta["files"]:
        warn(f"the data cache {folder} is damaged; making it anew")
        return None
    return Store(folder, meta)


def write_store(key: str, chunks: Iterable[Chunk], *, vocab_size: int, extra: Mapping[str, Any]) -> Store:
    """Write the cache folder of `key` from `chunks`, in order, and open it. `extra` goes into meta.json.

    Raises:
        FinetuneError: the cache cannot be written.
    """
    folder = _folder(key)
    temporary: Path | None = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _sweep(folder.parent)
        temporary = Path(tempfile.mkdtemp(prefix=f"{key}.tmp-", dir=folder.parent))
        meta = _write_files(temporary, chunks, np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.int32))
        meta.update(extra)
        _write_synced(temporary / "meta.json", json.dumps(meta, indent=1).encode())
        fsync_path(temporary)
        temporary.chmod(0o755)  # mkdtemp lets nobody else read
        _replace(temporary, folder)
        fsync_path(folder.parent)
    except OSError as error:
        raise FinetuneError(
            f"the data cache {folder} cannot be written: {error.strerror or error}. "
            "Make room, or set FINETUNE_CACHE to another folder."
        ) from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
    return Store(folder, meta)


def _folder(key: str) -> Path:
    return cache_dir() / "data" / key


def _map(path: Path, dtype: np.dtype[Any]) -> np.ndarray:
    if path.stat().st_size == 0:  # an empty file cannot be mapped
        return np.zeros(0, dtype)
    return np.asarray(np.memmap(path, dtype=dtype, mode="r"))


def _write_files(folder: Path, chunks: Iterable[Chunk], dtype: np.dtype[Any]) -> dict[str, Any]:
    digest = hashlib.sha256()
    counts: Counter[str] = Counter()
    parts: dict[str, list[np.ndarray]] = {name: [] for name in (*_ARRAYS, "full_lengths")}
    num_tokens = num_supervised = num_rows = 0
    with (
        (folder / "tokens.bin").open("wb") as tokens,
        (folder / "mask.bin").open("wb") as mask,
        (folder / "rejected.jsonl").open("w", encoding="utf-8") as rejected,
    ):
        for chunk in chunks:
            ids = chunk.ids.astype(dtype)
            ends = np.cumsum(chunk.lengths, dtype=np.int64)
            can_carry = chunk.supervised.copy()
            can_carry[(ends - chunk.lengths)] = False  # nothing predicts a sample's first token
            running = np.concatenate([np.zeros(1, np.int64), np.cumsum(can_carry, dtype=np.int64)])
            carried = (running[ends] - running[ends - chunk.lengths]).astype(np.int32)
            for content in (ids, chunk.supervised, chunk.lengths):
                digest.update(content.tobytes())
            tokens.write(ids.tobytes())
            mask.write(chunk.supervised.tobytes())
            rejected.writelines(json.dumps(row) + "\n" for row in chunk.rejected)
            parts["offsets"].append(ends + num_tokens)
            parts["num_supervised"].append(carried)
            parts["row_of_sample"].append(chunk.row_of_sample + np.int32(num_rows))
            parts["origins"].append(chunk.origins)
            parts["hashes"].append(chunk.hashes)
            parts["fates"].append(chunk.fates)
            parts["full_lengths"].append(chunk.full_lengths)
            counts.update(chunk.counts)
            num_tokens += len(ids)
            num_supervised += int(carried.sum())
            num_rows += len(chunk.hashes)
        for stream in (tokens, mask, rejected):
            stream.flush()
            os.fsync(stream.fileno())
    for name in _ARRAYS:
        _save_array(folder / f"{name}.npy", name, parts[name])
    full_lengths = _join("full_lengths", parts["full_lengths"])
    return {
        "dtype": dtype.name,
        "num_samples": sum(len(part) for part in parts["num_supervised"]),
        "num_tokens": num_tokens,
        "num_supervised": num_supervised,
        "counts": dict(counts),
        "lengths": percentiles(full_lengths),
        "length_histogram": length_histogram(full_lengths),
        "digest": digest.hexdigest(),
        "files": {file.name: file.stat().st_size for file in sorted(folder.iterdir())},
    }


def _join(name: str, parts: list[np.ndarray]) -> np.ndarray:
    dtypes = {"offsets": np.int64, "hashes": np.uint64, "fates": np.uint8}
    empty = np.zeros((0, 2) if name == "origins" else 0, dtypes.get(name, np.int32))
    if name == "offsets":
        empty = np.zeros(1, np.int64)
    return np.concatenate([empty, *parts])


def _save_array(path: Path, name: str, parts: list[np.ndarray]) -> None:
    with path.open("wb") as stream:
        np.save(stream, _join(name, parts))
        stream.flush()
        os.fsync(stream.fileno())


def _write_synced(path: Path, content: bytes) -> None:
    with path.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())


def _replace(temporary: Path, folder: Path) -> None:
    """Rename into place; what stands there is damaged, or another process's equal result."""
    try:
        os.rename(temporary, folder)
    except OSError:
        if not folder.exists():
            raise
        if open_store(folder.name) is not None:
            return
        aside = Path(tempfile.mkdtemp(prefix=f"{folder.name}.tmp-", dir=folder.parent))
        os.rename(folder, aside / "damaged")
        os.rename(temporary, folder)
        shutil.rmtree(aside, ignore_errors=True)


def _sweep(parent: Path) -> None:
    """Remove what killed runs left behind; younger than a day it may be another process at work."""
    for left in parent.glob("*.tmp-*"):
        try:
            if time.time() - left.stat().st_mtime > _STALE_SECONDS:
                shutil.rmtree(left, ignore_errors=True)
        except FileNotFoundError:
            continue  # another process swept it
