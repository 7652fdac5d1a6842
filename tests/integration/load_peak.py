"""One of several processes of runs that measure the memory of loading the base.

Usage: python -m torch.distributed.run --nproc-per-node N load_peak.py RESULTS RECIPE [RECIPE ...]
Each process appends a line to RESULTS for each recipe: {"recipe", "rank", "peak", "after", "gpu_peak"}: bytes of
anonymous memory over what it had before the base was loaded, and the most that was allocated on its GPU meanwhile.
Pages of mapped files are shared with others and are not in it.
"""

from __future__ import annotations

import gc
import json
import sys
import threading
from pathlib import Path

import torch

from finetune.cli import main
from finetune.distributed import global_rank
from finetune.machine import release_freed_memory
from finetune.training.module import FinetuneModule


def anonymous_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no RssAnon in /proc/self/status")


configure = FinetuneModule.configure_model
recipe = ""


def measured(self: FinetuneModule) -> None:
    if hasattr(self, "loss_model"):
        return
    release_freed_memory()
    before = peak = anonymous_bytes()
    done = threading.Event()

    def sample() -> None:
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, anonymous_bytes())

    sampler = threading.Thread(target=sample)
    sampler.start()
    configure(self)
    done.set()
    sampler.join()
    gc.collect()
    line = {"recipe": recipe, "rank": global_rank(), "peak": peak - before, "after": anonymous_bytes() - before}
    line["gpu_peak"] = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
    with Path(sys.argv[1]).open("a") as results:
        results.write(json.dumps(line) + "\n")


FinetuneModule.configure_model = measured  # type: ignore[method-assign]
for path in sys.argv[2:]:
    recipe = Path(path).stem
    assert main(["run", path]) == 0, path
