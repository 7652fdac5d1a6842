"""Fused forwards give PEFT's values and gradients, and step aside where they do not apply."""

from __future__ import annotations

import copy
import gc
from functools import partial
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, LlamaConfig

from finetune.kernels import native
from finetune.kernels.attention import NAME, packed_row
from finetune.kernels.layout import Group, position_ids
from finetune.kernels.lora import Projection, lora_linears
from finetune.models.adapters import attach_adapter, trainable_parameters
from finetune.models.fused import _is_swiglu, _with_rotation, forget_pending, fuse, unfuse
from finetune.models.heads import decoder_layers
from finetune.models.load import register_attention
from finetune.models.projections import _stored_4bit, decodes_4bit, expand_4bit
from finetune.recipe.schema import LoraSection
from tests.graphs import function_below
from tests.tiny import CONFIGS


def adapted(architecture: str, attention: str = "sdpa", **adapter: Any) -> Any:
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(CONFIGS[architecture](), attn_implementation=attention).double()
    base.requires_grad_(False)
    model = attach_adapter(base, LoraSection(rank=4, **adapter), None, seed=0)
    for parameter in trainable_parameters(model):
        parameter.data = torch.randn_like(parameter, dtype=torch.float64) * 0.1
    return model


def loss_and_gradients(model: Any) -> list[torch.Tensor]:
    ids = torch.arange(24).view(2, 12) % 320
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return [loss.detach(), *(parameter.grad for parameter in trainable_parameters(model))]


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "mistral", "gemma3", "falcon", "gpt_neox"])
def test_fused_equals_peft(architecture: str) -> None:
    model = adapted(architecture)
    want = loss_and_gradients(copy.deepcopy(model))
    count = fuse(model)
    assert count.lora > 0 and count.left_to_peft == 0
    for left, right in zip(loss_and_gradients(model), want, strict=True):
        # transformers computes its norms in fp32 whatever the input.
        assert (left - right).norm() <= 2e-5 * right.norm()


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["down_proj"]], ids=str)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_layers_without_an_adapter_compute_the_same(targets: list[str], precision: str) -> None:
    model = adapted("llama", target_modules=targets).float()
    ids = torch.arange(64)[None] * 5 % 320

    def gradients(fused: bool) -> list[torch.Tensor]:
        copied = copy.deepcopy(model)
        if fused:
            assert fuse(copied).frozen == 14 - 2 * len(targets)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            loss = copied(input_ids=ids, labels=ids).loss
        loss.backward()
        return [loss.detach(), *(parameter.grad for parameter in trainable_parameters(copied))]

    for left, right in zip(gradients(True), gradients(False), strict=True):
        assert (left - right).norm() <= (2e-5 if precision == "fp32" else 3e-2) * right.norm()


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "mistral"])
def test_norms_and_swiglu_are_found(architecture: str) -> None:
    count = fuse(adapted(architecture))
    assert count.mlps == 2 and count.norms >= 5 and count.rotations == 2


@pytest.mark.skipif(not native.computes_products(), reason="no native kernels for attention here")
@pytest.mark.parametrize("architecture", ["llama", "qwen3", "mistral", "gpt_neox", "falcon"])
def test_native_kernels_are_as_near_to_fp32_as_torch(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    register_attention()
    model = adapted(architecture, NAME).float()
    row = (Group(9, (11, 20)), Group(0, (24,)))

    def gradients(dtype: torch.dtype) -> torch.Tensor:
        with packed_row(row), torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            model.zero_grad()
            ids = torch.arange(64)[None] * 5 % 320
            out = model.to(dtype)(input_ids=ids, position_ids=position_ids(row, 64), use_cache=False)
            torch.logsumexp(out.logits.float(), -1).sum().backward()
        return torch.cat([parameter.grad.float().flatten() for parameter in trainable_parameters(model)])

    exact = gradients(torch.float32)
    fuse(model)
    ours = (gradients(torch.bfloat16) - exact).norm()
    monkeypatch.setattr(native, "_load", lambda: (None, "switched off"))
    monkeypatch.setattr(native, "computes_products", lambda: False)
    assert ours <= 1.5 * (gradients(torch.bfloat16) - exact).norm()
    assert ours < 0.1 * exact.norm()


def test_a_pass_that_failed_between_the_layers_of_a_group_can_be_let_go() -> None:
    model, kept = adapted("qwen3"), []
    fuse(model)
    failing = decoder_layers(model)[-1].self_attn.q_norm

    def fail(x: torch.Tensor) -> torch.Tensor:
        kept.append(function_below(x))
        raise torch.OutOfMemoryError

    failing.forward = fail
    with pytest.raises(torch.OutOfMemoryError):
        model(input_ids=torch.arange(12)[None])
    gc.collect()
    assert kept[0]() is not None
    forget_pending(model)
    assert kept[0]() is None


@pytest.mark.parametrize("architecture", ["falcon", "gpt_neox"])
def test_layer_norms_stay_in_half_precision_as_the_estimate_counts_them(
    architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CUDA's autocast runs layer_norm in fp32, a CPU's does not: here it is made to."""
    model = adapted(architecture).bfloat16()
    for parameter in trainable_parameters(model):
        parameter.data = parameter.data.float()
    ids, plain, widened = torch.arange(24)[None], F.layer_norm, []

    def as_on_cuda(x: torch.Tensor, shape: Any, *parameters: torch.Tensor | None, **others: Any) -> torch.Tensor:
        if torch.is_autocast_enabled(x.device.type):
            widened.append(x.dtype)
            return plain(x.float(), shape, *(None if p is None else p.float() for p in parameters[:2]), *parameters[2:])
        return plain(x, shape, *parameters, **others)

    def logits() -> torch.Tensor:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            return model(input_ids=ids).logits

    fuse(model)
    before = logits()
    monkeypatch.setattr(F, "layer_norm", as_on_cuda)
    assert torch.equal(logits(), before) and not widened
    unfuse(model)
    logits()
    assert len(widened) > 2


def test_rotations_are_found_whatever_the_default_device() -> None:
    model = adapted("llama")
    _with_rotation.cache_clear()
    with torch.device("meta"):
        assert fuse(model).rotations == 2


def test_gemma_keeps_its_own_norm_and_activation() -> None:
    count = fuse(adapted("gemma3"))
    assert count.mlps == 0 and count.norms == 0


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(
    ("name", "changed", "same"),
    [
        ("llama.modeling_llama.LlamaMLP", {}, True),
        ("exaone4_5.modeling_exaone4_5.Exaone4_5_MLP", {}, True),
        ("seed_oss.modeling_seed_oss.SeedOssMLP", {"residual_dropout": 0.01}, False),
        ("seed_oss.modeling_seed_oss.SeedOssMLP", {"residual_dropout": 0.0}, True),
        ("deepseek_v4.modeling_deepseek_v4.DeepseekV4MLP", {"swiglu_limit": 10.0}, False),
        ("falcon_h1.modeling_falcon_h1.FalconH1MLP", {"mlp_multipliers": [1.0, 0.5]}, False),
        ("inkling.modeling_inkling.InklingMLP", {}, False),
    ],
)
def test_what_does_more_than_swiglu_under_its_names_is_left_alone(
    name: str, changed: dict[str, Any], same: bool, device: str
) -> None:
    file, _, kind = name.rpartition(".")
    config = LlamaConfig(hidden_size=32, intermediate_size=64, moe_intermediate_size=64, mlp_bias=False, **changed)
    with torch.device(device):
        mlp = getattr(import_module(f"transformers.models.{file}"), kind)(config)
        random = torch.get_rng_state()
        assert _is_swiglu(mlp.requires_grad_(False)) == same
        assert torch.equal(torch.get_rng_state(), random)


@pytest.mark.parametrize("adapter", [{"dropout": 0.1}, {"use_dora": True}], ids=str)
def test_what_is_not_plain_lora_stays_with_peft(adapter: dict[str, Any]) -> None:
    count = fuse(adapted("llama", **adapter))
    assert count.lora == 0 and count.left_to_peft == 14


def test_a_disabled_adapter_gives_the_base() -> None:
    model = adapted("llama")
    ids = torch.arange(12)[None]
    with model.disable_adapter():
        want = model(input_ids=ids).logits
    fuse(model)
    with model.disable_adapter():
        torch.testing.assert_close(model(input_ids=ids).logits, want)
    assert not torch.allclose(model(input_ids=ids).logits, want)


def four_bit_layer(quant_type: str, nested: bool, dtype: torch.dtype = torch.bfloat16) -> Any:
    """A bitsandbytes layer of 96 inputs and 64 outputs, quantized on the CPU."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    weight = torch.randn(64, 96, generator=torch.Generator().manual_seed(0)).to(dtype) * 0.1
    layer = Linear4bit(96, 64, bias=False, compute_dtype=torch.bfloat16, quant_type=quant_type)
    layer.weight = Params4bit(weight, requires_grad=False, compress_statistics=nested, quant_type=quant_type)
    return layer.to("cpu")


@pytest.mark.skipif(not native.computes_products(), reason="no native kernels for LoRA here")
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_the_kernel_reads_4_bits_as_bitsandbytes_does(quant_type: str, nested: bool) -> None:
    base = four_bit_layer(quant_type, nested)
    stored = _stored_4bit(base)
    assert stored is not None and (stored.absmax is None) == nested
    generator = torch.Generator().manual_seed(1)
    a, b = (torch.randn(*shape, generator=generator).requires_grad_() for shape in ((8, 96), (64, 8)))
    expand = partial(expand_4bit, base)

    def unused(dtype: torch.dtype) -> torch.Tensor:
        raise AssertionError("the weight was expanded")

    results = []
    for projection in (Projection(expand, None, a, b, 2.0), Projection(unused, None, a, b, 2.0, lambda: stored)):
        x = torch.randn(1, 64, 96, generator=torch.Generator().manual_seed(2)).bfloat16().requires_grad_()
        (y,) = lora_linears(x, [projection])
        results.append([y, *torch.autograd.grad(y.float().square().sum(), [x, a, b])])
    for left, right in zip(*results, strict=True):
        assert torch.equal(left, right)


def test_4_bits_that_the_kernel_would_round_otherwise_are_expanded() -> None:
    assert _stored_4bit(four_bit_layer("nf4", True, torch.float16)) is None
    assert _stored_4bit(torch.nn.Linear(96, 64)) is None


@pytest.mark.parametrize(
    ("rows", "on_gpu", "gradients", "want"),
    [
        (1, True, False, True),
        (64, True, False, True),
        (65, True, False, False),
        (1, False, False, False),
        (1, True, True, False),
    ],
)
def test_a_step_of_decoding_on_a_gpu_reads_4_bits_as_they_are_stored(
    rows: int, on_gpu: bool, gradients: bool, want: bool
) -> None:
    x: Any = SimpleNamespace(is_cuda=on_gpu, shape=(rows, 96), numel=lambda: rows * 96)
    with torch.set_grad_enabled(gradients):
        assert decodes_4bit(four_bit_layer("nf4", True), x) is want
        assert not decodes_4bit(torch.nn.Linear(96, 64), x)


def test_a_group_that_decodes_4_bits_runs_layer_by_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted("llama")
    ids = torch.arange(12)[None]
    with torch.no_grad():
        want = model(input_ids=ids).logits
    fuse(model)
    monkeypatch.setattr("finetune.models.fused.decodes_4bit", lambda layer, x: True)
    monkeypatch.setattr("finetune.models.fused.lora_linears", lambda *_: pytest.fail("a kernel of ours"))
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids).logits, want)
