"""Which rows are trained on, how often, and which are held out: index arrays over cached samples."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from finetune.data.cache import Store
from finetune.data.dataset import Part, TokenDataset
from finetune.data.ledger import SourceLedger
from finetune.data.sources import Source
from finetune.errors import DataError


@dataclass(frozen=True)
class Opened:
    """A source, its cached samples and its account."""

    source: Source
    store: Store
    account: SourceLedger


def choose_validation(hashes: np.ndarray, size: float, seed: int) -> np.ndarray:
    """bool [num_rows]: rows held out. Rows of equal content go together, and never to both sides."""
    num_rows = len(hashes)
    if size >= 1 and size != int(size):
        raise DataError(f"data.validation.size: {size} is neither a share below 1 nor a whole number of rows.")
    wanted = max(1, round(size * num_rows)) if size < 1 else int(size)
    if wanted >= num_rows:
        raise DataError(
            f"data.validation.size: {size:g} takes {wanted:,} of {num_rows:,} rows; none is left to train on."
        )
    _, group, group_size = np.unique(hashes, return_inverse=True, return_counts=True)
    order = np.random.default_rng([seed, 1]).permutation(len(group_size))
    chosen = np.zeros(len(group_size), dtype=bool)
    for index in order:
        if group_size[index] <= wanted:
            chosen[index] = True
            wanted -= group_size[index]
        if not wanted:
            break
    if not chosen.any():
        raise DataError("data.validation.size: every row occurs more often than rows are to be held out.")
    held: np.ndarray = chosen[group]
    return held


def train_set(opened: list[Opened], in_validation: np.ndarray, seed: int) -> TokenDataset:
    """Rows that are not held out, each source as often as its weight says."""
    parts, first_row = [], 0
    for index, each in enumerate(opened):
        num_rows = len(each.store.hashes)
        rows = np.flatnonzero(~in_validation[first_row : first_row + num_rows])
        first_row += num_rows
        share, whole = math.modf(each.account.weight)
        picks = [rows] * int(whole)
        if share:
            order = np.random.default_rng([seed, 2, index]).permutation(len(rows))
            picks.append(np.sort(rows[order[: round(share * len(rows))]]))
        if len(rows) and not any(map(len, picks)):
            raise DataError(
                f"{each.source.where}.weight: {each.account.weight:g} of {len(rows):,} rows is none of them; raise it, "
                "or leave the source out."
            )
        samples = [_samples_of(each.store, pick) for pick in picks]
        parts.append(Part(each.store, each.source.names, np.concatenate(samples)))
    return TokenDataset(parts)


def validation_set(opened: list[Opened], in_validation: np.ndarray, held_out: Opened | None) -> TokenDataset | None:
    """The held-out source, or the rows that were split off, one part a source; None where there is neither."""
    if held_out is not None:
        return TokenDataset(
            [Part(held_out.store, held_out.source.names, np.arange(len(held_out.store), dtype=np.int64))]
        )
    if not in_validation.any():
        return None
    parts, first_row = [], 0
    for each in opened:
        num_rows = len(each.store.hashes)
        rows = np.flatnonzero(in_validation[first_row : first_row + num_rows])
        first_row += num_rows
        parts.append(Part(each.store, each.source.names, _samples_of(each.store, rows)))
    return TokenDataset(parts)


def _samples_of(store: Store, rows: np.ndarray) -> np.ndarray:
    """int64: every sample of the given rows, in order."""
    wanted = np.zeros(len(store.hashes), dtype=bool)
    wanted[rows] = True
    return np.flatnonzero(wanted[store.row_of_sample])
