"""Writes the tables of docs/scaling.md from the code's own memory estimate and the published shapes of four models.

python docs/make_scaling_tables.py            # rewrite the tables
python docs/make_scaling_tables.py --check    # exit 1 if they are not what the code says
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

from transformers import FalconConfig, LlamaConfig

from finetune.models.load import quiet_libraries
from finetune.models.memory import MemoryEstimate, Planner, Spread
from finetune.recipe.schema import Recipe

PAGE = Path(__file__).with_name("scaling.md")
GPUS = (1, 2, 4, 8, 16, 32, 64)
MICRO_STEPS = 4

# Source: config.json of tiiuae/falcon-7b, tiiuae/falcon-40b, meta-llama/Meta-Llama-3-70B and tiiuae/falcon-180B.
FALCON = {"vocab_size": 65024, "parallel_attn": True, "bias": False, "alibi": False}
NEW_FALCON = {**FALCON, "new_decoder_architecture": True, "num_kv_heads": 8}
MODELS = {
    "Falcon-7B": lambda: FalconConfig(
        hidden_size=4544, num_hidden_layers=32, num_attention_heads=71, multi_query=True, **FALCON
    ),
    "Falcon-40B": lambda: FalconConfig(hidden_size=8192, num_hidden_layers=60, num_attention_heads=128, **NEW_FALCON),
    "Llama-3-70B": lambda: LlamaConfig(
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        vocab_size=128256,
    ),
    "Falcon-180B": lambda: FalconConfig(hidden_size=14848, num_hidden_layers=80, num_attention_heads=232, **NEW_FALCON),
}


def recipe(quantization: str) -> Recipe:
    """What the tables are computed for."""
    return Recipe.model_validate(
        {
            "name": "scaling",
            "model": {"name": "/model", "quantization": quantization},
            "adapter": {"rank": 16},
            "data": {"sources": [{"path": "/rows"}], "max_seq_len": 2048, "packing": "none"},
            "training": {"max_steps": 1, "micro_batch_size": 1, "gradient_checkpointing": True},
        }
    )


@cache
def planner(model: str) -> Planner:
    """One planner a model: what does not depend on the number of GPUs is computed once."""
    return Planner(MODELS[model]())


def estimate(model: str, quantization: str, gpus: int) -> MemoryEstimate:
    """One process on CUDA."""
    strategy = "single" if gpus == 1 else "fsdp"
    return planner(model).estimate(recipe(quantization), Spread(strategy, gpus, "cuda"))


def memory_table() -> str:
    """GB a GPU."""
    rows = [
        [model, quantization, *(f"{estimate(model, quantization, gpus).total / 1e9:.1f}" for gpus in GPUS)]
        for model in MODELS
        for quantization in ("nf4", "none")
    ]
    return _table(["model", "base", *(f"{gpus} GPU{'s' * (gpus > 1)}" for gpus in GPUS)], rows)


def parts_table() -> str:
    """What an NF4 base takes on 8 GPUs, by part."""
    found = {model: estimate(model, "nf4", 8).parts for model in MODELS}
    names = list(next(iter(found.values())))
    rows = [[name, *(f"{parts[name] / 1e9:.2f}" for parts in found.values())] for name in names]
    return _table(["GB a GPU", *found], rows)


def traffic_table() -> str:
    """GB that a GPU receives in one optimizer step on 8 GPUs."""
    rows = []
    for model in MODELS:
        for quantization in ("nf4", "none"):
            weights = estimate(model, quantization, 8).weights
            sizes = (weights.blocks, weights.rest, 4 * weights.num_trainable)
            layer = f"{weights.largest_block * 7 / 8 / 1e6:,.0f} MB"
            amounts = [f"{way(*sizes, 8) / 1e9:,.2f}" for way in WAYS.values()]
            rows.append([model, quantization, layer, *amounts])
    return _table(["model", "base", "a layer, once", *WAYS], rows)


def house(blocks: int, rest: int, adapter: int, gpus: int) -> float:
    """Base sharded, adapter replicated and reduced once a step."""
    share = (gpus - 1) / gpus
    return share * (MICRO_STEPS * (2 * blocks + rest) + 2 * adapter)


def sharded_adapters(blocks: int, rest: int, adapter: int, gpus: int) -> float:
    """Adapters are gathered with their layers, and their gradients scattered, at every micro-step."""
    share = (gpus - 1) / gpus
    return share * MICRO_STEPS * (2 * blocks + rest + 2 * adapter + adapter)


def ddp(blocks: int, rest: int, adapter: int, gpus: int) -> float:
    """The base is on every GPU."""
    return (gpus - 1) / gpus * 2 * adapter


WAYS: dict[str, Callable[[int, int, int, int], float]] = {
    "fsdp here": house,
    "FSDP, adapters sharded": sharded_adapters,
    "ddp": ddp,
}
TABLES = {"memory": memory_table, "parts": parts_table, "traffic": traffic_table}


def with_tables(text: str) -> str:
    """`text` with what stands between each pair of marks replaced by its table."""
    for name, table in TABLES.items():
        start, end = f"<!-- {name}: made by docs/make_scaling_tables.py -->", f"<!-- /{name} -->"
        before, found, rest = text.partition(start)
        _, also, after = rest.partition(end)
        assert found and also, f"{PAGE} has lost its marks {start} and {end}"
        text = f"{before}{start}\n{table()}{end}{after}"
    return text


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def main() -> int:
    """Rewrite the tables, or compare them."""
    quiet_libraries()
    old = PAGE.read_text(encoding="utf-8")
    new = with_tables(old)
    if "--check" in sys.argv[1:]:
        return int(new != old)
    PAGE.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
