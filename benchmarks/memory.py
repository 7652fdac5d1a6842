"""The memory estimate against measured peaks: three models x {none, nf4} x {checkpointing off, on} x {padded, packed}.

PYTHONPATH=. python benchmarks/memory.py FOLDER [CASE …]      # all 24 cases take about 12 minutes on one core
PYTHONPATH=. python benchmarks/memory.py FOLDER --table       # the table of docs/memory.md from what was measured

Models and data are written to FOLDER once; results are added to FOLDER/results.json. Every case trains three steps in
a process of its own, whose peak is what `finetune.machine.peak_memory_bytes` reads.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.tiny import WORDS, write_jsonl, write_recipe, write_tokenizer

WORKER = Path(__file__).with_name("memory_worker.py")
# Published families at a size whose step outweighs the libraries; embeddings are tied, since a mapped file's pages that
# no token asks for are not resident.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": (
        "LlamaConfig",
        {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 24, "num_attention_heads": 9}
        | {"num_key_value_heads": 3, "vocab_size": 32000, "tie_word_embeddings": True},
    ),
    "qwen3": (
        "Qwen3Config",
        {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 8, "num_attention_heads": 16}
        | {"num_key_value_heads": 8, "head_dim": 64, "vocab_size": 64000, "tie_word_embeddings": True},
    ),
    "falcon": (
        "FalconConfig",
        {"hidden_size": 1024, "num_hidden_layers": 12, "num_attention_heads": 16, "vocab_size": 32000}
        | {"multi_query": True, "parallel_attn": True, "alibi": False, "bias": False},
    ),
}
CASES = {
    f"{model}-{quantization}-{'checkpointing' if checkpointing else 'kept'}-{packing}": (
        model,
        quantization,
        checkpointing,
        packing,
    )
    for model, quantization, checkpointing, packing in itertools.product(
        MODELS, ("none", "nf4"), (False, True), ("none", "isolated")
    )
}


def write_inputs(folder: Path) -> None:
    """Random models with a tiny tokenizer, and rows of about 230 tokens."""
    import torch
    import transformers

    for name, (kind, sizes) in MODELS.items():
        if (folder / name / "config.json").exists():
            continue
        config = getattr(transformers, kind)(**sizes, bos_token_id=1, eos_token_id=2, pad_token_id=2)
        torch.manual_seed(0)
        transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder / name)
        write_tokenizer(folder / name)
    rng = random.Random(0)
    rows: list[dict[str, Any]] = [{"instruction": _words(rng, 8, 14), "output": _words(rng, 30, 45)} for _ in range(64)]
    write_jsonl(folder / "rows.jsonl", rows)


def _words(rng: random.Random, low: int, high: int) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(rng.randint(low, high)))


def recipe_of(folder: Path, case: str) -> Path:
    """The case's recipe file."""
    model, quantization, checkpointing, packing = CASES[case]
    return write_recipe(
        folder / f"{case}.json",
        {
            "name": case,
            "output_dir": str(folder / "runs"),
            "model": {"name": str(folder / model), "quantization": quantization},
            "adapter": {"rank": 16, "alpha": 32},
            "data": {
                "sources": [{"path": str(folder / "rows.jsonl")}],
                "max_seq_len": 256,
                "packing": packing,
                "num_workers": 0,
                "template": "alpaca",
            },
            "training": {
                "max_steps": 3,
                "global_batch_size": 8,
                "micro_batch_size": 8,
                "gradient_checkpointing": checkpointing,
            },
            "distributed": {"accelerator": "cpu"},
        },
    )


def measure(recipe: Path) -> dict[str, int]:
    """What one training process held, in bytes: see memory_worker.py."""
    done = subprocess.run([sys.executable, str(WORKER), str(recipe)], capture_output=True, text=True, env=os.environ)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    stages: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return stages


def predict(recipe: Path) -> int:
    """The estimate, in bytes, as `finetune check` gives it."""
    from finetune.recipe.load import load_recipe
    from finetune.training.checkup import Checkup
    from finetune.training.fitting import estimate

    checkup = Checkup(load_recipe(recipe))
    placement, devices, _ = checkup.resolved
    return estimate(checkup.planner, checkup.recipe, checkup.step, placement.strategy, devices).total


def table(results: dict[str, dict[str, int]]) -> str:
    """Markdown rows: measured and estimated, whole and above the bare process."""
    lines = [
        "| model | base | checkpointing | rows | measured | estimate | | above the bare process | estimate | |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for case, found in results.items():
        model, quantization, checkpointing, packing = CASES[case]
        peak, guess, bare = found["peak"], found["estimate"], found["bare"]
        cells = [model, quantization, "on" if checkpointing else "off", "padded" if packing == "none" else "packed"]
        cells += [_mb(peak), _mb(guess), f"{guess / peak - 1:+.1%}"]
        cells += [_mb(peak - bare), _mb(guess - bare), f"{(guess - bare) / (peak - bare) - 1:+.1%}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _mb(count: float) -> str:
    return f"{count / 1e6:,.0f}"


def main() -> None:
    """Measure the cases that are named, or all, and print each; or print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("cases", nargs="*", metavar="case", help=f"default: all; the first is {next(iter(CASES))}")
    parser.add_argument("--table", action="store_true")
    arguments = parser.parse_args()
    if unknown := sorted(set(arguments.cases) - set(CASES)):
        parser.error(f"no case {unknown[0]}; there are {', '.join(CASES)}")
    folder = arguments.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    saved = folder / "results.json"
    results: dict[str, dict[str, int]] = json.loads(saved.read_text()) if saved.exists() else {}
    if arguments.table:
        results = {
            case: {**results[case], "estimate": predict(recipe_of(folder, case))} for case in CASES if case in results
        }
        print(table(results))
        return
    write_inputs(folder)
    for case in arguments.cases or CASES:
        results[case] = measure(recipe_of(folder, case))
        print(case, results[case], flush=True)
        saved.write_text(json.dumps(results))


if __name__ == "__main__":
    main()
