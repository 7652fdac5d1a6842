"""Which strategy `auto` takes on devices of stated sizes, and what would make a run fit."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from finetune.models.footprint import ForwardPass
from finetune.models.memory import Planner, Spread, largest_pass
from finetune.recipe.schema import Recipe
from finetune.training.fitting import (
    USABLE_SHARE,
    Devices,
    _fsdp,
    _offload,
    _State,
    cheapest_fit,
    choose_strategy,
    estimate,
    fewest_recomputed,
    place,
    settle_checkpointing,
    with_checkpointing,
)
from finetune.training.strategy import Placement
from tests.models.test_memory import recipe

SIZES = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 16, "vocab_size": 8192}
CONFIG = transformers.LlamaConfig(**SIZES, num_attention_heads=16, num_key_value_heads=4)
PLANNER = Planner(CONFIG)  # for all: what one test had measured, the others need not
SHORT = {"max_seq_len": 256}
FOUR_GPUS = Placement("cuda", 4, 1, "ddp")


def needed(made: Recipe, strategy: str) -> int:
    return PLANNER.estimate(made, Spread(strategy, 4, "cuda")).total


def test_ddp_where_the_whole_model_fits_a_device() -> None:
    made, planner = recipe(data=SHORT, training={"micro_batch_size": 8}), PLANNER
    need = needed(made, "ddp")
    assert choose_strategy(made, planner, FOUR_GPUS, 2 * need)[0] == "ddp"
    strategy, why = choose_strategy(made, planner, FOUR_GPUS, need)  # not within the share that may be used
    assert strategy == "fsdp"
    assert "does not fit" in why and "GB a device" in why


def test_int8_is_never_sharded() -> None:
    made = recipe(model={"quantization": "int8"})
    assert choose_strategy(made, PLANNER, FOUR_GPUS, 1)[0] == "ddp"


@pytest.mark.skipif(torch.cuda.is_available(), reason="counts the machine's GPUs")
def test_a_recipe_is_placed_by_its_size(capsys: Any) -> None:
    cpus = {"accelerator": "cpu", "devices": 2}
    made = recipe(distributed=cpus)
    assert place(made, CONFIG, memory_bytes=10**12).strategy == "ddp"
    assert place(made, CONFIG, memory_bytes=10**9).strategy == "fsdp"
    said = capsys.readouterr().err.splitlines()
    assert [line.partition(":")[0] for line in said] == ["distributed.strategy"] * 2
    assert place(recipe(distributed={"accelerator": "cpu"}), CONFIG, memory_bytes=1).strategy == "single"
    given = recipe(distributed={**cpus, "strategy": "ddp"})
    assert place(given, CONFIG, memory_bytes=1).strategy == "ddp"


def apply(made: Recipe, override: str) -> Recipe:
    """The recipe with one override, through the schema."""
    values = made.model_dump(mode="json")
    for one in override.split():
        key, _, value = one.partition("=")
        *path, last = key.split(".")
        section = values
        for piece in path:
            section = section[piece]
        section[last] = {"true": True, "false": False}.get(value, int(value) if value.isdigit() else value)
    return Recipe.model_validate(values)


def test_the_fewest_layers_to_recompute_are_named() -> None:
    made = recipe(data=SHORT, training={"micro_batch_size": 8, "gradient_checkpointing": True})
    planner, spread, attention = PLANNER, Spread("single", 1, "cuda"), "segments"
    step, all_layers = largest_pass(planner.config, made, attention), planner.num_layers

    def total(count: int) -> int:
        value = {0: "false", all_layers: "true"}.get(count, str(count))
        changed = apply(made, f"training.gradient_checkpointing={value}")
        return planner.estimate(changed, spread, step).total

    for wanted in (0, 1, all_layers - 1, all_layers):
        devices = Devices("cuda", math.ceil((total(wanted) + 1) / USABLE_SHARE), 1)
        fit = fewest_recomputed(planner, made, step, "single", devices)
        if wanted == all_layers:
            assert fit is None
        else:
            assert fit is not None and fit.total == total(wanted)
            assert fit.overrides == (f"training.gradient_checkpointing={wanted or 'false'}",)
    assert fewest_recomputed(planner, apply(made, "training.gradient_checkpointing=1"), step, "single", devices) is None


@pytest.mark.parametrize("share", [0.9, 0.7, 0.5])
def test_the_cheapest_change_fits_and_is_a_recipe(share: float) -> None:
    made, planner = recipe(data=SHORT, training={"micro_batch_size": 8}), PLANNER
    start = planner.estimate(made, Spread("single", 1, "cuda"))
    devices = Devices("cuda", int(share * start.total), 1)
    fit = cheapest_fit(planner, made, start.step, "single", devices)
    assert fit is not None and fit.total <= devices.usable_bytes < start.total
    changed = made
    for override in fit.overrides:
        changed = apply(changed, override)
    assert (
        estimate(planner, changed, planner.estimate(changed, start.spread).step, "single", devices).total == fit.total
    )


def test_one_change_is_preferred_and_none_is_said() -> None:
    made, planner = recipe(data=SHORT, training={"micro_batch_size": 8}), PLANNER
    start = planner.estimate(made, Spread("ddp", 4, "cuda"))
    devices = Devices("cuda", int(start.total / 0.95) - 10**6, 4)
    fit = cheapest_fit(planner, made, start.step, "ddp", devices)
    assert fit is not None and len(fit.overrides) == 1
    assert cheapest_fit(planner, made, start.step, "ddp", replace(devices, memory_bytes=10**8)) is None


def test_as_few_layers_as_fit_are_recomputed() -> None:
    made, planner = recipe(training={"micro_batch_size": 1, "optimizer": {"name": "paged_adamw_8bit"}}), PLANNER

    def total(wanted: bool | int) -> int:
        training = made.training.model_copy(update={"gradient_checkpointing": wanted})
        changed = made.model_copy(update={"training": training})
        return planner.estimate(changed, Spread("single", 1, "cuda")).total

    every = [total(False), *(total(count) for count in range(1, planner.num_layers)), total(True)]
    assert every[-1] < every[-2] < every[0]
    devices = Devices("cuda", int(every[-2] / 0.95) + 10**3, 1)
    step = planner.estimate(made, Spread("single", 1, "cuda")).step
    fit = cheapest_fit(planner, made, step, "single", devices)
    assert fit is not None and fit.overrides == (f"training.gradient_checkpointing={planner.num_layers - 1}",)


def test_memory_of_a_cpu_is_shared(tmp_path: Path) -> None:
    from finetune.training.fitting import memory_of

    one, two = (memory_of(Placement("cpu", count, 1, "ddp")) for count in (1, 2))
    assert two == one // 2


@pytest.mark.parametrize(("policy", "offered"), [("stop", True), ("halve", False)])
def test_sharding_is_offered_where_the_recipe_may_have_it(policy: str, offered: bool) -> None:
    state = _State(recipe(training={"on_out_of_memory": policy}), ForwardPass(1, 8, 8), "ddp")
    for change in (_fsdp, _offload):
        assert bool(list(change(PLANNER, state, Devices("cuda", 1, 4)))) == offered


ONE_GPU = Placement("cuda", 1, 1, "single")


@pytest.mark.parametrize("share", [1.0, 0.5, 0.01])
def test_auto_recomputes_as_few_layers_as_fit(share: float) -> None:
    planner = PLANNER
    made = recipe(data=SHORT, training={"micro_batch_size": 8, "gradient_checkpointing": "auto"})
    step = largest_pass(CONFIG, made, "segments")
    devices = Devices("cuda", 0, 1)

    def total(wanted: bool | int) -> int:
        training = made.training.model_copy(update={"gradient_checkpointing": wanted})
        changed = made.model_copy(update={"training": training})
        return estimate(planner, changed, step, "single", devices).total

    need = total(True) + share * (total(False) - total(True))
    settled, why = settle_checkpointing(made, planner, step, ONE_GPU, int(need / USABLE_SHARE) + 1)
    chosen = settled.training.gradient_checkpointing
    assert chosen != "auto" and total(chosen) <= need + 1 and f"{planner.num_layers} layers" in why
    if chosen is not False:
        fewer = planner.num_layers - 1 if chosen is True else chosen - 1
        assert total(fewer or False) > need, "one layer fewer does not fit"
    assert (chosen is False) == (share == 1.0)

    settled, why = settle_checkpointing(made, planner, step, ONE_GPU, 10**6)
    assert settled.training.gradient_checkpointing is True and "with fewer than all 16 layers it does not fit" in why
    same = recipe(training={"gradient_checkpointing": 3})
    assert settle_checkpointing(same, planner, step, ONE_GPU, 1) == (same, "")


def test_auto_is_settled_and_said_before_a_run(capsys: Any) -> None:
    made = recipe(training={"gradient_checkpointing": "auto"})
    settled = with_checkpointing(made, CONFIG, "segments", Placement("cpu", 1, 1, "single"))
    assert settled.training.gradient_checkpointing is False
    assert "training.gradient_checkpointing: auto is false: none of 16 layers (" in capsys.readouterr().err
