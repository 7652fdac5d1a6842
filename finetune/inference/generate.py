"""Completions of tokenized prompts, in batches, by a model that may be in the middle of training."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from transformers import GenerationConfig

from finetune.inference.dense import dense_weights
from finetune.inference.mode import base_of, decoding, inference_mode
from finetune.inference.prefix import SharedPrefix
from finetune.models.load import context_length

__all__ = ["Completion", "Sampling", "generate", "inference_mode"]


@dataclass(frozen=True)
class Completion:
    """What a model wrote after a prompt."""

    token_ids: list[int]  # as generated, the stop token included
    text: str  # without special tokens
    stopped: bool  # ended by a stop token, not by max_new_tokens or the model's context


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen: greedily at temperature 0, else at random from the top_p mass."""

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


def generate(
    model: torch.nn.Module,
    tokenizer: Any,
    prompts: list[list[int]],
    stop_token_ids: Sequence[int],
    sampling: Sampling,
    *,
    batch_size: int = 32,
    on_batch: Callable[[int], None] | None = None,
) -> list[Completion]:
    """A completion of every prompt, in the prompts' order.

    The model is left exactly as it was found. Prompts are batched by length, the longest first, so that a
    batch that does not fit fails at once; `on_batch` gets the number of prompts of every finished batch.
    A completion ends where the model's context does; it is empty for a prompt that fills it.
    Greedy completions do not depend on the batch but for rounding; sampled ones follow from the seed, the
    prompts and the batch size. What all prompts begin with is computed once (see `SharedPrefix`). A sharded
    model must be called by every rank with the same prompts. On CPU, layers are expanded to dense ones
    meanwhile where memory allows (see `dense_weights`).

    Raises:
        ValueError: a prompt is empty, or there is no stop token.
    """
    if not all(prompts):
        raise ValueError("a prompt has no tokens")
    if not stop_token_ids:
        raise ValueError("no stop token is given, so no completion would ever end")
    # Not PeftModel.generate: it leaves attributes behind, and an adapter in the layers does not need it.
    causal_lm = base_of(model)
    context = context_length(causal_lm.config) or sys.maxsize
    full = {index: Completion([], "", False) for index, prompt in enumerate(prompts) if len(prompt) >= context}
    fitting = {index: prompt for index, prompt in enumerate(prompts) if index not in full}
    completions: dict[int, Completion] = full
    if full and on_batch is not None:
        on_batch(len(full))
    device = causal_lm.get_input_embeddings().weight.device
    sharded = any(isinstance(parameter, DTensor) for parameter in causal_lm.parameters())
    cuda = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda), decoding(model), dense_weights(model):
        torch.manual_seed(sampling.seed)
        longest = min(max(map(len, fitting.values()), default=0) + sampling.max_new_tokens, context)
        prefix = SharedPrefix(causal_lm, list(fitting.values()), longest)
        for room, batch in _batches(fitting, batch_size, sampling.max_new_tokens, context):
            config = _generation_config(replace(sampling, max_new_tokens=room), stop_token_ids, tokenizer.pad_token_id)
            rows = _generate_batch(causal_lm, [prompts[index] for index in batch], prefix, config, device, sharded)
            for index, row in zip(batch, rows, strict=True):
                completions[index] = _completion(row, set(stop_token_ids), tokenizer)
            if on_batch is not None:
                on_batch(len(batch))
    return [completions[index] for index in range(len(prompts))]


def _batches(
    prompts: Mapping[int, list[int]], batch_size: int, max_new_tokens: int, context: int
) -> Iterator[tuple[int, list[int]]]:
    """How many new tokens each batch may have, and its prompts, the longest first.

    Only prompts that are cut alike share a batch, so that none is cut earlier for another's length.
    """
    order = sorted(prompts, key=lambda index: len(prompts[index]), reverse=True)
    for room, group in groupby(order, key=lambda index: min(max_new_tokens, context - len(prompts[index]))):
        batch = list(group)
        yield from ((room, batch[start : start + batch_size]) for start in range(0, len(batch), batch_size))


def _generation_config(sampling: Sampling, stop_token_ids: Sequence[int], pad_id: int | None) -> GenerationConfig:
    config = GenerationConfig(
        max_new_tokens=sampling.max_new_tokens,
        eos_token_id=list(stop_token_ids),
        pad_token_id=stop_token_ids[0] if pad_id is None else pad_id,
        use_cache=True,
    )
    if sampling.temperature > 0:
        config.update(do_sample=True, temperature=sampling.temperature, top_p=sampling.top_p, top_k=0)
    else:
        config.update(do_sample=False)
    return config


def _generate_batch(
    causal_lm: Any,
    prompts: list[list[int]],
    prefix: SharedPrefix,
    config: GenerationConfig,
    device: torch.device,
    sharded: bool,
) -> list[list[int]]:
    """New token ids of every prompt, padded to the longest completion."""
    width, shared = max(map(len, prompts)), prefix.length
    ids = torch.full((len(prompts), width), config.pad_token_id, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        start = width - len(prompt) + shared
        ids[row, :shared], ids[row, start:] = torch.tensor(prompt[:shared]), torch.tensor(prompt[shared:])
        mask[row, :shared] = mask[row, start:] = 1
    cache = prefix.cache(len(prompts))
    out = causal_lm.generate(
        input_ids=ids.to(device),
        attention_mask=mask.to(device),
        generation_config=config,
        # Layers are gathered by all ranks together, and unlike GPUs may round to other tokens, which end elsewhere.
        synced_gpus=sharded,
        **({} if cache is None else {"past_key_values": cache}),
    )
    rows: list[list[int]] = out[:, width:].tolist()
    return rows


def _completion(row: list[int], stops: set[int], tokenizer: Any) -> Completion:
    end = next((at for at, token in enumerate(row) if token in stops), None)
    body = row[:end]
    text = tokenizer.decode(body, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return Completion(row if end is None else row[: end + 1], text, end is not None)
