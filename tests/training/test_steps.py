"""The step plan: order, split over ranks, packing; and what none of them may change."""

from __future__ import annotations

import time

import numpy as np
import pytest

from finetune.data.packing import (
    PackedRow,
    Prefixes,
    best_fit_decreasing,
    group_tokens,
    halve_row,
    no_prefixes,
    pack_rows,
)
from finetune.errors import BadInputError
from finetune.recipe.schema import TrainingSection
from finetune.training.steps import (
    Packing,
    build_plan,
    plan_batches,
    plan_rows,
    rank_imbalance,
    sample_costs,
    split_over_ranks,
)


def training(**values: object) -> TrainingSection:
    return TrainingSection.model_validate({"global_batch_size": 4, "micro_batch_size": 2, **values})


def test_every_epoch_shows_every_sample_once() -> None:
    plan = build_plan(10, training(epochs=3.0))
    shown = np.concatenate([plan.samples(step) for step in range(plan.num_steps)])
    assert plan.num_steps == 8 and len(shown) == 30
    for epoch in range(3):
        assert sorted(shown[10 * epoch : 10 * (epoch + 1)]) == list(range(10))
    assert shown[:10].tolist() != shown[10:20].tolist()


def test_fm14_the_last_step_holds_what_is_left() -> None:
    plan = build_plan(10, training(epochs=1.0))
    assert [len(plan.samples(step)) for step in range(plan.num_steps)] == [4, 4, 2]


def test_max_steps_and_epochs_end_at_whichever_comes_first() -> None:
    assert build_plan(10, training(max_steps=2, epochs=3.0)).num_steps == 2
    assert build_plan(10, training(max_steps=99, epochs=1.0)).num_steps == 3


def test_a_warm_up_ends_before_the_plan_does() -> None:
    assert build_plan(10, training(epochs=1.0, schedule={"warmup_steps": 2})).num_steps == 3
    with pytest.raises(
        BadInputError, match=r"warmup_steps: 3 steps of warm-up .* which has 3 \(10 samples, 4 a step\)"
    ):
        build_plan(10, training(epochs=1.0, schedule={"warmup_steps": 3}))
    assert build_plan(1, training(epochs=1.0)).num_steps == 1, "a share is rounded up, and is no mistake"


def test_fm13_the_order_follows_from_the_seed_alone() -> None:
    first, second, other = (build_plan(50, training(epochs=2.0, seed=seed)) for seed in (7, 7, 8))
    for step in range(first.num_steps):
        assert first.samples(step).tolist() == second.samples(step).tolist()
    assert first.samples(0).tolist() != other.samples(0).tolist()


def test_an_epoch_is_shuffled_once_however_many_steps_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    """A shuffle for every step made the start quadratic: three quarters of an hour for a million samples."""
    shuffled = []
    default_rng = np.random.default_rng
    monkeypatch.setattr(np.random, "default_rng", lambda seed: shuffled.append(seed) or default_rng(seed))
    plan = build_plan(1001, training(epochs=3.0, seed=71))
    for step in range(plan.num_steps):
        plan.samples(step)
    assert shuffled == [[71, 0], [71, 1], [71, 2]]


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("packed", [True, False])
def test_fm18_ranks_share_a_step_and_change_nothing_of_it(world_size: int, packed: bool) -> None:
    rng = np.random.default_rng(0)
    lengths = rng.integers(5, 60, 40).astype(np.int32)
    packing = Packing(packed, 2, 64, Prefixes(np.zeros(40, np.int32), np.array([5], np.int32)))
    for samples in (list(range(40)), [3], [1, 2, 3, 4, 5]):
        if packed:
            rows = plan_rows(samples, lengths, packing, world_size)
            held = [[sample for row in own for sample in row.samples] for own in rows]
            assert len({len(own) for own in rows}) == 1, "sharded layers are gathered by all ranks together"
            assert all(row.num_tokens <= packing.max_tokens for own in rows for row in own)
        else:
            batches = plan_batches(samples, lengths, packing, world_size)
            held = [[sample for batch in own for sample in batch] for own in batches]
            assert len({len(own) for own in batches}) == 1
        assert sorted(sample for own in held for sample in own) == samples


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_samples_beyond_the_limit_of_a_rotation_have_batches_of_their_own(world_size: int) -> None:
    lengths = np.random.default_rng(0).integers(5, 60, 23).astype(np.int32)
    packing = Packing(False, 4, 64, no_prefixes(23), length_limit=32)
    batches = plan_batches(list(range(23)), lengths, packing, world_size)
    assert sorted(sample for own in batches for batch in own for sample in batch) == list(range(23))
    assert len({len(own) for own in batches}) == 1
    assert all(len({int(lengths[sample]) > 32 for sample in batch}) < 2 for own in batches for batch in own)


def test_rows_halved_for_other_ranks_keep_what_their_samples_share() -> None:
    """Three long samples, and short ones with an instruction of 440 tokens: unshared, half of them is 1,840 tokens."""
    lengths = np.array([900] * 3 + [460] * 16, np.int32)
    prefixes = Prefixes(np.array([-1] * 3 + [0] * 16, np.int32), np.array([440], np.int32))
    first, second = plan_rows(range(19), lengths, Packing(True, 2, 1024, prefixes), 2)
    assert sorted(sample for row in (*first, *second) for sample in row.samples) == list(range(19))
    assert [row.num_tokens for row in first] == [900, 900, 440 + 7 * 20]
    assert [row.num_tokens for row in second] == [900, 440 + 4 * 20, 440 + 5 * 20]


@pytest.mark.parametrize("half", [1, 2, 3])
def test_a_row_is_halved_within_a_group(half: int) -> None:
    """A sample that is left alone shares nothing, and stands with the others that do not."""
    lengths = np.array([5, 15, 16, 17, 18, 19], np.int32)[: 2 * half]
    prefixes = Prefixes(np.array([-1, 0, 0, 0, 0, 0], np.int32), np.array([10], np.int32))
    (row,) = pack_rows(range(2 * half), lengths, prefixes, 99)
    halves = halve_row(row, lengths)
    assert [len(each.samples) for each in halves] == [half, half]
    assert [sample for each in halves for sample in each.samples] == row.samples
    for each in halves:
        assert each.num_tokens == sum(group_tokens(group, lengths) for group in each.groups) <= row.num_tokens
        assert all((group.prefix_len > 0) <= (len(group.samples) > 1) for group in each.groups)


def test_ranks_get_nearly_equal_work() -> None:
    lengths = np.random.default_rng(0).integers(60, 400, 64).astype(float)
    costs = sample_costs(lengths)
    shares = split_over_ranks(list(range(64)), costs, 4)
    loads = [costs[share].sum() for share in shares]
    assert max(loads) / (sum(loads) / 4) < 1.05


def test_rows_hold_their_capacity_and_every_sample() -> None:
    lengths = np.random.default_rng(1).integers(1, 200, 300).astype(np.int32)
    rows = pack_rows(range(300), lengths, no_prefixes(300), 256)
    assert sorted(sample for row in rows for sample in row.samples) == list(range(300))
    assert all(row.num_tokens == lengths[row.samples].sum() <= 256 for row in rows)


def test_a_sample_longer_than_a_row_stands_alone() -> None:
    rows = pack_rows([0, 1, 2], np.array([300, 10, 20], np.int32), no_prefixes(3), 64)
    assert sorted(sorted(row.samples) for row in rows) == [[0], [1, 2]]


def test_a_shared_prefix_is_counted_once_a_group() -> None:
    prefixes = Prefixes(np.array([0, 0, 0, -1], np.int32), np.array([10], np.int32))
    (row,) = pack_rows([0, 1, 2, 3], np.array([15, 16, 17, 5], np.int32), prefixes, 64)
    assert isinstance(row, PackedRow)
    assert row.num_tokens == 10 + 5 + 6 + 7 + 5
    assert {(group.prefix_len, group.samples) for group in row.groups} == {(10, (2, 1, 0)), (0, (3,))}


def test_packing_fills_rows_and_takes_no_time() -> None:
    """Lengths like instruction data: log-normal around 150 tokens."""
    lengths = np.clip(np.random.default_rng(0).lognormal(5.0, 0.5, 50_000), 20, 2048).astype(np.int32)
    start = time.process_time()
    bins = best_fit_decreasing(lengths.tolist(), 2048)
    seconds = time.process_time() - start
    assert seconds < 2.0
    assert lengths.sum() / (2048 * len(bins)) > 0.97


def test_a_limit_far_above_all_samples_costs_nothing() -> None:
    assert best_fit_decreasing([3, 5, 4], 2**62) == [[1, 2, 0]]
    assert best_fit_decreasing([], 2**62) == []


@pytest.mark.parametrize("row_multiple", [32, 512])
def test_the_imbalance_of_ranks_counts_the_padding_of_their_rows(row_multiple: int) -> None:
    lengths = np.array([500, 300], np.int32)
    plan = build_plan(2, training(max_steps=1, global_batch_size=2))
    packing = Packing(True, 1, 512, no_prefixes(2), row_multiple)
    computed = {32: (512, 320), 512: (512, 512)}[row_multiple]
    costs = [tokens + length**2 / 8192 for tokens, length in zip(computed, (500, 300), strict=True)]
    assert rank_imbalance(plan, lengths, packing, 2) == pytest.approx(max(costs) / (sum(costs) / 2) - 1)
