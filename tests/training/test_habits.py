"""Which habits of fast training a run is said to have, and what a GPU has no units for."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from finetune.data.packing import no_prefixes
from finetune.kernels import native
from finetune.training.habits import HABITS, Planned, habits_of, why_bf16_is_slow
from finetune.training.steps import Packing
from finetune.training.strategy import Placement
from tests.models.test_memory import recipe
from tests.training.conftest import RunTiny

NF4 = {"quantization": "nf4"}
BF16 = {"quantization": "nf4", "compute_dtype": "bf16"}
FP16 = {"quantization": "nf4", "compute_dtype": "fp16"}
CASES = [
    ("cuda", (7, 5), {}, "bf16-mixed", "training.precision: bf16-mixed"),
    ("cuda", (7, 5), FP16, "bf16-true", "training.precision: bf16-true"),
    ("cuda", (7, 0), BF16, "16-mixed", "model.compute_dtype: bf16"),
    ("cuda", (7, 0), NF4, "16-mixed", None),
    ("cuda", (7, 0), NF4, "32-true", "model.compute_dtype: auto"),
    ("cuda", (7, 5), FP16, "16-mixed", None),
    ("cuda", (8, 0), NF4, "bf16-mixed", None),
    ("cpu", (7, 5), NF4, "bf16-mixed", None),
]


@pytest.mark.parametrize(("accelerator", "capability", "model", "precision", "asked"), CASES)
def test_bf16_on_an_old_gpu(
    accelerator: str,
    capability: tuple[int, int],
    model: dict[str, Any],
    precision: str,
    asked: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: [(9, 0), capability][index])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: ["new", "old"][index])
    made = recipe(model=model, training={"precision": precision})
    why = why_bf16_is_slow(made, Placement(accelerator, 2, 1, "ddp"))
    if asked is None:
        assert why is None
    else:
        assert why is not None and why.startswith("old") and f"({asked})" in why
        assert f"capability {capability[0]}.{capability[1]}" in why and "16-mixed" in why


def test_a_run_says_so(run_tiny: RunTiny, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("finetune.training.habits.why_bf16_is_slow", lambda recipe, placement: "bf16 is slow here")
    run_tiny(training={"max_steps": 1})
    assert "warning: bf16 is slow here" in capsys.readouterr().err


CPU, GPU = Placement("cpu", 1, 1, "single"), Placement("cuda", 1, 1, "single")
SDPA = "torch's scaled_dot_product_attention"

Rows = dict[str, tuple[bool, str]]


def planned(
    placement: Placement, attention: str = "segments", *, packed: bool = True, passes: float = 1.0, **sections: Any
) -> Planned:
    data = {"max_seq_len": 512, **sections.pop("data", {})}
    made = recipe(data=data, **sections)
    tokens = made.training.micro_batch_size * made.data.max_seq_len
    packing = Packing(packed, made.training.micro_batch_size, tokens, no_prefixes(0), made.data.row_multiple)
    return Planned(made, placement, attention, packing, passes)


def found(run: Planned, monkeypatch: pytest.MonkeyPatch) -> Rows:
    """As on a machine that has all native kernels."""
    monkeypatch.setattr(native, "why_missing", lambda: None)
    monkeypatch.setattr(native, "computes_products", lambda: True)
    return {habit.name: (habit.active, habit.why) for habit in habits_of(run)}


WHOLE: dict[str, tuple[Planned, Rows]] = {
    "packed on a CPU": (
        planned(CPU),
        {
            "loader workers": (False, "(training.num_workers: 0)"),
            "pinned memory": (False, "nothing is copied to a device"),
            "non-blocking copies": (False, "nothing is copied to a device"),
            "no needless synchronization": (True, "a CPU has nothing to wait for"),
            "torch.compile": (False, "LoRA, norms and SwiGLU are fused by hand already"),
            "multiples of 8": (True, "over 256 tokens are padded to multiples of 32 (data.row_multiple), shorter ones"),
            "largest batch": (False, "hardly faster on a CPU"),
            "mixed precision": (True, "bf16-mixed"),
            "TF32": (False, "it is for GPUs"),
            "packing": (True, "cannot see each other"),
            "fused attention": (True, "the native kernel for rows and heads of a multiple of 32, else torch's flash"),
            "native CPU kernels": (
                True,
                "attention, loss of a plain frozen head, linear layers, norms, SwiGLU and rot",
            ),
            "fused optimizer": (True, "in few kernels"),
            "zero_grad(set_to_none)": (False, "one flat buffer"),
            "gradient accumulation": (False, "a step is one forward pass"),
            "gradient checkpointing": (False, "activations are kept"),
            "activation offload": (False, "in host memory already"),
            "no-grad evaluation": (True, "without gradients"),
            "DDP or FSDP, not DataParallel": (False, "one process"),
        },
    ),
    "packed on two GPUs": (
        planned(
            Placement("cuda", 2, 1, "fsdp"),
            passes=1.96,
            adapter={"dropout": 0.1, "use_dora": True},
            data={"row_multiple": 20},
            training={"num_workers": 3, "gradient_checkpointing": 4, "activation_offload": True},
        ),
        {
            "loader workers": (True, "3 processes"),
            "pinned memory": (True, "page-locked"),
            "non-blocking copies": (True, "all copies of a step start at once"),
            "no needless synchronization": (True, "and at once where they are logged"),
            "torch.compile": (False, "adapter layers run PEFT's own forward (adapter.dropout, adapter.use_dora); try"),
            "multiples of 8": (
                False,
                "20 (data.row_multiple), which is no multiple of 8; the fullest rows grow beyond",
            ),
            "largest batch": (False, "not tried under fsdp"),
            "mixed precision": (True, "bf16-mixed"),
            "TF32": (False, "rotary angles, stay exact"),
            "packing": (True, "cannot see each other"),
            "fused attention": (True, "torch's variable-length flash kernel"),
            "native CPU kernels": (False, "they are for CPUs"),
            "fused optimizer": (True, "in few kernels"),
            "zero_grad(set_to_none)": (False, "one flat buffer"),
            "gradient accumulation": (True, "about 2.0 forward passes a step and process, one reduction"),
            "gradient checkpointing": (True, "those of the first 4 layers are computed twice"),
            "activation offload": (True, "wait in host memory"),
            "no-grad evaluation": (True, "without gradients"),
            "DDP or FSDP, not DataParallel": (True, "fsdp over 2 processes"),
        },
    ),
    "capped scores, padded, on a GPU": (
        planned(
            GPU,
            "eager",
            packed=False,
            passes=4.0,
            data={"max_seq_len": 509},
            training={"precision": "16-mixed", "auto_micro_batch": True, "compile": True},
        ),
        {
            "loader workers": (False, "(training.num_workers: 0)"),
            "pinned memory": (True, "page-locked"),
            "non-blocking copies": (True, "all copies of a step start at once"),
            "no needless synchronization": (False, "the loss scaler of 16-mixed"),
            "torch.compile": (True, "each decoder layer is compiled"),
            "multiples of 8": (True, "multiples of 8; data.max_seq_len 509 is none"),
            "largest batch": (True, "training.auto_micro_batch tries"),
            "mixed precision": (True, "16-mixed"),
            "TF32": (False, "rotary angles, stay exact"),
            "packing": (False, "padded to the longest of their batch"),
            "fused attention": (False, "auto is eager here"),
            "native CPU kernels": (False, "they are for CPUs"),
            "fused optimizer": (False, "one parameter after the other"),
            "zero_grad(set_to_none)": (False, "one flat buffer"),
            "gradient accumulation": (True, "about 4.0 forward passes a step, one optimizer step after them; fewer if"),
            "gradient checkpointing": (False, "activations are kept"),
            "activation offload": (False, "stay on the GPU"),
            "no-grad evaluation": (True, "without gradients"),
            "DDP or FSDP, not DataParallel": (False, "one process"),
        },
    ),
}


@pytest.mark.parametrize(("run", "rows"), WHOLE.values(), ids=WHOLE)
def test_every_habit_of_a_run(run: Planned, rows: Rows, monkeypatch: pytest.MonkeyPatch) -> None:
    assert list(rows) == list(HABITS)
    for name, (active, why) in found(run, monkeypatch).items():
        assert (active, rows[name][1] in why) == (rows[name][0], True), f"{name}: {active}; {why}"


FP32 = {"precision": "32-true"}
ONE_ROW = [
    (planned(GPU, training=FP32), "TF32", False, "fp32 products stay exact"),
    (planned(GPU, packed=False), "fused attention", True, SDPA),
    (planned(GPU, "sdpa"), "fused attention", True, f"{SDPA} with a dense mask"),
    (planned(GPU, "flash_attention_2", packed=False), "fused attention", True, "transformers' flash_attention_2"),
    (planned(GPU, training=FP32), "fused attention", True, f"{SDPA} with a dense mask: the flash kernel takes bf16"),
    (planned(GPU, "eager", model={"attention": "eager"}), "fused attention", False, "model.attention is eager"),
    (planned(CPU, training=FP32), "fused attention", True, "torch's flash kernel by blocks"),
    (planned(CPU, training={"compile": True}), "fused attention", True, "torch's flash kernel by blocks"),
    (planned(CPU, training={"compile": True}), "native CPU kernels", False, "which training.compile: true compiles"),
    (planned(CPU, training=FP32), "native CPU kernels", False, "set training.precision: bf16-mixed"),
    (
        planned(CPU, "sdpa", packed=False),
        "native CPU kernels",
        True,
        "loss of a plain frozen head, linear layers, norms",
    ),
    (
        planned(CPU, adapter={"dropout": 0.1}),
        "native CPU kernels",
        True,
        "linear layers without an adapter (adapter.dropout leaves those to PEFT)",
    ),
    (planned(GPU, model={"quantization": "int8"}), "torch.compile", False, "own forward (model.quantization: int8)"),
    (planned(GPU, data={"max_seq_len": 60}), "multiples of 8", True, "rows are padded to multiples of 8"),
    (planned(GPU, "sdpa", packed=False), "no needless synchronization", False, "under sdpa transformers looks into"),
    (planned(GPU, training={"optimizer": {"name": "lion"}}), "no needless synchronization", False, "lion waits"),
    (planned(GPU, training={"on_non_finite": "skip"}), "no needless synchronization", False, "stop does not"),
    (planned(GPU, training={"optimizer": {"name": "lion"}}), "fused optimizer", True, "one kernel a parameter"),
]


@pytest.mark.parametrize(("run", "name", "active", "why"), ONE_ROW)
def test_a_habit_follows_what_a_run_does(
    run: Planned, name: str, active: bool, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    got = found(run, monkeypatch)[name]
    assert got[0] == active and why in got[1], got
