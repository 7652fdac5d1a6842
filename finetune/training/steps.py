"""The step plan: which samples make up optimizer step k, how they are packed, and which rank computes them.

It follows from (seed, lengths, recipe) alone. The samples of a step do not depend on the number of ranks; only their
split does. So a run resumes at any step with no loader state, and continues on another number of devices.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch
from torch.utils.data import Dataset

from finetune.data.batches import ROW_MULTIPLE, MicroBatch, packed_batch, padded_batch, round_up, row_length
from finetune.data.dataset import TokenDataset
from finetune.data.packing import PackedRow, Prefixes, halve_row, pack_rows
from finetune.errors import BadInputError, DataError
from finetune.recipe.schema import TrainingSection


@dataclass(frozen=True)
class Packing:
    """How the samples of one rank become forward passes."""

    packed: bool
    micro_batch_size: int  # samples of a padded batch
    max_tokens: int  # tokens of a packed row
    prefixes: Prefixes
    row_multiple: int = ROW_MULTIPLE  # packed rows are padded to it
    length_limit: int | None = None  # longer samples get padded batches of their own: `attention.stretched_rope`

    @property
    def size(self) -> int:
        """The most that a forward pass holds, in `unit`."""
        return self.max_tokens if self.packed else self.micro_batch_size

    @property
    def unit(self) -> str:
        """What `size` counts."""
        return "tokens" if self.packed else "samples"

    def with_size(self, size: int) -> Packing:
        """The same for forward passes of at most `size`."""
        return replace(self, max_tokens=size) if self.packed else replace(self, micro_batch_size=size)


@dataclass(frozen=True)
class StepBatch:
    """One item of the loader: all that this rank computes for one optimizer step."""

    step: int  # 0-based
    micro_batches: list[MicroBatch]
    num_supervised: int  # of the whole step, over all ranks
    num_real_tokens: int  # of the whole step, over all ranks

    def pin_memory(self) -> StepBatch:
        """The same with tensors in page-locked memory."""
        pinned = [micro.pin_memory() for micro in self.micro_batches]
        return StepBatch(self.step, pinned, self.num_supervised, self.num_real_tokens)


@dataclass(frozen=True)
class StepPlan:
    """The order of samples over the whole run."""

    num_samples: int
    global_batch_size: int
    num_steps: int
    total_samples: int  # drawn over the whole run; the last step may be short of a full batch
    seed: int

    def samples(self, step: int) -> np.ndarray:
        """Dataset indices [<= global_batch_size] of optimizer step `step` (0-based)."""
        start = step * self.global_batch_size
        stop = min(start + self.global_batch_size, self.total_samples)
        parts = []
        while start < stop:
            epoch, offset = divmod(start, self.num_samples)
            count = min(stop - start, self.num_samples - offset)
            parts.append(_order(self.seed, epoch, self.num_samples)[offset : offset + count])
            start += count
        return np.concatenate(parts)

    def epoch(self, step: int) -> float:
        """Passes over the data when `step` steps are done."""
        return min(step * self.global_batch_size, self.total_samples) / self.num_samples


# Of a million samples a permutation takes 20 ms, and every step asks for its part of one: kept for two epochs, since a
# step may reach into the next.
@lru_cache(maxsize=2)
def _order(seed: int, epoch: int, num_samples: int) -> np.ndarray:
    # A generator per epoch: any epoch's order is known without the ones before it.
    return np.random.default_rng([seed, epoch]).permutation(num_samples)


def build_plan(num_samples: int, training: TrainingSection) -> StepPlan:
    """The plan for a data set of `num_samples`.

    Raises:
        DataError: if there is nothing to train on.
        BadInputError: if every step is one of warm-up.
    """
    if num_samples == 0:
        raise DataError("data.sources: no sample is left to train on; see the ledger above for the reasons")
    size = training.global_batch_size
    total = math.inf if training.epochs is None else max(1, round(training.epochs * num_samples))
    if training.max_steps is not None:
        total = min(total, training.max_steps * size)
    total_samples = int(total)
    num_steps, warmup = math.ceil(total_samples / size), training.schedule.warmup_steps
    if warmup is not None and warmup >= num_steps:
        raise BadInputError(
            f"training.schedule.warmup_steps: {warmup:,} steps of warm-up do not end before the run does, which has "
            f"{num_steps:,} ({total_samples:,} samples, {size:,} a step); lower it, or train for longer"
        )
    return StepPlan(num_samples, size, num_steps, total_samples, training.seed)


def split_over_ranks(samples: Sequence[int], costs: np.ndarray, world_size: int) -> list[list[int]]:
    """Give each rank samples of nearly equal total cost: largest first, to the rank with least (Graham 1969)."""
    shares: list[list[int]] = [[] for _ in range(world_size)]
    loads = np.zeros(world_size)
    for index in np.argsort(-costs, kind="stable").tolist():
        rank = int(np.argmin(loads))
        shares[rank].append(int(samples[index]))
        loads[rank] += costs[index]
    return shares


def sample_costs(lengths: np.ndarray) -> np.ndarray:
    """Relative work of samples: products grow with the length, attention with its square.

    At 4,096 tokens attention costs about half as much as everything else in a 7B model.
    """
    return lengths * (1.0 + lengths / 8192.0)


def plan_rows(samples: Sequence[int], lengths: np.ndarray, packing: Packing, world_size: int) -> list[list[PackedRow]]:
    """Packed rows of every rank, the same number for each: sharded layers are gathered by all ranks together."""
    shares = split_over_ranks(samples, sample_costs(lengths[list(samples)].astype(float)), world_size)
    rows = [pack_rows(share, lengths, packing.prefixes, packing.max_tokens) for share in shares]
    count = max(len(own) for own in rows)
    return [_split_to(own, count, lengths) for own in rows]


def plan_batches(
    samples: Sequence[int], lengths: np.ndarray, packing: Packing, world_size: int
) -> list[list[list[int]]]:
    """The samples of every rank's padded batches, of like length together; the same number for each rank."""
    shares = split_over_ranks(samples, sample_costs(lengths[list(samples)].astype(float)), world_size)
    size, limit = packing.micro_batch_size, math.inf if packing.length_limit is None else packing.length_limit
    batches = []
    for share in shares:
        ordered = sorted(share, key=lambda sample: (-int(lengths[sample]), sample))
        num_long = sum(int(lengths[sample]) > limit for sample in ordered)
        parts = (ordered[:num_long], ordered[num_long:])
        batches.append([part[start : start + size] for part in parts for start in range(0, len(part), size)])
    count = max(len(own) for own in batches)
    return [own + [[] for _ in range(count - len(own))] for own in batches]


def rank_imbalance(
    plan: StepPlan, lengths: np.ndarray, packing: Packing, world_size: int, max_steps: int = 64
) -> float:
    """How much longer the ranks' forward passes take than with equal shares, as a share of the time: 0.02 is 2 %.

    A step ends with its slowest rank, so this is (sum of the largest costs / sum of the mean costs) - 1, in the units
    of `sample_costs` with padding, over at most `max_steps` steps spread over the whole run.
    """
    steps = np.unique(np.linspace(0, plan.num_steps - 1, min(max_steps, plan.num_steps)).astype(int)).tolist()
    largest = mean = 0.0
    for step in steps:
        samples = plan.samples(step).tolist()
        if packing.packed:
            rows = plan_rows(samples, lengths, packing, world_size)
            costs = [sum(_row_cost(row, lengths, packing.row_multiple) for row in own) for own in rows]
        else:
            batches = plan_batches(samples, lengths, packing, world_size)
            costs = [sum(_batch_cost(batch, lengths) for batch in own) for own in batches]
        largest += max(costs)
        mean += sum(costs) / world_size
    return largest / mean - 1.0


def _row_cost(row: PackedRow, lengths: np.ndarray, row_multiple: int) -> float:
    # Attention over a shared prefix is as deep as without sharing; only the prefix's own rows are saved.
    own = lengths[row.samples].astype(float)
    return row_length(row.num_tokens, row_multiple) + float((sample_costs(own) - own).sum())


def _batch_cost(batch: list[int], lengths: np.ndarray) -> float:
    width = round_up(int(lengths[batch].max())) if batch else round_up(1)
    return max(len(batch), 1) * float(sample_costs(np.array([width], dtype=float))[0])


def _split_to(rows: list[PackedRow], count: int, lengths: np.ndarray) -> list[PackedRow]:
    """Halve the largest rows until there are `count`; a row of one sample is followed by empty ones."""
    rows = list(rows)
    while len(rows) < count:
        largest = max(range(len(rows)), key=lambda i: (len(rows[i].samples) > 1, rows[i].num_tokens), default=None)
        if largest is None or len(rows[largest].samples) < 2:
            rows.append(PackedRow((), 0))
            continue
        rows[largest : largest + 1] = halve_row(rows[largest], lengths)
    return rows


class StepDataset(Dataset[StepBatch]):
    """Item k is everything that `rank` computes for step `first_step + k`. Works in loader processes."""

    def __init__(
        self, dataset: TokenDataset, plan: StepPlan, packing: Packing, *, rank: int, world_size: int, pad_id: int
    ) -> None:
        self.dataset = dataset
        self.plan = plan
        self.packing = packing
        self.rank = rank
        self.world_size = world_size
        self.pad_id = pad_id
        self.first_step = 0

    def __len__(self) -> int:
        return self.plan.num_steps - self.first_step

    def __getitem__(self, index: int) -> StepBatch:
        if index >= len(self):
            raise IndexError(index)
        step = self.first_step + index
        samples = self.plan.samples(step)
        return self.batch(step, samples.tolist())

    def batch(self, step: int, samples: list[int]) -> StepBatch:
        """This rank's part of a step made of `samples`."""
        lengths = self.dataset.lengths
        return StepBatch(
            step,
            self.micro_batches(samples),
            int(self.dataset.num_supervised[samples].sum()),
            int(lengths[samples].sum()),
        )

    def micro_batches(self, samples: list[int]) -> list[MicroBatch]:
        """This rank's forward passes over its share of `samples`."""
        lengths = self.dataset.lengths
        if self.packing.packed:
            rows = plan_rows(samples, lengths, self.packing, self.world_size)[self.rank]
            return [packed_batch(self.dataset, row, self.pad_id, self.packing.row_multiple) for row in rows]
        batches = plan_batches(samples, lengths, self.packing, self.world_size)[self.rank]
        return [padded_batch(self.dataset, batch, self.pad_id) for batch in batches]


def evaluation_steps(dataset: StepDataset, samples_per_step: int) -> Iterator[StepBatch]:
    """The whole data set once, in order, as steps without an optimizer: for validation."""
    order = np.argsort(-dataset.dataset.lengths, kind="stable").tolist()
    for start in range(0, len(order), samples_per_step):
        yield dataset.batch(start // samples_per_step, order[start : start + samples_per_step])


def derived_seed(seed: int, step: int, micro_step: int, rank: int) -> int:
    """The seed of one forward pass's dropout: nothing random needs to be stored in a checkpoint."""
    state = np.random.SeedSequence([seed, step, micro_step, rank]).generate_state(1, dtype=np.uint64)
    return int(state[0] >> np.uint64(1))


def seed_micro_step(seed: int, step: int, micro_step: int, rank: int) -> None:
    """Set torch's generators for one forward pass."""
    torch.manual_seed(derived_seed(seed, step, micro_step, rank))
