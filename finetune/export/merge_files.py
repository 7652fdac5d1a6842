"""Weight files, one tensor at a time: reading a base model's shards, and writing safetensors shards.

Nothing here holds more than one tensor. A safetensors file opens with the place of every tensor, so it can be
written in order as soon as names, shapes and dtypes are known.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers.utils import cached_file

from finetune.errors import ModelError
from finetune.models.sources import ModelSource

MAX_SHARD_BYTES = 2_000_000_000
_WEIGHTS = "model.safetensors"
_OLD_WEIGHTS = "pytorch_model.bin"
# Source: the format's description, https://github.com/huggingface/safetensors#format
_CODES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_DTYPES = {code: dtype for dtype, code in _CODES.items()}


@dataclass(frozen=True)
class TensorInfo:
    """A tensor of a file."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Bytes on disk."""
        return math.prod(self.shape) * self.dtype.itemsize


def find_file(source: ModelSource, name: str) -> Path | None:
    """One file of a base model, from its folder or the Hub; None if it has no such file."""
    found = cached_file(
        source.location,
        name,
        revision=source.revision,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return None if found is None else Path(found)


class BaseFiles:
    """The weights of a model on disk; `tensors` tells what there is, `read` loads one."""

    def __init__(self, source: ModelSource) -> None:
        """Find the shards and read their headers.

        Raises:
            ModelError: there are none, or one is damaged.
        """
        self._source = source
        self._files: dict[str, Path] = {}
        self._open: tuple[Path, dict[str, torch.Tensor]] | None = None
        self.tensors: dict[str, TensorInfo] = {}
        for path in self._shards():
            try:
                for info in self._headers(path):
                    self.tensors[info.name] = info
                    self._files[info.name] = path
            except Exception as error:
                raise ModelError(f"model.name: {path} is damaged, download the model again: {error}") from error

    def read(self, name: str) -> torch.Tensor:
        """One tensor, on the CPU, in the dtype of the file."""
        path = self._files[name]
        if path.suffix != ".safetensors":
            return self._pickled(path)[name]
        return read_tensor(path, name)

    def _shards(self) -> list[Path]:
        for single in (_WEIGHTS, _OLD_WEIGHTS):
            index = find_file(self._source, f"{single}.index.json")
            if index is not None:
                names = dict.fromkeys(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
                return [self._require(name) for name in names]
            if (path := find_file(self._source, single)) is not None:
                return [path]
        raise ModelError(f"model.name: {self._source.name} holds neither {_WEIGHTS} nor {_OLD_WEIGHTS}")

    def _require(self, name: str) -> Path:
        path = find_file(self._source, name)
        if path is None:
            raise ModelError(f"model.name: {self._source.name}: {name} is missing; download the model again")
        return path

    def _headers(self, path: Path) -> list[TensorInfo]:
        if path.suffix != ".safetensors":
            return [TensorInfo(name, tuple(t.shape), t.dtype) for name, t in self._pickled(path).items()]
        with safe_open(path, "pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
            return [TensorInfo(name, tuple(s.get_shape()), _DTYPES[s.get_dtype()]) for name, s in slices.items()]

    def _pickled(self, path: Path) -> dict[str, torch.Tensor]:
        if self._open is None or self._open[0] != path:
            self._open = path, torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        return self._open[1]


def write_shards(
    folder: Path,
    tensors: Sequence[TensorInfo],
    make: Callable[[str], torch.Tensor],
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write `tensors` as transformers names shards, each made by `make(name)` when its turn comes, then dropped."""
    shards = _split(tensors, max_shard_bytes)
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = _WEIGHTS if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_file(folder / name, shard, make)
        weight_map.update({info.name: name for info in shard})
    if len(shards) > 1:
        total = sum(info.num_bytes for info in tensors)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / f"{_WEIGHTS}.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _split(tensors: Sequence[TensorInfo], max_shard_bytes: int) -> list[list[TensorInfo]]:
    shards: list[list[TensorInfo]] = [[]]
    size = 0
    for info in tensors:
        if shards[-1] and size + info.num_bytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(info)
        size += info.num_bytes
    return shards


def _write_file(path: Path, tensors: Sequence[TensorInfo], make: Callable[[str], torch.Tensor]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    place = 0
    for info in tensors:
        offsets = [place, place + info.num_bytes]
        header[info.name] = {"dtype": _CODES[info.dtype], "shape": list(info.shape), "data_offsets": offsets}
        place = offsets[1]
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data starts aligned
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for info in tensors:
            tensor = make(info.name)
            assert tensor.dtype == info.dtype and tuple(tensor.shape) == info.shape, info
            file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)


def read_tensor(path: Path, name: str) -> torch.Tensor:
    """One tensor of a safetensors file."""
    # Opened anew for each: a mapping that stays open keeps every page that was read in this process's memory.
    with safe_open(path, "pt") as file:
        tensor: torch.Tensor = file.get_tensor(name)
    return tensor
