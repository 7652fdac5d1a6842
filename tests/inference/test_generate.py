from __future__ import annotations

from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, GenerationConfig, GPT2Config, GPT2LMHeadModel

from finetune.inference.generate import Completion, Sampling, generate, inference_mode
from finetune.kernels.attention import NAME as SEGMENTS
from finetune.models.adapters import attach_adapter
from finetune.models.load import load_base, register_attention
from finetune.models.sources import find_model
from finetune.recipe.schema import LoraSection, ModelSection
from tests.inference.conftest import build_llama
from tests.tiny import CONFIGS

STOP = [257]
PROMPTS = [[256, 5, 9], [256, 7], [256, *range(20, 60)], [256, 1, 2, 3, 4, 5], [256, *range(100, 117)]]


def quantized(base_folder: Path, tokenizer: Any, **adapter: Any) -> PeftModel:
    """The base in NF4 with LoRA, as training holds it."""
    section = ModelSection(name=str(base_folder), quantization="nf4", compute_dtype="fp32")
    base = load_base(section, find_model(section), precision="32-true", attention_name=SEGMENTS)
    model = attach_adapter(base, LoraSection(rank=4, **adapter), tokenizer, seed=0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def look(model: torch.nn.Module) -> dict[str, Any]:
    """Everything about a model that generation could change."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    modules = list(model.named_modules())
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {
        "modules": [(name, id(module)) for name, module in modules],
        "training": [module.training for _, module in modules],
        "checkpointing": [getattr(module, "gradient_checkpointing", None) for _, module in modules],
        "hooks": [(len(m._forward_pre_hooks), len(m._forward_hooks)) for _, m in modules],
        "attributes": [sorted(vars(module)) for _, module in modules],
        "tensors": [(n, id(t), t.data_ptr(), t.requires_grad, t.dtype) for n, t in tensors.items()],
        "values": [tensor.detach().clone() for tensor in tensors.values()],
        "config": (base.config.use_cache, base.config._attn_implementation),
        "generation_config": id(base.generation_config),
        "repacked": [
            getattr(getattr(p, "quant_state", None), "packing_format_for_cpu", False) for p in tensors.values()
        ],
        "random": torch.get_rng_state(),
    }


def same(before: dict[str, Any], after: dict[str, Any]) -> None:
    for key in before:
        if key in ("values", "random"):
            pairs = zip(before[key], after[key], strict=True)
            assert all(torch.equal(old, new) for old, new in pairs), key
        else:
            assert before[key] == after[key], key


def test_batches_give_what_single_prompts_give(llama: Any, tokenizer: Any) -> None:
    sampling = Sampling(max_new_tokens=24)
    alone = [generate(llama, tokenizer, [prompt], STOP, sampling)[0] for prompt in PROMPTS]
    assert len({completion.text for completion in alone}) > 2
    for batch_size in (2, 32):
        assert generate(llama, tokenizer, PROMPTS, STOP, sampling, batch_size=batch_size) == alone


def test_greedy_is_the_argmax_of_the_models_own_forward(llama: Any, tokenizer: Any) -> None:
    got = generate(llama, tokenizer, PROMPTS, STOP, Sampling(max_new_tokens=5))
    for prompt, completion in zip(PROMPTS, got, strict=True):
        ids = list(prompt)
        for token in completion.token_ids:
            with torch.no_grad():
                assert llama(torch.tensor([ids])).logits[0, -1].argmax() == token
            ids.append(token)


def test_a_falcon_that_trains_by_blocks_decodes_as_transformers_does(tokenizer: Any) -> None:
    register_attention()
    completions = []
    for attention in (SEGMENTS, "eager"):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(CONFIGS["falcon"](), attn_implementation=attention)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
        completions.append(generate(model, tokenizer, PROMPTS, STOP, Sampling(max_new_tokens=12)))
        assert model.config._attn_implementation == attention
    assert completions[0] == completions[1]
    assert len({completion.text for completion in completions[0]}) > 2


def test_results_keep_the_given_order_and_batches_are_told(llama: Any, tokenizer: Any) -> None:
    done: list[int] = []
    sampling = Sampling(max_new_tokens=6)
    forward = generate(llama, tokenizer, PROMPTS, STOP, sampling, batch_size=2, on_batch=done.append)
    backward = generate(llama, tokenizer, PROMPTS[::-1], STOP, sampling, batch_size=2)
    assert forward == backward[::-1]
    assert done == [2, 2, 1]
    assert generate(llama, tokenizer, [], STOP, sampling) == []


def test_a_stop_token_ends_and_is_not_in_the_text(llama: Any, tokenizer: Any) -> None:
    free = generate(llama, tokenizer, PROMPTS, STOP, Sampling(max_new_tokens=12))
    assert any(not completion.stopped for completion in free)
    stop = next(completion for completion in free if not completion.stopped).token_ids[4]
    for completion in generate(llama, tokenizer, PROMPTS, [257, stop], Sampling(max_new_tokens=12)):
        if completion.stopped:
            assert completion.token_ids[-1] in (257, stop)
            assert not {257, stop} & set(completion.token_ids[:-1])
            assert completion.text == tokenizer.decode(completion.token_ids[:-1], skip_special_tokens=True)
        else:
            assert len(completion.token_ids) == 12


def test_sampling_follows_its_seed_alone(llama: Any, tokenizer: Any) -> None:
    def sample(seed: int, **changes: Any) -> list[Completion]:
        torch.manual_seed(torch.seed() % 1000)
        sampling = Sampling(max_new_tokens=8, temperature=1.0, seed=seed, **changes)
        return generate(llama, tokenizer, PROMPTS, STOP, sampling)

    assert sample(1) == sample(1)
    assert sample(1) != sample(2)
    greedy = generate(llama, tokenizer, PROMPTS, STOP, Sampling(max_new_tokens=8))
    assert sample(1, top_p=1e-6) == greedy


def test_the_models_own_generation_defaults_do_not_leak_in(llama: Any, tokenizer: Any) -> None:
    plain = generate(llama, tokenizer, PROMPTS, STOP, Sampling(max_new_tokens=8))
    llama.generation_config = GenerationConfig(repetition_penalty=9.0, do_sample=True, min_new_tokens=8)
    assert generate(llama, tokenizer, PROMPTS, STOP, Sampling(max_new_tokens=8)) == plain


@pytest.mark.parametrize("fails", [False, True])
def test_a_model_in_training_is_left_exactly_as_it_was(base_folder: Path, tokenizer: Any, fails: bool) -> None:
    model = quantized(base_folder, tokenizer, dropout=0.1)
    model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    model.get_base_model().model.layers[1].self_attn.eval()
    before = look(model)
    assert any(before["checkpointing"]) and not all(before["training"])

    def on_batch(_: int) -> None:
        # The dense copies are in place now; an interruption must take them out again.
        assert len(list(model.modules())) < len(before["modules"])
        if fails:
            raise KeyboardInterrupt

    try:
        generate(model, tokenizer, PROMPTS, STOP, Sampling(max_new_tokens=4, temperature=1.0), on_batch=on_batch)
    except KeyboardInterrupt:
        assert fails
    same(before, look(model))
    loss = model(input_ids=torch.tensor([PROMPTS[2]]), labels=torch.tensor([PROMPTS[2]]), use_cache=False).loss
    loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_inference_mode_keeps_attention_and_weights(base_folder: Path, tokenizer: Any) -> None:
    model = quantized(base_folder, tokenizer, dropout=0.5)
    before = look(model)
    ids = torch.tensor([PROMPTS[2]])
    with inference_mode(model):
        first, second = model(input_ids=ids).logits, model(input_ids=ids).logits
        assert model.get_base_model().config._attn_implementation == SEGMENTS
    assert torch.equal(first, second) and not first.requires_grad
    same(before, look(model))


def test_quantized_generation_is_that_of_the_layers_as_they_are(
    base_folder: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = quantized(base_folder, tokenizer)
    dense = generate(model, tokenizer, PROMPTS, STOP, Sampling(max_new_tokens=16))
    monkeypatch.setattr("finetune.inference.dense.MAX_SHARE", 0.0)
    assert generate(model, tokenizer, PROMPTS, STOP, Sampling(max_new_tokens=16)) == dense
    with model.disable_adapter():
        base = generate(model, tokenizer, PROMPTS, STOP, Sampling(max_new_tokens=16))
    assert base != dense


def test_completions_end_with_the_models_context(tokenizer: Any) -> None:
    torch.manual_seed(0)
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32}
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=258, initializer_range=0.3, **sizes)).eval()
    prompts = [[65 + index for index in range(size)] for size in (4, 40, 30, 20, 32, 29)]
    done: list[int] = []
    got = generate(gpt2, tokenizer, prompts, [300], Sampling(max_new_tokens=12), batch_size=4, on_batch=done.append)
    assert [len(each.token_ids) for each in got] == [12, 0, 2, 12, 0, 3]
    assert not any(each.stopped for each in got) and sum(done) == len(prompts)
    assert got[0] == generate(gpt2, tokenizer, prompts[:1], [300], Sampling(max_new_tokens=12))[0]


def test_what_cannot_end_well_is_refused(llama: Any, tokenizer: Any) -> None:
    with pytest.raises(ValueError, match="no tokens"):
        generate(llama, tokenizer, [[256], []], STOP, Sampling())
    with pytest.raises(ValueError, match="no stop token"):
        generate(llama, tokenizer, [[256]], [], Sampling())


def test_fm02_an_overfitted_model_stops_by_itself_with_pad_equal_to_eos(llama: Any, tokenizer: Any) -> None:
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    pairs = [("a", "one"), ("bb", "two, then some"), ("ccc", "3"), ("dddd", "the fourth")]
    prompts = [[256, *tokenizer.encode(question)] for question, _ in pairs]
    answers = [[*tokenizer.encode(answer), tokenizer.eos_token_id] for _, answer in pairs]
    width = max(len(p) + len(a) for p, a in zip(prompts, answers, strict=True))
    ids = torch.full((len(pairs), width), tokenizer.pad_token_id)
    labels = torch.full_like(ids, -100)
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        end = len(prompt) + len(answer)
        ids[row, :end] = torch.tensor(prompt + answer)
        labels[row, len(prompt) : end] = torch.tensor(answer)
    model = build_llama(initializer_range=0.05)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(80):
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if loss < 0.01:
            break
    got = generate(model, tokenizer, prompts, [tokenizer.eos_token_id], Sampling(max_new_tokens=40))
    assert [completion.text for completion in got] == [answer for _, answer in pairs]
    assert all(completion.stopped for completion in got)


def test_fm22_generation_keeps_no_logits(tokenizer: Any) -> None:
    # 16 prompts, 4 tokens, a vocabulary of 40,000: 10 MB of logits a batch, 600 MB if they were kept.
    model = build_llama(vocab_size=40_000, num_hidden_layers=1)
    process, seen = psutil.Process(), []
    prompts = [[256, index % 200, 3] for index in range(16 * 64)]
    generate(
        model,
        tokenizer,
        prompts,
        STOP,
        Sampling(max_new_tokens=4),
        batch_size=16,
        on_batch=lambda _: seen.append(process.memory_info().rss),
    )
    assert len(seen) == 64
    assert seen[-1] - seen[4] < 100e6
