"""The forward passes that a plan leads to: the largest, and how much of what they compute is real."""

from __future__ import annotations

from dataclasses import dataclass

from finetune.data.batches import round_up, row_length
from finetune.data.dataset import TokenDataset
from finetune.data.packing import PackedRow
from finetune.kernels.layout import Group
from finetune.models.footprint import ForwardPass
from finetune.training.steps import Packing, StepPlan, plan_batches, plan_rows

# Steps that are looked at: a second of work at most.
MAX_PLANNED_STEPS = 300


@dataclass(frozen=True)
class Passes:
    """The forward passes of some steps."""

    largest: ForwardPass
    real_tokens: int
    computed_tokens: int
    num_passes: int
    num_steps: int

    @property
    def efficiency(self) -> float:
        """Real tokens of the samples per computed one: above 1 where prefixes are shared."""
        return self.real_tokens / max(1, self.computed_tokens)


def look_at_passes(plan: StepPlan, packing: Packing, train: TokenDataset, world_size: int) -> Passes:
    """What one process computes in the first steps: every rank's passes, the largest among them."""
    found: list[tuple[int, ForwardPass]] = []
    num_steps = min(plan.num_steps, MAX_PLANNED_STEPS)
    for step in range(num_steps):
        samples = plan.samples(step).tolist()
        if packing.packed:
            for rows in plan_rows(samples, train.lengths, packing, world_size):
                found += [_packed_pass(row, train, packing) for row in rows if row.samples]
        else:
            for batches in plan_batches(samples, train.lengths, packing, world_size):
                found += [_padded_pass(batch, train) for batch in batches if batch]
    largest = max((one for _, one in found), key=lambda one: (one.rows * one.tokens, one.supervised))
    computed = sum(one.rows * one.tokens for _, one in found)
    return Passes(largest, sum(real for real, _ in found), computed, len(found), num_steps)


def _packed_pass(row: PackedRow, train: TokenDataset, packing: Packing) -> tuple[int, ForwardPass]:
    layout = tuple(
        Group(group.prefix_len, tuple(int(train.lengths[s]) - group.prefix_len for s in group.samples))
        for group in row.groups
    )
    tokens = row_length(sum(group.num_tokens for group in layout), packing.row_multiple)
    supervised = int(train.num_supervised[row.samples].sum())
    return int(train.lengths[row.samples].sum()), ForwardPass(1, tokens, supervised, layout)


def _padded_pass(batch: list[int], train: TokenDataset) -> tuple[int, ForwardPass]:
    width = round_up(int(train.lengths[batch].max()))
    return int(train.lengths[batch].sum()), ForwardPass(len(batch), width, int(train.num_supervised[batch].sum()))
