"""Run folders as `finetune run` leaves them, written without training: whole, unfinished and damaged."""

from __future__ import annotations

import hashlib
import json
import math
import random
from pathlib import Path
from typing import Any

import yaml

from finetune.recipe.schema import Recipe
from finetune.run_dir import RunDir

COLUMNS = (
    "step,epoch,loss,grad_norm,lr,validation_loss,supervised_tokens,tokens,tokens_per_second,peak_memory_bytes,seconds"
)
PROMPTS = (
    ("Where is order P-63118? It was due on 13 July.\nThank you", '{"order_id": "P-63118", "issue": "delivery"}'),
    ("the lamp <b>Glimo</b> & its cable are broken, I need help", '{"order_id": null, "issue": "defect"}'),
    ("An_order_number_without_any_space_to_break_at_" + "x" * 120, '{"order_id": null, "issue": "other"}'),
)


def recipe_of(name: str, **sections: dict[str, Any]) -> dict[str, Any]:
    """A resolved recipe; keyword arguments replace keys of its sections."""
    given: dict[str, Any] = {
        "name": name,
        "model": {"name": "org/base-360M", "quantization": "nf4"},
        "data": {"sources": [{"path": "/data/a/long/way/down/tickets/train.jsonl"}], "max_seq_len": 512},
        "training": {"epochs": 2.0, "global_batch_size": 16, "optimizer": {"lr": 2e-3}},
        "evaluation": {"every_steps": 20, "metrics": ["exact_match", "perplexity"]},
        "logging": {"every_steps": 1},
    }
    for section, values in sections.items():
        given[section] = {**given.get(section, {}), **values}
    return Recipe.model_validate(given).model_dump(mode="json")


def write_run(
    folder: Path,
    name: str = "tickets",
    *,
    until: int | None = None,
    seed: int = 0,
    speed: float = 900.0,
    best: float = 0.35,
    **sections: dict[str, Any],
) -> RunDir:
    """A run of 100 steps (800 samples, 2 epochs); `until` is the step that it was stopped at."""
    run = RunDir(folder / name)
    run.root.mkdir(parents=True)
    recipe = recipe_of(name, **sections)
    run.recipe.write_text(yaml.safe_dump(recipe, sort_keys=False))
    run.lock.write_text("process 1 on host")
    run.ledger.write_text(json.dumps(_ledger(seed), indent=2))
    bad = {"kind": "malformed", "reason": "output is empty"}
    rejected = [{"origin": f"/data/a/train.jsonl:{line}", **bad} for line in (4, 9)]
    run.rejected.write_text("".join(json.dumps(row) + "\n" for row in rejected))
    last = 100 if until is None else until
    losses = _write_metrics(run, last, seed, speed, best, recipe["training"]["optimizer"]["lr"])
    run.samples.write_text("".join(json.dumps(row) + "\n" for row in _samples(last)))
    for step in [step for step in (50, 80, 100) if step <= last]:
        write_checkpoint(run.checkpoints, step, losses[step])
    results: dict[str, Any] = {"before": _measured(0.02, 14.2, "I am sorry, as a text-based application I cannot.")}
    if until is None:
        results["after"] = _measured(0.91, 1.27, None)
        machine = {"platform": "Linux x86_64", "cpu_cores": 16, "memory_bytes": 64 << 30, "gpus": ["H200", "H200"]}
        results["training"] = {
            "steps": 100,
            "tokens": 294_000,
            "seconds": 326.4,
            "tokens_per_second": 900.7,
            "peak_memory_bytes": 2_865_000_000,
            "machine": machine,
        }
        run.adapter.mkdir()
        (run.adapter / "adapter_model.safetensors").write_bytes(b"0" * 9_000)
        (run.adapter / "adapter_config.json").write_text("{}")
    run.results.write_text(json.dumps(results, indent=2))
    return run


def write_checkpoint(folder: Path, step: int, loss: float | None) -> Path:
    """A whole checkpoint's directory with a manifest that fits its files."""
    path = folder / f"step-{step:06d}"
    path.mkdir(parents=True)
    files = {"adapter_model.safetensors": b"weights %d" % step, "trainer_state.pt": b"state" * 40}
    for name, content in files.items():
        (path / name).write_bytes(content)
    progress = {"loss": loss, "validation_loss": 0.41, "validated_at": 80}
    listed = {name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in files.items()}
    (path / "manifest.json").write_text(json.dumps({"step": step, "progress": progress, "files": listed}))
    return path


def _write_metrics(run: RunDir, last: int, seed: int, speed: float, best: float, lr: float) -> dict[int, float]:
    rng = random.Random(seed)
    lines, losses = [COLUMNS], {}
    for step in range(1, last + 1):
        loss = best + 1.6 * math.exp(-step / 14) + rng.gauss(0, 0.06)
        losses[step] = loss
        validation = f"{best + 0.04 + 1.2 * math.exp(-step / 20)}" if step % 20 == 0 else ""
        values = [
            step,
            round(step * 0.02, 4),
            loss,
            0.4 + 2 * math.exp(-step / 9) + rng.random() * 0.2,
            lr * min(1.0, step / 5) * (1 - step / 105),
            validation,
            980,
            2_940 * step,
            round(speed + rng.gauss(0, speed / 25), 1),
            2_400_000_000 + 4_650_000 * step,
            round(2_940 * step / speed, 3),
        ]
        lines.append(",".join(str(value) for value in values))
    run.metrics.write_text("\n".join(lines) + "\n")
    return losses


def _measured(exact: float, perplexity: float, completion: str | None) -> dict[str, Any]:
    samples = [
        {"prompt": prompt, "expected": answer, "completion": completion or answer, "stopped": completion is None}
        for prompt, answer in PROMPTS
    ]
    return {"metrics": {"exact_match": exact, "perplexity": perplexity}, "samples": samples}


def _samples(last: int) -> list[dict[str, Any]]:
    return [
        {
            "step": step,
            "prompt": f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n",
            "expected": answer,
            "completion": answer if step > 40 else "{'order': " * 8,
            "stopped": step > 40,
        }
        for step in range(20, last + 1, 20)
        for prompt, answer in PROMPTS[:2]
    ]


def _ledger(seed: int) -> dict[str, Any]:
    rng = random.Random(seed)
    edges = list(range(128, 256, 8))
    counts = [round(90 * math.exp(-(((edge - 186) / 20) ** 2)) + rng.random() * 5) for edge in edges[:-1]]
    source = {
        "where": "data.sources[0]",
        "path": "/data/a/long/way/down/tickets/train.jsonl",
        "role": "train",
        "format": "messages",
        "rows_read": 802,
        "rows_kept": 800,
        "rows_truncated": 0,
        "rows_split": 0,
        "dropped": {"malformed": 2},
        "samples": 800,
        "total_tokens": 147_000,
        "supervised_tokens": 49_000,
        "label_coverage": 1 / 3,
        "lengths": {"p5": 151, "p50": 185, "p95": 211, "p99": 221, "max": 247},
        "length_histogram": {"edges": edges, "counts": counts},
        "weight": 1.0,
    }
    return {
        "template": "tokenizer",
        "train_on": "all_assistant",
        "max_seq_len": 512,
        "sources": [source],
        "rejected": 2,
        "train_samples": 800,
        "train_tokens": 147_000,
        "train_supervised_tokens": 49_000,
        "validation_samples": 40,
        "validation_tokens": 7_300,
        "validation_supervised_tokens": 2_440,
        "duplicate_rows": 3,
        "validation_rows_in_train": 0,
    }
