"""The search for the largest forward pass: its steps, its trial batches, and that a trial changes nothing."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from finetune.errors import BadInputError
from finetune.models.heads import decoder_layers
from finetune.recipe.load import load_recipe
from finetune.recipe.schema import DistributedSection
from finetune.training.auto_micro_batch import AutoMicroBatch, check_placement, largest, trial_batch, try_step
from finetune.training.module import FinetuneModule, LossModel
from finetune.training.out_of_memory import Halving
from finetune.training.steps import StepDataset
from finetune.training.strategy import Placement, build_trainer, resolve_placement
from finetune.training.train import build_loader, prepare_job
from tests.graphs import function_below
from tests.tiny import tiny_recipe, write_recipe

ModelDir = Callable[[str], Path]


@pytest.mark.parametrize("limit", [1, 2, 3, 7, 8, 20, 31, 63, 64, 500])
@pytest.mark.parametrize("start", [1, 8, 64])
def test_the_largest_size_is_found_to_an_eighth(limit: int, start: int) -> None:
    tried: list[int] = []

    def fits(size: int) -> bool:
        tried.append(size)
        return size <= limit

    found = largest(fits, start, 64)
    assert found in tried and found <= min(limit, 64)
    assert found >= min(limit, 64) - max(1, found // 8)
    assert len(tried) <= 13


def test_nothing_fits() -> None:
    with pytest.raises(LookupError):
        largest(lambda size: False, 8, 64)


def build(model: Path, rows: Path, folder: Path, packing: str) -> tuple[FinetuneModule, StepDataset]:
    recipe = tiny_recipe(folder, model, rows, data={"sources": [{"path": str(rows)}], "packing": packing})
    recipe["data"].update(max_seq_len=128, num_workers=0)
    job = prepare_job(load_recipe(write_recipe(folder / f"{packing}.yaml", recipe)))
    module = FinetuneModule(job.recipe, job.source, job.tokenizer, job.placement, job.attention, job.plan.num_steps)
    return module, job.steps_of(job.data.train, rank=0, world_size=1)


class LimitedMemory:
    """Stands for the GPU: a forward pass of more than `limit` tokens fails as torch's allocator fails."""

    def __init__(self, limit: int) -> None:
        self.limit = limit

    def __call__(self, module: LossModel, inputs: tuple[object, ...]) -> None:
        if inputs[0].input_ids.numel() > self.limit:  # type: ignore[attr-defined]
            raise torch.OutOfMemoryError("CUDA out of memory")


@pytest.mark.parametrize(("packing", "limit"), [("isolated", 150), ("none", 300)])
def test_a_run_uses_what_was_found_and_ends_the_same(
    packing: str, limit: int, model_dir: ModelDir, rows: Path, tmp_path: Path
) -> None:
    results = []
    for auto in (False, True):
        module, steps = build(model_dir("llama"), rows, tmp_path, packing)
        trainer = build_trainer(module.placement, module.recipe.training, [AutoMicroBatch(steps)] if auto else [])
        if auto:
            module.trainer = trainer
            module.configure_model()
            module.loss_model.register_forward_pre_hook(LimitedMemory(limit))
        trainer.fit(module, build_loader(steps, module.recipe, module.placement))
        results.append((steps, torch.cat([p.detach().flatten() for p in module.parameters() if p.requires_grad])))
    (before, want), (after, got) = results
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-5)
    sizes = [(s.packing.max_tokens if packing == "isolated" else s.packing.micro_batch_size) for s in (before, after)]
    assert sizes[0] != sizes[1]
    largest_pass = max(m.num_computed_tokens for k in range(len(after)) for m in after[k].micro_batches)
    assert largest_pass <= limit


def test_a_trial_row_holds_the_longest_samples(model_dir: ModelDir, rows: Path, tmp_path: Path) -> None:
    _, steps = build(model_dir("llama"), rows, tmp_path, "isolated")
    longest = sorted(range(len(steps.dataset)), key=lambda i: -int(steps.dataset.lengths[i]))
    lengths = steps.dataset.lengths
    row = trial_batch(steps, longest, 200)
    assert row.samples == longest[: len(row.samples)]
    assert int(lengths[row.samples].sum()) <= 200 < int(lengths[longest[: len(row.samples) + 1]].sum())
    assert trial_batch(steps, longest, 1).samples == longest[:1]


def test_a_trial_leaves_no_gradient(model_dir: ModelDir, rows: Path, tmp_path: Path) -> None:
    module, steps = build(model_dir("llama"), rows, tmp_path, "isolated")
    module.trainer = build_trainer(module.placement, module.recipe.training, [])
    module.configure_model()
    module.configure_optimizers()
    assert try_step(module, steps[0].micro_batches[0])
    assert all(not p.grad.any() for p in module.parameters() if p.grad is not None)


@pytest.mark.parametrize("halves", [False, True])
@pytest.mark.parametrize("kind", [torch.OutOfMemoryError, RuntimeError])
def test_what_does_not_fit_leaves_nothing_in_memory(
    kind: type[Exception],
    halves: bool,
    model_dir: ModelDir,
    rows: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Neither a trial nor a step that is computed again; q_norm stands between the layers of a group."""
    module, steps = build(model_dir("qwen3"), rows, tmp_path, "isolated")
    trainer = module.trainer = build_trainer(module.placement, module.recipe.training, [])
    module.configure_model()
    module.configure_optimizers()
    failing, nodes = decoder_layers(module.model)[-1].self_attn.q_norm, []
    own = vars(failing).pop("forward", failing.forward)

    def fail_once(x: torch.Tensor) -> torch.Tensor:
        failing.forward = own
        nodes.append(function_below(x))
        raise kind("CUBLAS_STATUS_ALLOC_FAILED")  # what cuBLAS says has no class of its own

    failing.forward = fail_once
    if not halves:
        assert not try_step(module, steps[0].micro_batches[0])
    else:
        module.halving = Halving(steps)
        shrink = Halving.shrink

        def collected(halving: Halving, *arguments: Any) -> None:
            gc.collect()
            nodes.append(nodes[0]())
            shrink(halving, *arguments)

        monkeypatch.setattr(Halving, "shrink", collected)
        trainer.fit(module, build_loader(steps, module.recipe, module.placement))
        assert nodes.pop() is None
    gc.collect()
    assert nodes[0]() is None


def test_it_is_refused_where_it_could_not_be_found_out() -> None:
    with pytest.raises(BadInputError, match="needs a GPU"):
        check_placement(resolve_placement(DistributedSection(accelerator="cpu")))
    with pytest.raises(BadInputError, match="fsdp"):
        check_placement(Placement("cuda", 2, 1, "fsdp"))
    check_placement(Placement("cuda", 2, 1, "ddp"))
