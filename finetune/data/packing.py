"""Which samples share a row, and in which order: best-fit decreasing over sample lengths.

Packing never splits a sample and never changes the result of a step; it only decides what is computed together.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from finetune.data.dataset import TokenDataset

# A shared prefix pays from about this many tokens: below, the extra attention block costs more than it saves.
MIN_PREFIX_TOKENS = 8


@dataclass(frozen=True)
class PackedGroup:
    """Samples (dataset indices) that share their first `prefix_len` tokens."""

    prefix_len: int
    samples: tuple[int, ...]


@dataclass(frozen=True)
class PackedRow:
    """The groups of one row and the tokens it takes, padding not counted."""

    groups: tuple[PackedGroup, ...]
    num_tokens: int

    @property
    def samples(self) -> list[int]:
        """Dataset indices of the row's samples, in order."""
        return [sample for group in self.groups for sample in group.samples]


@dataclass(frozen=True)
class Prefixes:
    """For every sample its family (-1: none) and for every family the number of tokens that its samples share."""

    family: np.ndarray  # int32 [N]
    length: np.ndarray  # int32 [F]

    def of(self, sample: int) -> int:
        """Tokens that `sample` shares with its family; 0 without one."""
        family = int(self.family[sample])
        return 0 if family < 0 else int(self.length[family])


def no_prefixes(num_samples: int) -> Prefixes:
    """Every sample for itself."""
    return Prefixes(np.full(num_samples, -1, dtype=np.int32), np.zeros(0, dtype=np.int32))


def best_fit_decreasing(sizes: Sequence[int], capacity: int) -> list[list[int]]:
    """Partition items into bins: largest first, each into the fullest bin that takes it.

    The open bins' free space is a bit set in one integer, so an item costs a few machine words, not a search.
    An item larger than `capacity` gets a bin of its own.
    """
    capacity = min(capacity, sum(sizes))  # a limit far above all there is would cost memory for each of its tokens
    bins: list[list[int]] = []
    by_space: list[list[int]] = [[] for _ in range(capacity + 1)]
    free = 0
    for item in np.argsort(-np.asarray(sizes), kind="stable").tolist():
        size = sizes[item]
        fitting = free >> size if size <= capacity else 0
        if fitting:
            space = size + (fitting & -fitting).bit_length() - 1
            target = by_space[space].pop()
            if not by_space[space]:
                free &= ~(1 << space)
        else:
            target, space = len(bins), max(capacity, size)
            bins.append([])
        bins[target].append(item)
        left = space - size
        if left and size <= capacity:
            by_space[left].append(target)
            free |= 1 << left
    return bins


def pack_rows(samples: Sequence[int], lengths: np.ndarray, prefixes: Prefixes, capacity: int) -> list[PackedRow]:
    """Pack `samples` into rows of at most `capacity` tokens, members of a prefix family together.

    A sample longer than `capacity` gets a row of its own.
    """
    groups: list[PackedGroup] = []
    for family, members in _by_family(samples, prefixes).items():
        prefix = 0 if family < 0 else int(prefixes.length[family])
        if prefix == 0 or len(members) == 1:
            groups.extend(PackedGroup(0, (sample,)) for sample in members)
            continue
        own = [int(lengths[sample]) - prefix for sample in members]
        for packed in best_fit_decreasing(own, max(1, capacity - prefix)):
            shared = prefix if len(packed) > 1 else 0
            groups.append(PackedGroup(shared, tuple(members[i] for i in packed)))
    sizes = [group_tokens(group, lengths) for group in groups]
    return [
        PackedRow(tuple(_joined([groups[i] for i in packed])), sum(sizes[i] for i in packed))
        for packed in best_fit_decreasing(sizes, capacity)
    ]


def halve_row(row: PackedRow, lengths: np.ndarray) -> list[PackedRow]:
    """The first and the second half of a row's samples; what they shared stays shared, so none is longer than `row`."""
    half = len(row.samples) // 2
    first: list[PackedGroup] = []
    second: list[PackedGroup] = []
    for group in row.groups:
        room = half - sum(len(other.samples) for other in first)
        for part, samples in ((first, group.samples[:room]), (second, group.samples[room:])):
            if samples:
                part.append(PackedGroup(group.prefix_len if len(samples) > 1 else 0, samples))
    return [
        PackedRow(tuple(_joined(groups)), sum(group_tokens(group, lengths) for group in groups))
        for groups in (first, second)
    ]


def group_tokens(group: PackedGroup, lengths: np.ndarray) -> int:
    """Tokens that a group takes in its row."""
    own = sum(int(lengths[sample]) - group.prefix_len for sample in group.samples)
    return own + group.prefix_len


def _by_family(samples: Sequence[int], prefixes: Prefixes) -> dict[int, list[int]]:
    families: dict[int, list[int]] = {}
    for sample in samples:
        families.setdefault(int(prefixes.family[sample]), []).append(sample)
    return families


def _joined(groups: list[PackedGroup]) -> list[PackedGroup]:
    """The groups of a row with those that share nothing made one."""
    alone = tuple(sample for group in groups if group.prefix_len == 0 for sample in group.samples)
    shared = [group for group in groups if group.prefix_len]
    return ([PackedGroup(0, alone)] if alone else []) + shared


def find_prefixes(dataset: TokenDataset, min_members: int = 4) -> Prefixes:
    """Families of samples that open with the same tokens, none of which carries loss in any of them.

    Candidates are beginnings of 8, 16, 32, … tokens; a sample joins the longest that at least `min_members` samples
    have, and a family's prefix then grows to all that its members share. Reads each sample once.
    """
    keys: list[list[bytes]] = []
    counts: dict[bytes, int] = {}
    for sample in range(len(dataset)):
        candidates = _prefix_keys(*dataset[sample])
        keys.append(candidates)
        for key in candidates:
            counts[key] = counts.get(key, 0) + 1
    numbers: dict[bytes, int] = {}
    family = np.full(len(dataset), -1, dtype=np.int32)
    for sample, candidates in enumerate(keys):
        chosen = next((key for key in reversed(candidates) if counts[key] >= min_members), None)
        if chosen is not None:
            family[sample] = numbers.setdefault(chosen, len(numbers))
    return Prefixes(family, _common_lengths(dataset, family, len(numbers)))


def _free_tokens(input_ids: np.ndarray, supervised: np.ndarray) -> int:
    """Tokens before the first supervised one, the last excepted: a sample keeps at least one token of its own."""
    first = int(np.argmax(supervised)) if supervised.any() else len(input_ids)
    return min(first, len(input_ids) - 1)


def _prefix_keys(input_ids: np.ndarray, supervised: np.ndarray) -> list[bytes]:
    limit = _free_tokens(input_ids, supervised)
    keys, length = [], MIN_PREFIX_TOKENS
    while length <= limit:
        keys.append(hashlib.blake2b(input_ids[:length].tobytes(), digest_size=12).digest())
        length *= 2
    return keys


def _common_lengths(dataset: TokenDataset, family: np.ndarray, num_families: int) -> np.ndarray:
    shared: list[np.ndarray | None] = [None] * num_families
    for sample in np.flatnonzero(family >= 0).tolist():
        input_ids, supervised = dataset[sample]
        own = input_ids[: _free_tokens(input_ids, supervised)]
        known = shared[family[sample]]
        if known is None:
            shared[family[sample]] = own.copy()
            continue
        size = min(len(known), len(own))
        differs = known[:size] != own[:size]
        shared[family[sample]] = known[: int(np.argmax(differs)) if differs.any() else size]
    return np.array([0 if ids is None else len(ids) for ids in shared], dtype=np.int32)
