"""One training run in a process of its own; prints what the process held at each stage as one JSON line.

python benchmarks/memory_worker.py RECIPE
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path


def resident_bytes() -> int:
    """Memory that this process holds now."""
    import psutil

    return int(psutil.Process().memory_info().rss)


def main(recipe_path: str) -> dict[str, int]:
    """Train the recipe; bytes at each stage."""
    from finetune.machine import limit_kernel_cache, peak_memory_bytes
    from finetune.recipe.load import load_recipe

    recipe = load_recipe(recipe_path)
    limit_kernel_cache()
    from finetune.models.load import quiet_libraries

    quiet_libraries()
    import bitsandbytes  # noqa: F401

    from finetune.run_dir import RunDir
    from finetune.stop_signals import StopSignals
    from finetune.training.train import prepare_job, train

    stages = {"bare": resident_bytes()}
    job = prepare_job(recipe)
    stages["prepared"] = resident_bytes()

    class Stages:
        """In the place of measuring the model on rows."""

        fingerprint = ""

        def before(self, _: object) -> None:
            stages["loaded"], stages["load_peak"] = resident_bytes(), peak_memory_bytes()

        def after(self, _: object) -> None:
            """Nothing is measured then."""

    with tempfile.TemporaryDirectory() as folder:
        train(job, RunDir(Path(folder)), None, measure=Stages(), signals=StopSignals(""))
    stages["peak"] = peak_memory_bytes()
    return stages


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1])))
