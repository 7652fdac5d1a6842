"""`finetune bench train`: real processes on a tiny model, and what the figures count."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from finetune.cli import main
from finetune.data.batches import padded_batch
from finetune.errors import BadInputError
from finetune.kernels import native
from finetune.kernels.layout import Group
from finetune.models.flops import needed_flops, packed_counts, padded_counts, training_work
from finetune.models.fused import unfuse
from finetune.models.heads import decoder_of
from finetune.models.skeleton import adapt_skeleton, build_skeleton
from finetune.recipe.load import load_recipe
from finetune.recipe.schema import LoraSection, ModelSection
from finetune.training.bench import PHASES, VariantResult, _try, bench_training, split_outside, variant_overrides
from finetune.training.bench_worker import measure
from finetune.training.module import FinetuneModule
from finetune.training.strategy import build_trainer
from finetune.training.train import prepare_job
from tests.tiny import CONFIGS, tiny_recipe, write_recipe

ModelDir = Callable[[str], Path]


def test_variants_run_in_processes_of_their_own(model_dir: ModelDir, rows: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "tiny.yaml", tiny_recipe(tmp_path, model_dir("llama"), rows))
    figures = tmp_path / "figures.json"
    arguments = ["bench", "train", str(recipe), "--steps", "2", "--rounds", "2", "--json", str(figures)]
    assert main([*arguments, "--variants", "isolated,unfused+none"]) == 0
    report = json.loads(figures.read_text())
    isolated, none = report["variants"]
    assert isolated["speed_ratio"] == 1.0
    assert isolated["mean_loss"] == pytest.approx(none["mean_loss"], rel=1e-4)
    assert isolated["computed_ratio"] < none["computed_ratio"]
    assert 0 < isolated["peak_share"] < 1
    for first, second in report["rounds"]["isolated"], report["rounds"]["unfused+none"]:
        assert first["losses"] == second["losses"] and first["steps"] == 2
        assert first["real_tokens"] <= first["computed_tokens"]
        assert min(first["phases"].values()) > 0 and sum(first["phases"].values()) <= first["seconds"]


def test_a_recipe_may_warm_up_for_longer_than_is_timed(
    model_dir: ModelDir, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("finetune.training.bench._work", measure)  # in this process
    values = tiny_recipe(
        tmp_path, model_dir("llama"), rows, training={"max_steps": 200, "schedule": {"warmup_steps": 100}}
    )
    recipe = write_recipe(tmp_path / "tiny.yaml", values)
    so_far: list[int] = []
    report = bench_training(
        recipe, [], ["recipe"], steps=1, rounds=2, after_round=lambda now: so_far.append(len(now["rounds"]["recipe"]))
    )
    assert so_far == [1] and len(report["rounds"]["recipe"]) == 2
    assert report["variants"][0]["tokens_per_second"] > 0
    assert report["peak_dtype"] in ("bfloat16", "float32")


def test_a_trace_is_written(model_dir: ModelDir, rows: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "tiny.yaml", tiny_recipe(tmp_path, model_dir("llama"), rows))
    trace = tmp_path / "trace.json"
    measure(
        {
            "recipe": str(recipe),
            "overrides": ["training.max_steps=2"],
            "fused": True,
            "steps": 1,
            "warmup": 1,
            "trace": str(trace),
        }
    )
    names = {event.get("name") for event in json.loads(trace.read_text())["traceEvents"]}
    assert "aten::mm" in names


def test_a_profile_is_asked_of_every_variant(rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = write_recipe(tmp_path / "tiny.yaml", tiny_recipe(tmp_path, tmp_path, rows))
    counted = {"real_tokens": 9, "computed_tokens": 9, "samples": 1, "steps": 1, "seconds": 1.0, "losses": [1.0]}
    measured = {"flops": 1e9, "peak_flops_per_second": 1e9, "peak_memory_bytes": 1, "peak_dtype": "float32"}
    about = {"machine": {}, "threads": 1, "versions": {}, "phases": dict.fromkeys(PHASES, 0.1)}
    tasks: list[dict[str, Any]] = []
    monkeypatch.setattr("finetune.training.bench._work", lambda task: tasks.append(task) or counted | measured | about)
    arguments = ["--rounds", "1", "--variants", "recipe,data.packing=none", "--profile", str(tmp_path / "traces")]
    assert main(["bench", "train", str(recipe), *arguments]) == 0
    traced = [Path(task["trace"]).name for task in tasks if "trace" in task]
    assert traced == ["recipe.json", "data.packing=none.json"] and (tmp_path / "traces").is_dir()


def test_a_variant_that_does_not_fit_is_refused_before_anything_runs(
    model_dir: ModelDir, rows: Path, tmp_path: Path
) -> None:
    recipe = write_recipe(tmp_path / "tiny.yaml", tiny_recipe(tmp_path, model_dir("llama"), rows))
    with pytest.raises(BadInputError, match="nonsense"):
        bench_training(recipe, [], ["recipe", "model.attention=nonsense"], steps=1, rounds=1)


def test_an_unknown_variant_is_refused() -> None:
    with pytest.raises(BadInputError, match="packed is none of recipe, none"):
        variant_overrides("nf4+packed")
    assert variant_overrides("nf4+unfused") == (["model.quantization=nf4"], False)


def test_a_value_in_brackets_is_one_variant() -> None:
    text = "isolated,adapter.target_modules=[q_proj,v_proj]+nf4,data.template_variables={a: 1, b: [c, d]}"
    listed = ["isolated", "adapter.target_modules=[q_proj,v_proj]+nf4", "data.template_variables={a: 1, b: [c, d]}"]
    assert split_outside(text, ",") == listed
    assert variant_overrides(listed[1])[0] == ["adapter.target_modules=[q_proj,v_proj]", "model.quantization=nf4"]
    assert variant_overrides("adapter.trainable_tokens=[a+b]") == (["adapter.trainable_tokens=[a+b]"], True)


def test_a_failed_process_shows_its_last_lines_and_leaves_the_last_for_the_table(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    written = "\n".join(f"line {number}" for number in range(40))
    done = subprocess.CompletedProcess([], 1, "", written)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: done)
    result, said = VariantResult("nf4"), []
    _try(result, {"environment": {}}, said.append)
    assert result.failure == "line 39" and result.rounds == []
    (text,) = said
    assert text.splitlines() == ["nf4 did not run:", *written.splitlines()[-15:]]
    done.returncode, done.stderr = -9, ""
    _try(result, {"environment": {}}, said.append)
    assert result.failure == "exit code -9"


def test_a_variant_runs_without_the_native_kernels_and_one_that_fails_is_told(
    model_dir: ModelDir, rows: Path, tmp_path: Path
) -> None:
    path = write_recipe(tmp_path / "tiny.yaml", tiny_recipe(tmp_path, model_dir("llama"), rows))
    changed = ["training.precision=bf16-mixed", "model.attention=auto"]
    variants = ["recipe", "torch_kernels", "adapter.target_modules=[nothing]"]
    report = bench_training(path, changed, variants, steps=1, rounds=1)
    failed = report["variants"][2]
    assert "nothing" in failed["failure"] and "tokens_per_second" not in failed
    losses = [report["rounds"][name][0]["losses"] for name in ("recipe", "torch_kernels")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)
    # Other kernels round otherwise: had both run the same ones, every bit would agree.
    assert native.library() is None or losses[0] != losses[1]


def test_needed_arithmetic_is_what_torch_counts(model_dir: ModelDir, rows: Path, tmp_path: Path) -> None:
    """PEFT's own layers on one sample: everything but the pairs above the diagonal and the first layer's inputs."""
    recipe = tiny_recipe(
        tmp_path, model_dir("llama"), rows, model={"name": str(model_dir("llama")), "attention": "eager"}
    )
    job = prepare_job(load_recipe(write_recipe(tmp_path / "tiny.yaml", recipe)))
    module = FinetuneModule(job.recipe, job.source, job.tokenizer, job.placement, job.attention, 1)
    module.trainer = build_trainer(job.placement, job.recipe.training, [])
    module.configure_model()
    unfuse(module.model)
    sample = int(job.data.train.lengths.argmax())
    micro = padded_batch(job.data.train, [sample], 2)
    decoder = decoder_of(module.model.get_base_model())
    with FlopCounterMode(display=False) as counter:
        # The decoder alone: the loss takes its gradient within its forward pass, which the counter cannot follow.
        decoder(
            input_ids=micro.input_ids, position_ids=micro.position_ids, use_cache=False
        ).last_hidden_state.sum().backward()
    with FlopCounterMode(display=False) as angles:  # a product up to transformers 5.17
        decoder.rotary_emb(torch.zeros(1), micro.position_ids)
    length, width = micro.input_ids.shape[1], 2 * 32
    work, counts = training_work(module.model), padded_counts([length], 0)
    masked = 12 * width * (length**2 - counts.pairs)
    # q, k and v of the first layer: their input, the embeddings, needs no gradient.
    first = 2 * length * (32 * (32 + 16 + 16) + 3 * 32 * 4)
    assert counter.get_total_flops() - angles.get_total_flops() == needed_flops(work, counts) + masked - first
    assert work.head_frozen == 320 * 32 and work.head_trained == 0


def test_an_image_encoder_is_no_work() -> None:
    section = ModelSection(name="x")
    text, images = (
        training_work(
            adapt_skeleton(build_skeleton(CONFIGS[name](), section, precision="bf16-mixed"), LoraSection(rank=4), None)
        )
        for name in ("gemma3", "gemma3_images")
    )
    assert text == images


def test_a_shared_prefix_counts_once() -> None:
    alone = padded_counts([5, 6], 4)
    shared = packed_counts((Group(3, (2, 3)),), 4)
    assert alone.tokens == 11 and alone.pairs == 15 + 21
    assert shared.tokens == 8 and shared.pairs == alone.pairs - 6
    assert packed_counts((Group(0, (5, 6)),), 4) == alone


def test_unfuse_restores_every_forward(model_dir: ModelDir, rows: Path, tmp_path: Path) -> None:
    job = prepare_job(load_recipe(write_recipe(tmp_path / "r.yaml", tiny_recipe(tmp_path, model_dir("llama"), rows))))
    module = FinetuneModule(job.recipe, job.source, job.tokenizer, job.placement, job.attention, 1)
    module.trainer = build_trainer(job.placement, job.recipe.training, [])
    module.configure_model()
    replaced = [m for m in module.model.modules() if "forward" in vars(m)]
    assert len(replaced) > 14
    unfuse(module.model)
    assert not [m for m in module.model.modules() if "forward" in vars(m)]
    assert isinstance(module.model, torch.nn.Module)
