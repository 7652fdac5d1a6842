"""Falcon-7B on one GPU, without a network: `make bench-gpu`.

Weights are random, of the real shape; words are random, their counts drawn like Alpaca's. Speed and memory depend on
neither. QLoRA and bf16 LoRA train on packed rows of 2,048 tokens, in turns, each in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

EPOCH_ROWS = 52_000  # Alpaca's
ROW_TOKENS = 2_048
VARIANTS = {
    "bf16": "bf16 LoRA",
    "nf4": "QLoRA (NF4)",
    "nf4+checkpointing": "QLoRA (NF4), gradient checkpointing",
}
FALCON_7B = {
    "vocab_size": 65_024,
    "hidden_size": 4_544,
    "num_hidden_layers": 32,
    "num_attention_heads": 71,
    "multi_query": True,
    "parallel_attn": True,
    "bias": False,
    "alibi": False,
    "new_decoder_architecture": False,
}
TINY = {**FALCON_7B, "vocab_size": 512, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}

# Words of Alpaca's rows: its preamble, the instruction with its input, the answer. Drawn log-normal; with the
# preamble about 125 tokens a row.
PREAMBLE = "below is an instruction that describes a task write a response that appropriately completes the request"
INSTRUCTION = (math.log(18), 0.6)
ANSWER = (math.log(42), 0.9)
LONGEST = 700


def outline_model(folder: Path, shape: dict[str, Any]) -> Any:
    """Write the configuration of a Falcon of `shape` in bf16; the model, without values."""
    import torch
    from transformers import AutoModelForCausalLM, FalconConfig

    config = FalconConfig(**shape, bos_token_id=1, eos_token_id=1, pad_token_id=1, dtype="bfloat16")
    config.architectures = ["FalconForCausalLM"]
    config.save_pretrained(folder)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def write_model(folder: Path, shape: dict[str, Any], device: str) -> None:
    """A Falcon of `shape` in bf16, drawn on `device`, in files of about 4 GB."""
    import torch
    from safetensors.torch import save_file

    model = outline_model(folder, shape)
    index: dict[str, str] = {}
    shard: dict[str, Any] = {}
    torch.manual_seed(0)

    def flush() -> None:
        name = f"model-{len(set(index.values())):05d}.safetensors"
        save_file(shard, folder / name, metadata={"format": "pt"})
        index.update(dict.fromkeys(shard, name))
        shard.clear()

    # Parameters, not the state dict: the head is the embedding's own.
    for name, parameter in model.named_parameters():
        tensor = torch.empty(parameter.shape, dtype=torch.bfloat16, device=device)
        shard[name] = (tensor.normal_(std=0.02) if tensor.ndim > 1 else tensor.fill_(float("weight" in name))).cpu()
        if sum(one.nbytes for one in shard.values()) > 4e9:
            flush()
    if shard:
        flush()
    if device == "cuda":  # the variants' processes need what this one would keep
        torch.cuda.empty_cache()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def write_tokenizer(folder: Path, vocab_size: int) -> list[str]:
    """A token a word; gives the words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = [*dict.fromkeys(PREAMBLE.split()), *(f"w{number}" for number in range(min(400, vocab_size - 100)))]
    vocabulary = {word: number for number, word in enumerate(["<unk>", "<eos>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", unk_token="<unk>").save_pretrained(folder)
    return words


def alpaca_like_rows(words: list[str], count: int) -> Iterator[dict[str, str]]:
    """Rows whose prompts open with the same preamble; the same for every call."""
    draw = random.Random(0)

    def text(center: float, spread: float) -> str:
        length = min(LONGEST, max(1, round(draw.lognormvariate(center, spread))))
        return " ".join(draw.choices(words, k=length))

    for _ in range(count):
        yield {"prompt": f"{PREAMBLE} {text(*INSTRUCTION)}", "completion": f" {text(*ANSWER)}"}


def write_recipe(folder: Path, model: Path, accelerator: str) -> Path:
    """The recipe that the variants change: recipes/falcon7b_alpaca.yaml at 2,048-token rows."""
    recipe = {
        "name": "falcon7b",
        "output_dir": str(folder / "runs"),
        "model": {"name": str(model)},
        "adapter": {
            "rank": 16,
            "alpha": 32,
            "target_modules": ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"],
        },
        "data": {
            "sources": [{"path": str(folder / "rows.jsonl"), "format": "prompt_completion"}],
            "template": "plain",
            "max_seq_len": 1024,
            "max_tokens": ROW_TOKENS,
            "num_workers": 0,
        },
        "training": {"epochs": 1.0, "global_batch_size": 128, "micro_batch_size": 1},
        "distributed": {"accelerator": accelerator},
    }
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(recipe))
    return path


def table(report: dict[str, Any]) -> str:
    """The figures as rows of docs/benchmarks.md."""
    gpus = report["machine"]["gpus"] or [report["machine"]["platform"]]
    lines = [
        f"{gpus[0]}: a bf16 product of square matrices reaches {report['peak_flops_per_second'] / 1e12:.0f} TFLOP/s.",
        "",
        f"| | tokens/s | of that peak | peak memory | epoch of {EPOCH_ROWS:,} rows |",
        "|---|---|---|---|---|",
    ]
    for row in report["variants"]:
        title = VARIANTS[row["variant"]]
        if "tokens_per_second" not in row:
            lines.append(f"| {title} | did not run: {row['failure']} | | | |")
            continue
        minutes = EPOCH_ROWS / row["samples_per_second"] / 60
        lines.append(
            f"| {title} | {row['tokens_per_second']:,.0f} | {row['peak_share']:.0%} | "
            f"{row['peak_memory_bytes'] / 1e9:.1f} GB | {minutes:.1f} min |"
        )
    return "\n".join(lines)


def run(
    folder: Path,
    shape: dict[str, Any],
    accelerator: str,
    *,
    steps: int,
    rounds: int,
    minutes: float,
    after_round: Callable[[dict[str, Any]], None],
) -> dict[str, Any]:
    """Write model and data into `folder` and measure the variants; no round begins after `minutes`."""
    from finetune.console import say
    from finetune.training.bench import bench_training

    started = time.monotonic()
    model = folder / "model"
    model.mkdir()
    say("drawing weights")
    write_model(model, shape, accelerator)
    words = write_tokenizer(model, shape["vocab_size"])
    with (folder / "rows.jsonl").open("w") as file:
        file.writelines(json.dumps(row) + "\n" for row in alpaca_like_rows(words, 2_000))
    recipe = write_recipe(folder, model, accelerator)
    left = minutes - (time.monotonic() - started) / 60
    limits: dict[str, Any] = {"steps": steps, "rounds": rounds, "minutes": left}
    return bench_training(recipe, [], list(VARIANTS), **limits, say=say, after_round=after_round)


def main() -> None:
    """Measure and print; `--tiny` tries the command on any machine."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=4, help="timed optimizer steps of a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=5.0, help="no round begins later")
    parser.add_argument("--folder", type=Path, help="where 14 GB of weights may lie meanwhile; default: the system's")
    parser.add_argument("--json", type=Path, help="write every figure")
    parser.add_argument("--tiny", action="store_true", help="a tiny shape on a CPU, to try the command")
    arguments = parser.parse_args()
    import torch

    if not arguments.tiny and not torch.cuda.is_available():
        parser.error("torch sees no GPU; --tiny tries the command on a CPU")

    def show(report: dict[str, Any]) -> None:
        print(table(report), flush=True)
        if arguments.json is not None:
            arguments.json.write_text(json.dumps(report, indent=1) + "\n")

    folder = Path(tempfile.mkdtemp(prefix="finetune-bench-", dir=arguments.folder))
    try:
        shape, accelerator = (TINY, "cpu") if arguments.tiny else (FALCON_7B, "cuda")
        limits = {"steps": arguments.steps, "rounds": arguments.rounds, "minutes": arguments.minutes}
        # After every round: a machine that is lent for minutes may end the command before its last.
        report = run(folder, shape, accelerator, **limits, after_round=show)
    finally:
        shutil.rmtree(folder)
    show(report)


if __name__ == "__main__":
    main()
