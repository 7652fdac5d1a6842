"""What every peer's process does alike: read its task, judge the trained model, report. Needs torch alone."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

# Optimizer steps that are not timed.
WARMUP_STEPS = 1


def read_task() -> dict[str, Any]:
    """The task on stdin: model, samples, settings."""
    return json.load(sys.stdin)


def read_samples(path: str) -> list[dict[str, list[int]]]:
    """Tokenized samples: `input_ids`, and `labels` with -100 where there is no loss."""
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def device() -> torch.device:
    """Where a peer trains."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def dtype(settings: dict[str, Any]) -> torch.dtype:
    """What a peer computes in."""
    return torch.bfloat16 if settings["precision"] == "bf16" else torch.float32


def synchronize() -> None:
    """Wait for the GPU, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peak_memory_bytes() -> int:
    """Peak of this process: what torch allocated on a GPU, else resident memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))


@torch.no_grad()
def mean_loss(logits_of: Callable[[torch.Tensor], torch.Tensor], samples: list[dict[str, list[int]]]) -> float:
    """Mean cross-entropy a supervised token, each sample alone, logits in fp32: the same sum for every peer."""
    total, count = 0.0, 0
    for sample in samples:
        ids = torch.tensor([sample["input_ids"]], device=device())
        labels = torch.tensor(sample["labels"][1:], device=device())
        logits = logits_of(ids)[0, :-1].float()
        total += float(F.cross_entropy(logits, labels, ignore_index=-100, reduction="sum"))
        count += int((labels != -100).sum())
    return total / count


def report(**figures: Any) -> None:
    """Print the figures as the last line of stdout."""
    print(json.dumps(figures), flush=True)
