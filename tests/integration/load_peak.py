"""One of several processes of runs that measure the memory of loading the base.

Usage: python -m torch.distributed.run --nproc-per-node N load_peak.py RESULTS RECIPE [RECIPE ...]
Each process appends a line to RESULTS for each recipe: recipe, rank, and bytes of anonymous memory over what it had
before: at most while the base was found or converted (`converting`), until it was loaded (`loading`), until it was
sharded (`sharding`), and when the model stood (`after`); and the most on its GPU until then (`gpu_peak`). Pages of
mapped files are shared with others and are not counted.
"""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from finetune.cli import main
from finetune.distributed import global_rank
from finetune.machine import release_freed_memory
from finetune.training import module
from finetune.training.module import FinetuneModule


def anonymous_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no RssAnon in /proc/self/status")


class Peak:
    """The most anonymous memory over that of the start, since `take` was last called; looked at every 2 ms."""

    def __init__(self) -> None:
        release_freed_memory()
        self.start = self.most = anonymous_bytes()
        self.done = threading.Event()
        self.thread = threading.Thread(target=self.sample)
        self.thread.start()

    def sample(self) -> None:
        while not self.done.wait(0.002):
            self.most = max(self.most, anonymous_bytes())

    def take(self) -> int:
        most, self.most = max(self.most, anonymous_bytes()), 0
        return most - self.start


taken: dict[str, int] = {}
recipe = ""
peak: Peak


def taking(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def wrapped(*arguments: Any, **keywords: Any) -> Any:
        result = function(*arguments, **keywords)
        taken[name] = peak.take()
        return result

    return wrapped


configure = FinetuneModule.configure_model


def measured(self: FinetuneModule) -> None:
    global peak
    if hasattr(self, "loss_model"):
        return
    peak = Peak()
    configure(self)
    peak.done.set()
    peak.thread.join()
    gpu_peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
    line = {"recipe": recipe, "rank": global_rank(), **taken, "after": anonymous_bytes() - peak.start}
    with Path(sys.argv[1]).open("a") as results:
        results.write(json.dumps(line | {"gpu_peak": gpu_peak}) + "\n")


module.mapped_source = taking("converting", module.mapped_source)
module.load_base = taking("loading", module.load_base)
module.move_replicated = taking("sharding", module.move_replicated)
FinetuneModule.configure_model = measured  # type: ignore[method-assign]
for path in sys.argv[2:]:
    recipe = Path(path).stem
    assert main(["run", path]) == 0, path
