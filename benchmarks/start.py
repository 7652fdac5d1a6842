"""How long the command takes to start: help, a check without the model, and a run until its first step is done.

`PYTHONPATH=. python benchmarks/start.py`: the demo's recipe without its measurements, model and data in the cache.
Another checkout (`--against FOLDER`) is measured in turns with this one.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RECIPE = str(ROOT / "recipes" / "smollm2_135m_tickets.yaml")
OVERRIDES = [
    "evaluation.before=false",
    "evaluation.metrics=[]",
    "evaluation.num_samples=0",
    "logging.every_steps=1",
    "distributed.accelerator=cpu",
]
COMMANDS = {
    "`finetune --help`": ["--help"],
    "`finetune check RECIPE --no-model`": ["check", RECIPE, "--no-model"],
    "`finetune run RECIPE` to the end of its first step": ["run", RECIPE, *OVERRIDES, "--fresh"],
}


def seconds_of(command: list[str], checkout: Path, folder: Path) -> float:
    """Until the command ends; of a run, until it says that its first step is done, at which it is killed."""
    is_run = command[0] == "run"
    program = [sys.executable, "-m", "finetune", *command, *([f"output_dir={folder}"] if is_run else [])]
    environment = {**os.environ, "PYTHONPATH": str(checkout)}
    started = time.perf_counter()
    with subprocess.Popen(
        program, cwd=checkout, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        said = ""
        for line in process.stderr:
            said += line
            if is_run and line.startswith("step 1/"):
                seconds = time.perf_counter() - started
                process.kill()
                return seconds
    if is_run or process.returncode != 0:
        raise SystemExit(f"{' '.join(program)} ended with {process.returncode}:\n{said}")
    return time.perf_counter() - started


def measure(checkouts: list[Path], rounds: int) -> dict[str, list[list[float]]]:
    """Seconds of every command in each checkout, taken in turns after one that fills the caches."""
    times: dict[str, list[list[float]]] = {name: [[] for _ in checkouts] for name in COMMANDS}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(-1, rounds):
            for name, command in COMMANDS.items():
                for checkout, own in zip(checkouts, times[name], strict=True):
                    seconds = seconds_of(command, checkout, Path(folder))
                    if number >= 0:
                        own.append(seconds)
    return times


def main() -> None:
    """Measure and print rows of docs/benchmarks.md."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--against", type=Path, metavar="FOLDER", help="another checkout, shown first")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    checkouts = [*([arguments.against.resolve()] if arguments.against else []), ROOT]
    for name, found in measure(checkouts, arguments.rounds).items():
        cells = [f"{statistics.median(own):.2f} s ({min(own):.2f} to {max(own):.2f})" for own in found]
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
