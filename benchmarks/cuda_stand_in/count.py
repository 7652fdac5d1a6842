"""What a step of Falcon-7B asks of a GPU, counted on a machine without one.

`PYTHONPATH=. python benchmarks/cuda_stand_in/count.py` with torch's CUDA build, g++ and nm. `runtime.cpp` takes the
place of NVIDIA's runtime: torch allocates, chooses kernels and launches them as on an H200, and nothing is computed. So
launches, synchronizations, the host's time and the peak of torch's allocator are those of the real thing; speed is not.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import re
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import gpu

OVERRIDES = {
    "bf16": [],
    "nf4": ["model.quantization=nf4"],
    "nf4+checkpointing": ["model.quantization=nf4", "training.gradient_checkpointing=true"],
}
HEADERS = ("cuda_runtime_api.h", "cublasLt.h", "nv/target")
COUNTS = ("launches", "products", "synchronizations")
STEPS = 6
SKIPPED = 2  # in which workspaces are made


def build(folder: Path) -> Path:
    """The stand-in as a library, by which the driver's name finds it too."""
    import bitsandbytes
    import torch

    if torch.version.cuda is None:
        raise SystemExit("torch here is built for CPUs; this counts what its CUDA build does")
    places = [
        Path(torch.__file__).parents[1] / "nvidia",
        Path("/usr/local/cuda/include"),
        *Path("/usr/local").glob("cuda-*/include"),
    ]
    headers = [
        next((file.parents[len(Path(name).parts) - 1] for place in places for file in place.rglob(name)), None)
        for name in HEADERS
    ]
    if None in headers:
        raise SystemExit(
            f"no {HEADERS[headers.index(None)]}: pip install nvidia-cuda-runtime nvidia-cublas nvidia-cuda-cccl"
        )
    libraries = [*(Path(torch.__file__).parent / "lib").glob("*.so")]
    libraries += Path(bitsandbytes.__file__).parent.glob(f"*cuda{torch.version.cuda.replace('.', '')}.so")
    objects = [folder / "runtime.o", folder / "empty.o"]
    include = [f"-I{path}" for path in headers]
    run("g++", "-O1", "-fPIC", *include, "-c", str(HERE / "runtime.cpp"), "-o", str(objects[0]))
    asked = {name for path in libraries for name in symbols("--undefined-only", path)}
    cuda = re.compile(r"(__cuda|cuda|cu[A-Z]|cublas)")
    missing = sorted(name for name in asked - set(symbols("--defined-only", objects[0])) if cuda.match(name))
    (folder / "empty.c").write_text("".join(f"int {name}(void) {{ return 0; }}\n" for name in missing))
    run("gcc", "-fPIC", "-fno-builtin", "-c", str(folder / "empty.c"), "-o", str(objects[1]))
    library = folder / "libcuda.so.1"
    run("g++", "-shared", *map(str, objects), "-o", str(library))
    return library


def run(*command: str) -> str:
    """A command's output; its errors end this one."""
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode != 0:
        raise SystemExit(f"{command[0]} ended with {done.returncode}")
    return done.stdout


def symbols(which: str, path: Path) -> list[str]:
    """Names of a library's or an object's dynamic or global symbols."""
    table = "-D" if path.suffix == ".so" else "-g"
    return [line.split()[-1].split("@")[0] for line in run("nm", table, which, str(path)).splitlines()]


def write_sparse_model(folder: Path, shape: dict[str, Any]) -> None:
    """As `gpu.write_model`, but weights are holes in a file: nothing reads them."""
    model = gpu.outline_model(folder, shape)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, parameter in model.named_parameters():
        start, end = end, end + 2 * parameter.numel()
        header[name] = {"dtype": "BF16", "shape": list(parameter.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)


def work(recipe: str, overrides: list[str], library: str) -> None:
    """In a process of its own: train a few steps and print what they asked for."""
    import torch

    from finetune.cli import main
    from finetune.training.module import FinetuneModule

    torch.backends.cuda.enable_cudnn_sdp(False)  # no stand-in has been written for it
    read = ctypes.CDLL(library).stand_in_counts
    train = FinetuneModule.training_step
    steps: list[dict[str, float]] = []

    def counts() -> list[float]:
        found = (ctypes.c_long * len(COUNTS))()
        read(found)
        return [*found, time.process_time()]

    def training_step(module: Any, batch: Any, index: int) -> None:
        before = counts()
        train(module, batch, index)
        found = [after - earlier for after, earlier in zip(counts(), before, strict=True)]
        rows = len(batch.micro_batches)
        steps.append(dict(zip((*COUNTS, "host_seconds"), found, strict=True)) | {"rows": rows})

    FinetuneModule.training_step = training_step  # type: ignore[method-assign]
    settings = [f"training.max_steps={STEPS}", "evaluation.metrics=[]", "evaluation.num_samples=0"]
    if code := main(["run", recipe, *settings, *overrides]):
        raise SystemExit(code)
    print(json.dumps({"steps": steps[SKIPPED:], "peak_bytes": torch.cuda.max_memory_allocated()}))


def count(folder: Path, variant: str, recipe: Path, library: Path) -> str:
    """A row of docs/benchmarks.md."""
    environment = {**os.environ, "LD_PRELOAD": str(library), "LD_LIBRARY_PATH": str(folder), "HF_HUB_OFFLINE": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(HERE.parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])])
    overrides = [f"name={variant.replace('+', '-')}", *OVERRIDES[variant]]
    command = [sys.executable, __file__, "--work", str(recipe), str(library), *overrides]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True)
    if done.returncode != 0:
        raise SystemExit(f"{variant} ended with {done.returncode}")
    found = json.loads(done.stdout.splitlines()[-1])
    steps = found["steps"]
    rows = sum(step["rows"] for step in steps)
    layers = rows * gpu.FALCON_7B["num_hidden_layers"]
    launches, products, waits = (sum(step[name] for step in steps) for name in COUNTS)
    host = min(step["host_seconds"] / step["rows"] for step in steps)
    return (
        f"| {gpu.VARIANTS[variant]} | {launches / layers:.0f}, {products / layers:.0f} of them products | "
        f"{waits / len(steps):.0f} | {host * 1e3:.0f} ms | {found['peak_bytes'] / 1e9:.1f} GB |"
    )


def main() -> None:
    """Count and print rows of docs/benchmarks.md."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        recipe, library, *overrides = arguments.work
        work(recipe, overrides, library)
        return
    with tempfile.TemporaryDirectory(prefix="finetune-count-") as name:
        folder = Path(name)
        library = build(folder)
        model = folder / "model"
        model.mkdir()
        write_sparse_model(model, gpu.FALCON_7B)
        words = gpu.write_tokenizer(model, gpu.FALCON_7B["vocab_size"])
        with (folder / "rows.jsonl").open("w") as file:
            file.writelines(json.dumps(row) + "\n" for row in gpu.alpaca_like_rows(words, 2_000))
        recipe = gpu.write_recipe(folder, model, "cuda")
        print("| | launches a layer and row | waits a step | host's time a row | peak memory |\n|---|---|---|---|---|")
        for variant in OVERRIDES:
            print(count(folder, variant, recipe, library), flush=True)


if __name__ == "__main__":
    main()
