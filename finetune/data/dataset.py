"""TokenDataset: samples picked from one or several cache folders, by index arrays. Nothing is copied."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace

import numpy as np

from finetune.data.cache import Store


@dataclass(frozen=True)
class Part:
    """A store, the names of its source's files, and the samples of it that are used, in order."""

    store: Store
    names: tuple[str, ...]
    samples: np.ndarray
    """int64 [n]: indices into the store; a sample may occur more than once."""


class TokenDataset:
    """Token samples on disk: `dataset[i]` is (input_ids int32 [T], supervised bool [T]).

    Picklable: a worker process maps the files again. Both arrays of a sample are copies, free to change.
    """

    lengths: np.ndarray
    """int32 [N]: tokens per sample."""
    num_supervised: np.ndarray
    """int32 [N]: supervised tokens that can carry loss (a sample's first token has nothing to predict it)."""
    fingerprint: str
    """Hash of every sample's tokens and mask, and of their order."""

    def __init__(self, parts: list[Part]) -> None:
        self._parts = parts
        self._starts = np.cumsum([0, *(len(part.samples) for part in parts)])
        digest = hashlib.sha256()
        lengths, supervised = [np.zeros(0, np.int32)], [np.zeros(0, np.int32)]
        for part in parts:
            lengths.append(np.diff(part.store.offsets)[part.samples].astype(np.int32))
            supervised.append(part.store.num_supervised[part.samples])
            digest.update(str(part.store.meta["digest"]).encode())
            digest.update(np.ascontiguousarray(part.samples, np.int64).tobytes())
        self.lengths = np.concatenate(lengths)
        self.num_supervised = np.concatenate(supervised)
        self.fingerprint = digest.hexdigest()

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        place, sample = self._locate(index)
        part = self._parts[place]
        start, end = part.store.offsets[sample], part.store.offsets[sample + 1]
        return part.store.tokens[start:end].astype(np.int32), part.store.supervised[start:end].copy()

    def origin(self, index: int) -> str:
        """The row that sample `index` came from: `path/to/file.jsonl:12`."""
        place, file, number = self.row(index)
        return f"{self._parts[place].names[file]}:{number}"

    def row(self, index: int) -> tuple[int, int, int]:
        """The row that sample `index` came from: its part, the file's index there, and its number."""
        place, sample = self._locate(index)
        store = self._parts[place].store
        file, number = store.origins[store.row_of_sample[sample]].tolist()
        return place, file, number

    def row_hashes(self) -> np.ndarray:
        """uint64: the content of every row that samples are of, once for each part that has it."""
        found = [np.zeros(0, np.uint64)]
        for part in self._parts:
            used = np.zeros(len(part.store.hashes), dtype=bool)
            used[part.store.row_of_sample[part.samples]] = True
            found.append(part.store.hashes[used])
        return np.concatenate(found)

    def first_rows(self, count: int) -> TokenDataset:
        """The samples of the first `count` rows; of a data set whose rows stand in order, as validation's do."""
        parts = []
        for part in self._parts:
            numbers = np.cumsum(np.diff(part.store.row_of_sample[part.samples], prepend=-1) != 0)
            parts.append(replace(part, samples=part.samples[numbers <= count]))
            count -= int(numbers[-1]) if len(numbers) else 0
        return TokenDataset(parts)

    def lacks(self, token_id: int) -> bool:
        """Whether the token is in no sample of the sources, those that are held out included."""
        return not any((part.store.tokens == token_id).any() for part in self._parts)

    def rows_of_fate(self, fate: int) -> list[str]:
        """The rows that samples are of and that `fate` (of `ledger`) befell, each once: `path/to/file.jsonl:12`."""
        found: dict[str, None] = {}
        for part in self._parts:
            used = np.zeros(len(part.store.hashes), dtype=bool)
            used[part.store.row_of_sample[part.samples]] = True
            for file, number in part.store.origins[used & (part.store.fates == fate)].tolist():
                found[f"{part.names[file]}:{number}"] = None
        return list(found)

    def _locate(self, index: int) -> tuple[int, int]:
        """The index of the part, and of the sample in its store."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        index %= len(self)
        place = int(np.searchsorted(self._starts, index, side="right")) - 1
        return place, int(self._parts[place].samples[index - self._starts[place]])
