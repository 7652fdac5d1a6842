"""The training step against an independent reference: the same model in plain torch, one sample at a time, in fp64."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from finetune.data.prepare import prepare_data
from finetune.data.template import load_template
from finetune.models.adapters import WEIGHTS_NAME, attach_adapter
from finetune.recipe.load import read_document
from finetune.recipe.schema import DataSection, SourceSection
from finetune.training import fitting
from finetune.training.metrics import read_metrics
from finetune.training.steps import StepPlan
from tests.tiny import CONFIGS, SIZES, SWIGLU, _config, alpaca_rows, write_jsonl
from tests.training.conftest import RunTiny

LR = 1e-2
ONE_STEP = {
    "max_steps": 1,
    "global_batch_size": 8,
    "optimizer": {"lr": LR},
    "schedule": {"name": "constant", "warmup_steps": 0},
    "max_grad_norm": None,
}


def reference_step(
    model_dir: Path, rows: Path, initial: Path, attention: str = "eager"
) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and LoRA gradients of a step of at most 8 samples: PEFT's own forward, no packing, fp64."""
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    data = DataSection(sources=[SourceSection(path=str(rows))], max_seq_len=128, num_workers=0)
    dataset = prepare_data(data, tokenizer, load_template(tokenizer, data), seed=0).train
    base = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float64, attn_implementation=attention)
    model = peft.PeftModel.from_pretrained(base, initial, is_trainable=True, autocast_adapter_dtype=False).double()
    total, count = torch.zeros((), dtype=torch.float64), 0
    for index in StepPlan(len(dataset), 8, 1, min(8, len(dataset)), seed=0).samples(0):
        ids, supervised = (torch.from_numpy(array) for array in dataset[int(index)])
        logits = model(input_ids=ids[None].long()).logits[0]
        wanted = supervised[1:].bool()
        log_probs = torch.log_softmax(logits[:-1][wanted], -1)
        total = total - log_probs.gather(1, ids[1:][wanted].long()[:, None]).sum()
        count += int(wanted.sum())
    loss = total / count
    loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return loss.item(), {name.replace(".default", ""): grad for name, grad in grads.items()}


SPLITS: dict[str, dict[str, Any]] = {
    "1 x 8": {"training": {"micro_batch_size": 8}, "data": {"packing": "none"}},
    "8 x 1": {"training": {"micro_batch_size": 1}, "data": {"packing": "none"}},
    "3 x 3": {"training": {"micro_batch_size": 3}, "data": {"packing": "none"}},
    "packed": {"data": {"packing": "isolated", "max_tokens": 200}},
    "shared prefix": {"data": {"packing": "shared_prefix", "max_tokens": 200}},
    "dense mask": {"data": {"packing": "isolated", "max_tokens": 200}, "model": {"attention": "sdpa"}},
    "eager": {"data": {"packing": "shared_prefix", "max_tokens": 200}, "model": {"attention": "eager"}},
    "checkpointed": {"training": {"gradient_checkpointing": True}, "data": {"packing": "isolated", "max_tokens": 200}},
    "first layer checkpointed": {"training": {"gradient_checkpointing": 1}, "data": {"packing": "none"}},
}


@pytest.mark.parametrize("architecture", ["llama", "falcon", "gpt_neox", "qwen3", "gemma3"])
def test_fm01_any_split_gives_the_reference_gradient(
    architecture: str, run_tiny: RunTiny, model_dir: Callable[[str], Path], rows: Path
) -> None:
    check_splits(architecture, SPLITS, run_tiny, model_dir(architecture), rows)


def test_fm11_capped_scores_are_right_in_packed_rows_and_refused_with_sdpa(
    run_tiny: RunTiny, model_dir: Callable[[str], Path], rows: Path, capsys: Any
) -> None:
    """Gemma 2's kind runs eager attention, which adds its mask: True would hide nothing."""
    splits = {name: SPLITS[name] for name in ("3 x 3", "shared prefix")}
    check_splits("gemma2", splits, run_tiny, model_dir("gemma2"), rows)
    run_tiny("gemma2", expect=2, model={"name": str(model_dir("gemma2")), "attention": "sdpa"})
    assert "sdpa cannot compute gemma2's attention; use auto or eager" in " ".join(capsys.readouterr().err.split())


def test_fm11_alibi_is_right_in_padded_batches_and_refused_in_packed_rows(
    run_tiny: RunTiny, model_dir: Callable[[str], Path], rows: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Falcon-RW's kind: positions come from the row, so a packed sample would see itself far from its beginning."""
    values = {**SIZES, "alibi": True, "multi_query": False, "parallel_attn": False}
    monkeypatch.setitem(CONFIGS, "falcon_alibi", lambda: _config("FalconConfig", **values))
    run_tiny("falcon_alibi", expect=2, data={"packing": "isolated", "max_tokens": 200})
    assert "falcon with ALiBi derives positions from the row" in " ".join(capsys.readouterr().err.split())
    splits = {name: SPLITS[name] for name in ("1 x 8", "3 x 3")} | {"auto": {"data": {"packing": "auto"}}}
    # transformers' eager Falcon adds ALiBi twice: within its 4-D mask, and to the scores.
    check_splits("falcon_alibi", splits, run_tiny, model_dir("falcon_alibi"), rows, attention="sdpa")


def test_fm11_convolutions_along_the_row_are_not_packed(
    run_tiny: RunTiny, model_dir: Callable[[str], Path], rows: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """LFM2's kind; where the configuration does not tell, the loaded model does."""
    values = {**SWIGLU, "layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False}
    monkeypatch.setitem(CONFIGS, "lfm2", lambda: _config("Lfm2Config", **values))
    splits = {"auto": {"data": {"packing": "auto", "max_tokens": 200}}}
    check_splits("lfm2", splits, run_tiny, model_dir("lfm2"), rows)
    for reason in ("lfm2 has layers of kind conv", "lets the samples of a packed row see each other"):
        run_tiny("lfm2", expect=2, data={"packing": "isolated", "max_tokens": 200})
        assert reason in " ".join(capsys.readouterr().err.split())
        monkeypatch.setattr("finetune.models.attention._ATTENTION_KINDS", {"conv", "full_attention"})


def test_fm01_long_samples_change_no_rotation_of_short_ones(
    run_tiny: RunTiny, model_dir: Callable[[str], Path], rows: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Phi 3's kind: other frequencies where a row holds a sample of more than so many tokens."""
    factors = {"short_factor": [1.0] * 4, "long_factor": [8.0] * 4}
    rope = {"rope_type": "longrope", "rope_theta": 1e4, **factors, "original_max_position_embeddings": 48}
    monkeypatch.setitem(CONFIGS, "longrope", lambda: _config("LlamaConfig", **SWIGLU, rope_parameters=rope))
    splits = {name: SPLITS[name] for name in ("1 x 8", "3 x 3")} | {"auto": {"data": {"packing": "auto"}}}
    check_splits("longrope", splits, run_tiny, model_dir("longrope"), rows)
    run_tiny("longrope", expect=2, data={"packing": "isolated", "max_tokens": 200})
    assert "longrope rotary embedding turns a whole row as" in " ".join(capsys.readouterr().err.split())
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
    short = {**SWIGLU, "max_position_embeddings": 48, "rope_parameters": rope}
    monkeypatch.setitem(CONFIGS, "dynamic", lambda: _config("LlamaConfig", **short))
    run_tiny("dynamic", "dynamic", training={"max_steps": 1, "epochs": None})
    assert "so its loss depends on their order; data.max_seq_len: 48" in " ".join(capsys.readouterr().err.split())


def test_fm11_values_of_another_size_than_queries_are_kept_apart_by_a_dense_mask(
    run_tiny: RunTiny, model_dir: Callable[[str], Path], rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Latent attention as DeepSeek's, its layers dense."""
    values = {**SIZES, "num_key_value_heads": 4, "intermediate_size": 64, "first_k_dense_replace": 2}
    ranks = {"q_lora_rank": 12, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 6}
    monkeypatch.setitem(CONFIGS, "deepseek_v3", lambda: _config("DeepseekV3Config", **values, **ranks))
    splits = {name: SPLITS[name] for name in ("1 x 8", "packed")}
    check_splits("deepseek_v3", splits, run_tiny, model_dir("deepseek_v3"), rows)


def test_fm14_a_remainder_has_the_gradient_of_its_own_tokens(
    run_tiny: RunTiny, model_dir: Callable[[str], Path], tmp_path: Path
) -> None:
    """5 rows, 8 a step: neither the loss nor a gradient may be a share of 8 samples."""
    splits: dict[str, dict[str, Any]] = {name: dict(SPLITS[name]) for name in ("3 x 3", "packed")}
    for split in splits.values():
        split["training"] = {**split.get("training", {}), "epochs": 1.0, "max_steps": None}
    check_splits("llama", splits, run_tiny, model_dir("llama"), write_jsonl(tmp_path / "five.jsonl", alpaca_rows(5)))


def attach_grown_adapter(*arguments: Any, **options: Any) -> peft.PeftModel:
    """An adapter as after some steps: while B is zero, A has no gradient."""
    model = attach_adapter(*arguments, **options)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
    return model


def check_splits(
    architecture: str,
    splits: dict[str, dict[str, Any]],
    run_tiny: RunTiny,
    model: Path,
    rows: Path,
    attention: str = "eager",
) -> None:
    """Loss and gradient of a step are the reference's in every split."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("finetune.training.module.attach_adapter", attach_grown_adapter)
        _check_splits(architecture, splits, run_tiny, model, rows, attention)


def _check_splits(
    architecture: str, splits: dict[str, dict[str, Any]], run_tiny: RunTiny, model: Path, rows: Path, attention: str
) -> None:
    # The gradient is read off AdamW's first moment.
    initial = run_tiny(architecture, "initial", training={**ONE_STEP, "optimizer": {"lr": 1e-30}}).adapter
    want_loss, want = reference_step(model, rows, initial, attention)
    assert all(grad.any() for grad in want.values())
    for name, split in splits.items():
        sections = {key: dict(value) for key, value in split.items()}
        sections["training"] = {**ONE_STEP, **sections.get("training", {})}
        sections["data"] = {
            "sources": [{"path": str(rows)}],
            "max_seq_len": 128,
            "num_workers": 0,
            **sections.get("data", {}),
        }
        if "model" in sections:
            sections["model"]["name"] = str(model)
        run = run_tiny(architecture, name.replace(" ", "_"), **sections)
        state = torch.load(run.checkpoints / "step-000001" / "trainer_state.pt", weights_only=True)
        moments = [entry["exp_avg"] / 0.1 for entry in state["optimizer"]["state"].values()]
        got = torch.cat([moment.flatten() for moment in moments]).double()
        order = [key for key in load_file(run.adapter / WEIGHTS_NAME)]
        assert len(order) == len(want)
        reference = torch.cat([want[key].flatten() for key in _in_parameter_order(want)])
        assert (got - reference).norm() / reference.norm() < 1e-5, name
        (row,) = read_metrics(run.metrics)
        assert row["loss"] == pytest.approx(want_loss, rel=1e-5), name
        assert row["grad_norm"] == pytest.approx(reference.norm().item(), rel=1e-5), name


def _in_parameter_order(grads: dict[str, torch.Tensor]) -> list[str]:
    return list(grads)


@pytest.mark.parametrize("architecture", ["llama", "falcon"])
def test_fm04_checkpointing_leaves_no_adapter_without_gradient(architecture: str, run_tiny: RunTiny) -> None:
    run = run_tiny(architecture, training={**ONE_STEP, "gradient_checkpointing": True})
    adapter = load_file(run.adapter / WEIGHTS_NAME)
    lora_b = [tensor for name, tensor in adapter.items() if "lora_B" in name]
    assert lora_b and all(tensor.abs().max() > 0 for tensor in lora_b)


def test_a_run_settles_how_many_layers_are_recomputed(
    run_tiny: RunTiny, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fitting, "memory_of", lambda placement: 1)
    run = run_tiny(training={**ONE_STEP, "gradient_checkpointing": "auto"})
    assert (
        "training.gradient_checkpointing: auto is true: with fewer than all 2 layers it does not fit"
        in capsys.readouterr().err
    )
    assert read_document(run.recipe).value["training"]["gradient_checkpointing"] is True


@pytest.mark.parametrize("quantization", ["none", "nf4", "int8"])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_fm25_trainables_are_fp32_whatever_the_base(
    quantization: str, dtype: str, run_tiny: RunTiny, model_dir: Callable[[str], Path]
) -> None:
    model = {"name": str(model_dir("llama")), "quantization": quantization, "dtype": dtype}
    run = run_tiny(model=model, training={**ONE_STEP, "precision": "bf16-mixed"})
    assert {tensor.dtype for tensor in load_file(run.adapter / WEIGHTS_NAME).values()} == {torch.float32}


def test_fm25_a_nan_stops_the_run_and_keeps_the_last_checkpoint(
    run_tiny: RunTiny, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from finetune.training.module import LossModel

    calls = iter(range(1000))
    forward = LossModel.forward
    monkeypatch.setattr(
        LossModel, "forward", lambda self, micro: forward(self, micro) * (float("nan") if next(calls) == 5 else 1.0)
    )
    run = run_tiny(
        expect=1,
        training={"micro_batch_size": 4, "max_steps": 6},
        data={"packing": "none"},
        checkpoint={"every_steps": 1},
    )
    message = capsys.readouterr().err
    assert "step 3: the loss is nan" in message and "rows.jsonl:" in message
    assert sorted(path.name for path in run.checkpoints.iterdir()) == ["step-000001", "step-000002"]


def test_on_non_finite_skip_counts_and_goes_on(run_tiny: RunTiny, monkeypatch: pytest.MonkeyPatch) -> None:
    from finetune.training.module import LossModel

    calls = iter(range(1000))
    forward = LossModel.forward
    monkeypatch.setattr(
        LossModel, "forward", lambda self, micro: forward(self, micro) * (float("nan") if next(calls) == 0 else 1.0)
    )
    run = run_tiny(training={"max_steps": 3, "on_non_finite": "skip"}, checkpoint={"every_steps": 1})
    manifest = json.loads((run.checkpoints / "step-000003" / "manifest.json").read_text())
    assert manifest["progress"]["num_skipped_steps"] == 1
    assert all(tensor.isfinite().all() for tensor in load_file(run.adapter / WEIGHTS_NAME).values())
