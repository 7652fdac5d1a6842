"""The estimate's parts against what they count: real modules, real optimizers, formulas written out."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers

from finetune.errors import ModelError
from finetune.kernels import attention, cross_entropy
from finetune.kernels.layout import Group, RowLayout, attention_blocks
from finetune.models.adapters import attach_adapter, trainable_parameters
from finetune.models.footprint import Footprint, ForwardPass, _measure_short, between, measure_pass
from finetune.models.heads import checkpoint_layers, decoder_layers
from finetune.models.memory import Planner, Spread, largest_pass, parts_of
from finetune.models.skeleton import adapt_skeleton, build_skeleton
from finetune.models.weights import count_weights, optimizer_bytes, quantized_bytes
from finetune.recipe.schema import LoraSection, ModelSection, OptimizerSection, Recipe
from finetune.training.optimizer import OPTIMIZERS, build_optimizer
from tests.tiny import CONFIGS

D, F, LAYERS, HEADS, KV, HEAD, VOCAB, RANK = 64, 160, 6, 4, 2, 16, 512, 8


def llama(**values: Any) -> Any:
    sizes = {"hidden_size": D, "intermediate_size": F, "num_hidden_layers": LAYERS, "vocab_size": VOCAB}
    heads = {"num_attention_heads": HEADS, "num_key_value_heads": KV, "head_dim": HEAD}
    return transformers.LlamaConfig(**{**sizes, **heads, **values})


def adapter_values(head: int = HEAD) -> int:
    """Parameters of a layer's adapter on all seven projections."""
    attention = 2 * (D + HEADS * head) + 2 * (D + KV * head)
    return RANK * (attention + 3 * (D + F))


def recipe(**sections: Any) -> Recipe:
    values: dict[str, Any] = {
        "name": "x",
        "model": {"name": "/x"},
        "adapter": {"rank": RANK},
        "data": {"sources": [{"path": "/x"}], "max_seq_len": 64},
        "training": {"max_steps": 1},
    }
    for name, section in sections.items():
        values[name] = {**values.get(name, {}), **section}
    return Recipe.model_validate(values)


def footprint(step: ForwardPass, *, checkpointing: bool = False, config: Any = None, on_cpu: bool = False) -> Footprint:
    return measure_pass(
        config or llama(),
        ModelSection(name="x"),
        LoraSection(rank=RANK),
        precision="bf16-mixed",
        checkpointing=checkpointing,
        attention_name="segments",
        step=step,
        on_cpu=on_cpu,
    )


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_kept_activations_are_the_formula(packed: bool) -> None:
    """Per token and layer, as docs/memory.md has it; what does not grow with the layers is left out by a difference."""
    tokens = 256
    step = ForwardPass(1, tokens, 100, (Group(0, (64,) * 4),)) if packed else ForwardPass(4, 64, 100)
    kept = {n: footprint(step, config=llama(num_hidden_layers=n)).kept for n in (4, 8)}
    bf16 = 4 * D + 2 * HEADS * HEAD + 2 * KV * HEAD + 3 * F + 7 * RANK
    fp32 = 2 + HEADS
    assert (kept[8] - kept[4]) / 4 == tokens * (2 * bf16 + 4 * fp32) + 2 * adapter_values()


@pytest.mark.parametrize("on_cpu", [False, True], ids=["GPU", "CPU, whole layers"])
def test_checkpointing_keeps_one_hidden_state_a_layer(on_cpu: bool) -> None:
    step = ForwardPass(1, 256, 100, (Group(0, (64,) * 4),))
    configs = {n: llama(num_hidden_layers=n, head_dim=2 * HEAD) for n in (4, 8)}
    kept = {n: footprint(step, checkpointing=True, config=configs[n], on_cpu=on_cpu).kept for n in (4, 8)}
    casts = 0 if on_cpu else 2 * adapter_values(2 * HEAD)  # the CPU's kernels read the adapters themselves
    assert (kept[8] - kept[4]) / 4 == 256 * D * 2 + casts


def test_some_layers_recomputed_are_between_all_and_none() -> None:
    step, config = ForwardPass(1, 256, 100, (Group(0, (64,) * 4),)), llama(num_hidden_layers=4)
    none, every = (footprint(step, checkpointing=wanted, config=config) for wanted in (False, True))
    model, adapter = ModelSection(name="x"), LoraSection(rank=RANK)
    some = _measure_short(config, model, adapter, "bf16-mixed", 3, "segments", step, 4, on_cpu=False)
    found = between(none, every, 3 / 4)
    assert found.kept == pytest.approx(some.kept, rel=0.02)
    assert found.peak == pytest.approx(some.peak, rel=0.02) and found.peak < none.peak


def test_more_layers_than_there_are_cannot_be_recomputed() -> None:
    model = transformers.AutoModelForCausalLM.from_config(llama(num_hidden_layers=2))
    checkpoint_layers(model, 1)
    assert [layer.gradient_checkpointing for layer in decoder_layers(model)] == [True, False]
    with pytest.raises(ModelError, match="3 layers, but the model has 2"):
        checkpoint_layers(model, 3)


def test_two_short_models_give_a_long_one() -> None:
    """The extrapolation against all layers at once."""
    step = ForwardPass(2, 64, 100)
    four, eight = (footprint(step, config=llama(num_hidden_layers=n)) for n in (4, 8))
    two = footprint(step, config=llama(num_hidden_layers=2))
    assert four.kept + 2 * (four.kept - two.kept) == eight.kept


@pytest.mark.parametrize("on_cpu", [False, True])
@pytest.mark.parametrize("targets", [["q_proj"], ["q_proj", "lm_head"]])
def test_two_pieces_of_the_loss_stand_for_all(
    on_cpu: bool, targets: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cross_entropy, "CHUNK_BYTES", dict.fromkeys(("cpu", "cuda"), 32 * 320 * 4))
    monkeypatch.setattr(cross_entropy, "CACHED_BYTES", 5 * 320 * 4)

    def measured() -> Footprint:
        # A capped head: no native kernel, and a chunk's fp32 values by pieces on a CPU, at once on a GPU.
        arguments = {"precision": "bf16-mixed", "checkpointing": False, "attention_name": "eager", "on_cpu": on_cpu}
        adapter = LoraSection(rank=RANK, target_modules=targets)
        return measure_pass(
            CONFIGS["gemma2"](), ModelSection(name="x"), adapter, step=ForwardPass(1, 200, 200), **arguments
        )

    found = measured()
    assert cross_entropy._starts(200, 32) == range(0, 200, 32), "out of an estimate, every piece is computed"
    monkeypatch.setattr(cross_entropy, "_starts", lambda count, size: range(0, count, size))
    assert measured() == found
    monkeypatch.setattr(cross_entropy, "CACHED_BYTES", 32 * 320 * 4)
    assert on_cpu or measured() == found, "a GPU computes a chunk at once"


@pytest.mark.parametrize("layout", [(Group(0, (300, 40, 556)),), (Group(64, (100, 200, 532)),)])
def test_the_largest_block_of_attention_stands_for_all(layout: RowLayout, monkeypatch: pytest.MonkeyPatch) -> None:
    def measured() -> Footprint:
        arguments = {"precision": "bf16-mixed", "checkpointing": False, "attention_name": "segments", "on_cpu": False}
        step = ForwardPass(1, 896, 896, layout)
        return measure_pass(CONFIGS["llama"](), ModelSection(name="x"), LoraSection(rank=RANK), step=step, **arguments)

    found, computed = measured(), len(attention._decisive(attention_blocks(layout, 896)))
    assert computed == len(attention_blocks(layout, 896)) > 2, "out of an estimate, every block is computed"
    monkeypatch.setattr(attention, "_decisive", lambda blocks: blocks)
    every = measured()
    assert every == replace(found, passing=every.passing)


@pytest.mark.parametrize("architecture", sorted(CONFIGS))
@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_every_architecture_can_be_estimated(architecture: str, quantization: str) -> None:
    config = CONFIGS[architecture]()
    made = recipe(model={"quantization": quantization}, training={"gradient_checkpointing": True})
    found = Planner(config).estimate(made, Spread("single", 1, "cpu"))
    assert all(size >= 0 for size in found.parts.values())
    assert found.total == sum(found.parts.values()) > found.weights.base


@pytest.mark.parametrize("architecture", sorted(CONFIGS))
def test_weights_of_a_skeleton_are_those_of_the_model(architecture: str) -> None:
    config, section, adapter = CONFIGS[architecture](), ModelSection(name="x"), LoraSection(rank=4)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).requires_grad_(False)
    real = attach_adapter(model, adapter, None, seed=0)
    skeleton = adapt_skeleton(build_skeleton(config, section, precision="bf16-mixed"), adapter, None)
    assert count_weights(skeleton, section) == count_weights(real, section)
    assert count_weights(real, section).num_trainable == sum(p.numel() for p in trainable_parameters(real))


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("shape", [(256, 128), (96, 72)])
def test_quantized_bytes_are_those_of_bitsandbytes(shape: tuple[int, int], double_quant: bool) -> None:
    from bitsandbytes.nn import Linear4bit

    layer = Linear4bit(shape[1], shape[0], bias=False, compress_statistics=double_quant, quant_type="nf4").to("cpu")
    state = layer.weight.quant_state
    constants = [state.absmax, state.code]
    if double_quant:
        constants += [state.state2.absmax, state.state2.code, state.offset]
    section = ModelSection(name="x", quantization="nf4", double_quant=double_quant)
    assert quantized_bytes(shape, section) == (layer.weight.nbytes, sum(tensor.nbytes for tensor in constants))


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name != "paged_lion_8bit"])
def test_optimizer_bytes_are_those_of_the_optimizer(name: str) -> None:
    shapes = ((64, 96), (16, 8), (128,))
    parameters = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    section = OptimizerSection(name=name)  # type: ignore[arg-type]
    optimizer = build_optimizer(parameters, section, scaled=False)
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    seen: dict[int, int] = {}
    for state in optimizer.state.values():
        for key, value in state.items():
            if isinstance(value, torch.Tensor) and value.ndim and "qmap" not in key:
                seen[value.untyped_storage().data_ptr()] = value.nbytes
    assert optimizer_bytes(shapes, section) == pytest.approx(sum(seen.values()), rel=0.02)


def test_fsdp_shards_the_base_and_nothing_else() -> None:
    planner, made = Planner(llama(num_hidden_layers=8)), recipe(model={"quantization": "nf4"})
    one = planner.estimate(made, Spread("single", 1, "cuda"))
    four = planner.estimate(made, Spread("fsdp", 4, "cuda"))
    weights = one.weights
    assert four.parts["base"] == weights.base // 4
    assert four.parts["gathered layers"] == 2 * weights.largest_block + weights.rest
    for part in ("quantization constants", "adapter", "gradients", "optimizer state", "activations"):
        assert four.parts[part] == one.parts[part]
    offloaded = parts_of(weights, one.footprint, made, Spread("fsdp", 4, "cuda", cpu_offload=True))
    assert offloaded["base"] == 0


def test_the_largest_pass_follows_from_the_recipe() -> None:
    config = llama()
    packed = largest_pass(config, recipe(data={"max_tokens": 160}), "segments")
    assert packed == ForwardPass(1, 160, 160, (Group(0, (64, 64, 32)),))
    padded = largest_pass(config, recipe(data={"packing": "none"}, training={"micro_batch_size": 3}), "segments")
    assert padded == ForwardPass(3, 64, 192)


def test_a_70b_model_is_estimated_without_its_weights() -> None:
    sizes = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "vocab_size": 128256}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=64, num_key_value_heads=8)
    made = recipe(model={"quantization": "nf4"}, training={"gradient_checkpointing": True})
    found = Planner(config).estimate(made, Spread("fsdp", 8, "cuda"))
    assert found.weights.num_parameters == pytest.approx(70.55e9, rel=0.001)
    # 68.5 billion quantized weights of half a byte, embedding and head in bf16.
    assert found.weights.base == pytest.approx(68.45e9 / 2 + 2 * 2 * 128256 * 8192, rel=0.001)
