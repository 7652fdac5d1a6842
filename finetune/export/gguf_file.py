"""Writing one GGUF file: tensor by tensor, in a temporary name that becomes the file's when it is whole."""

from __future__ import annotations

import os
import re
import shutil
import struct
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from gguf import (
    GGMLQuantizationType,
    GGUFValueType,
    GGUFWriter,
    LlamaFileType,
    quant_shape_to_byte_shape,
    quantize,
)

from finetune.console import progress_bar
from finetune.errors import FinetuneError
from finetune.files import fsync_path

TYPES: dict[str, tuple[GGMLQuantizationType, LlamaFileType]] = {
    "f32": (GGMLQuantizationType.F32, LlamaFileType.ALL_F32),
    "f16": (GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
    "bf16": (GGMLQuantizationType.BF16, LlamaFileType.MOSTLY_BF16),
    "q8_0": (GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q8_0),
}
_Q8_BLOCK = 32
# Keys and the vocabulary (a few MB for 256k tokens), and the file system's own needs.
_SPARE_BYTES = 64_000_000


@dataclass(frozen=True)
class GgufTensor:
    """A tensor to write; `load` gives its values in float32 when its turn comes."""

    name: str
    shape: tuple[int, ...]
    type: GGMLQuantizationType
    load: Callable[[], np.ndarray]

    @property
    def num_bytes(self) -> int:
        """Bytes in the file."""
        return int(np.prod(quant_shape_to_byte_shape(self.shape, self.type)))


def own_mark(kind: str, name: str) -> re.Pattern[bytes]:
    """How a GGUF file of `kind` (`model`, `adapter`) that was written under `name` opens: its keys, as stored."""
    pairs = (("general.type", kind.encode()), ("general.name", name.encode()))
    stored = [key.encode() + struct.pack("<IQ", GGUFValueType.STRING, len(value)) + value for key, value in pairs]
    return re.compile(rb"GGUF.{0,200}?%b.{8}%b" % tuple(map(re.escape, stored)), re.DOTALL)


def weight_type(name: str, shape: Sequence[int], wanted: str) -> GGMLQuantizationType:
    """The type of a tensor: norms and biases stay f32, rows that q8_0's blocks of 32 do not divide become f16."""
    if len(shape) < 2 or name.endswith("_norm.weight"):
        return GGMLQuantizationType.F32
    if wanted == "q8_0" and shape[-1] % _Q8_BLOCK:
        return GGMLQuantizationType.F16
    return TYPES[wanted][0]


def write_gguf(path: Path, writer: GGUFWriter, tensors: Sequence[GgufTensor]) -> None:
    """Write the keys of `writer` and `tensors` to `path`; memory stays at one tensor.

    Raises:
        FinetuneError: the disk is too small, or a value does not fit its type.
    """
    require_space(path, sum(tensor.num_bytes for tensor in tensors))
    writer.add_quantization_version(2)
    for tensor in tensors:
        stored = quant_shape_to_byte_shape(tensor.shape, tensor.type)
        # uint8 says that the shape is in bytes; the writer takes it back to values.
        writer.add_tensor_info(tensor.name, stored, np.dtype(np.uint8), tensor.num_bytes, tensor.type)
    with new_file(path) as temporary:
        writer.write_header_to_file(temporary)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        try:
            with progress_bar(f"writing {path.name}", len(tensors)) as bar:
                for tensor in tensors:
                    writer.write_tensor_data(_encode(tensor))
                    bar.advance()
        finally:
            writer.close()


def _encode(tensor: GgufTensor) -> np.ndarray:
    values = np.ascontiguousarray(tensor.load(), dtype=np.float32)
    assert values.shape == tensor.shape, (tensor.name, values.shape, tensor.shape)
    if not np.isfinite(values).all():
        raise FinetuneError(f"{tensor.name}: holds values that are not finite; the weights are damaged")
    if tensor.type == GGMLQuantizationType.F16 and np.abs(values).max(initial=0.0) > np.finfo(np.float16).max:
        raise FinetuneError(f"{tensor.name}: a value is too large for f16; write --type bf16 or q8_0")
    encoded: np.ndarray = quantize(values, tensor.type)
    return encoded


def require_space(path: Path, num_bytes: int) -> None:
    """Whether `num_bytes` more fit where `path` will be.

    Raises:
        FinetuneError: they do not.
    """
    parent = next(folder for folder in path.absolute().parents if folder.is_dir())
    need, free = num_bytes + _SPARE_BYTES, shutil.disk_usage(parent).free
    if free < need:
        raise FinetuneError(
            f"{path}: takes {need / 1e9:.1f} GB and {free / 1e9:.1f} GB are free; "
            "free some space, give --out on another disk, or --type q8_0"
        )


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path on the same disk; on success it is synced and becomes `path`, else it is removed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.tmp-") as folder:
        temporary = Path(folder) / path.name
        yield temporary
        fsync_path(temporary)
        os.replace(temporary, path)
        fsync_path(path.parent)
