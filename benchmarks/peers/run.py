"""Trains one model with finetune and its peers in turns: `make bench-peers`.

Each peer has an environment of its own and each run a process of its own. All get the same tokenized samples. A row
counts if its held-out loss after training is finetune's within noise. A peer that cannot run is a row that says why.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent
DOCS = HERE.parents[1] / "docs"
START, END = "<!-- peers: begin -->", "<!-- peers: end -->"

# Same model, data, adapter, optimizer (AdamW, no weight decay), constant learning rate, longest row.
SETTINGS: dict[str, Any] = {
    "precision": "bf16",  # of the peers: a CPU without units for bf16 computes it far slower than fp32
    "rank": 8,
    "alpha": 16,
    "lr": 5e-4,
    "max_length": 1024,
    "samples_per_step": 8,
    "packed_rows_per_step": 2,  # of 1,024 tokens: about as many samples
    "litgpt_micro_batch_size": 1,  # its default
    "train_samples": 24,
    "held_out_samples": 16,
}
# Held-out losses (nats a token) may differ by this: another order of samples, and adapters in bf16 at LitGPT.
LOSS_NOISE = 0.05


class Peer(NamedTuple):
    """One row: its environment, script and variant."""

    title: str
    environment: str | None  # None: the one that runs this script
    script: str
    variant: str
    needs_cuda: bool = False


PEERS = {
    "finetune": Peer("finetune", None, "peer_finetune.py", "bf16"),
    "trl": Peer("TRL, its defaults", "trl", "peer_trl.py", "default"),
    "trl_packed": Peer("TRL, packed", "trl", "peer_trl.py", "packed"),
    "litgpt": Peer("LitGPT finetune_lora", "litgpt", "peer_litgpt.py", "default"),
    "unsloth": Peer("Unsloth", "unsloth", "peer_unsloth.py", "default", needs_cuda=True),
    "axolotl": Peer("axolotl, packed", "axolotl", "peer_axolotl.py", "packed", needs_cuda=True),
}


class PeerError(Exception):
    """Why a peer did not run, in one line."""


def last_line(text: str) -> str:
    """The last line that says something."""
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1].strip() if lines else "no message"


def environment_python(name: str, root: Path) -> Path:
    """The Python of a peer's environment, made by pip from `<name>.txt` once per change of that file.

    Raises:
        PeerError: if pip fails.
    """
    folder, wanted = root / name, HERE / f"{name}.txt"
    python, stamp = folder / "bin" / "python", folder / "installed.txt"
    if stamp.is_file() and stamp.read_text() == wanted.read_text():
        return python
    print(f"installing {name} into {folder}", file=sys.stderr)
    for command in (
        [sys.executable, "-m", "venv", "--clear", str(folder)],
        [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-r", str(wanted)],
    ):
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            raise PeerError(f"not installed: {last_line(done.stderr)}")
    stamp.write_text(wanted.read_text())
    return python


def call(python: Path, script: str, task: dict[str, Any], seconds: float) -> dict[str, Any]:
    """The last line that a script prints, given a task.

    Raises:
        PeerError: if it fails or takes longer than `seconds`.
    """
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "256"}
    environment["PYTHONPATH"] = str(HERE.parents[1])
    try:
        done = subprocess.run(
            [str(python), str(HERE / script)],
            input=json.dumps(task),
            capture_output=True,
            text=True,
            env=environment,
            timeout=seconds,
        )
    except subprocess.TimeoutExpired:
        raise PeerError(f"stopped after {seconds:.0f} s") from None
    if done.returncode != 0:
        raise PeerError(last_line(done.stderr))
    result: dict[str, Any] = json.loads(last_line(done.stdout))
    return result


def measure_all(arguments: argparse.Namespace, pythons: dict[str, Path], failures: dict[str, str]) -> dict[str, Any]:
    """Rounds of every peer over every data set, in turns; failures are noted and not tried again."""
    task = {"folder": str(arguments.work), "model": arguments.model, "sources": arguments.sources, "settings": SETTINGS}
    model = call(Path(sys.executable), "prepare.py", task, 600)["model"]
    rounds: dict[str, Any] = {name: {key: [] for key in PEERS} for name in arguments.sources}
    started = time.monotonic()
    for number in range(arguments.rounds):
        for name in arguments.sources:
            for key, peer in PEERS.items():
                if key in failures:
                    continue
                one = {
                    "folder": str(arguments.work),
                    "model": model,
                    "variant": peer.variant,
                    "settings": SETTINGS,
                    "train": str(arguments.work / f"{name}_train.jsonl"),
                    "held_out": str(arguments.work / f"{name}_held_out.jsonl"),
                    "recipe": str(arguments.work / f"{name}_train.rows.yaml"),
                    "overrides": [],
                }
                print(f"round {number + 1}, {name}: {key} ({time.monotonic() - started:.0f} s)", file=sys.stderr)
                try:
                    run = call(pythons[key], peer.script, one, arguments.timeout)
                except PeerError as error:
                    failures[key] = str(error)
                    print(f"  did not run: {error}", file=sys.stderr)
                    continue
                rounds[name][key].append(run)
                speed = run["real_tokens"] / run["seconds"]
                print(f"  {speed:,.0f} tokens/s, held-out loss {run['held_out_loss']:.3f}", file=sys.stderr)
    return rounds


def summary(rounds: dict[str, list[dict[str, Any]]], failures: dict[str, str]) -> list[dict[str, Any]]:
    """One row a peer for one data set: medians, and finetune's speed and memory in relation to it."""
    rows = []
    own = rounds["finetune"]
    for key, runs in rounds.items():
        if not runs or not own:
            rows.append({"peer": PEERS[key].title, "failure": failures.get(key, "did not run")})
            continue
        speeds = [run["real_tokens"] / run["seconds"] for run in runs]
        pairs = zip(own, runs, strict=False)
        ratios = [(a["real_tokens"] / a["seconds"]) / (b["real_tokens"] / b["seconds"]) for a, b in pairs]
        loss = statistics.median(run["held_out_loss"] for run in runs)
        memory = statistics.median(run["peak_memory_bytes"] for run in runs)
        rows.append(
            {
                "peer": PEERS[key].title,
                "tokens_per_second": statistics.median(speeds),
                "tokens_per_second_range": [min(speeds), max(speeds)],
                "finetune_is_faster_by": statistics.median(ratios),
                "finetune_is_faster_by_range": [min(ratios), max(ratios)],
                "peak_memory_bytes": memory,
                "finetune_memory_share": statistics.median(run["peak_memory_bytes"] for run in own) / memory,
                "held_out_loss": loss,
                "counts": abs(loss - statistics.median(run["held_out_loss"] for run in own)) <= LOSS_NOISE,
                "rounds": len(runs),
                "failure": failures.get(key),
            }
        )
    return rows


def versions(python: Path) -> dict[str, str]:
    """Versions of what decides results in an environment."""
    code = (
        "import json, importlib.metadata as m\n"
        "names = 'torch transformers peft trl litgpt lightning unsloth axolotl bitsandbytes'.split()\n"
        "have = {d.metadata['Name'].lower(): d.version for d in m.distributions()}\n"
        "print(json.dumps({n: have[n] for n in names if n in have}))"
    )
    done = subprocess.run([str(python), "-c", code], capture_output=True, text=True, check=True)
    found: dict[str, str] = json.loads(done.stdout)
    return found


def markdown(report: dict[str, Any]) -> str:
    """The report as the section of docs/benchmarks.md."""
    machine, settings = report["machine"], report["settings"]
    lines = [
        f"`{report['command']}`, {report['rounds']} rounds in turns, {report['date']}: {machine['processor']}, "
        f"{machine['threads']} threads, {machine['memory_bytes'] / 1e9:.0f} GB"
        f"{''.join(', ' + gpu for gpu in machine['gpus'])}. {settings['train_samples']} samples in steps of "
        f"{settings['samples_per_step']}, the first step not timed; the peers in {settings['precision']}, finetune in "
        "bf16. Ratios are medians over rounds; memory is a "
        "process's peak; loss is on held-out samples after training, and a row that differs from finetune's by more "
        f"than {LOSS_NOISE} does not count. [Every figure](benchmarks_peers.json).",
        "",
    ]
    for name, rows in report["results"].items():
        lines += [
            f"| {name} | tokens/s | finetune is faster by | peak memory | finetune needs | held-out loss |",
            "|---|---|---|---|---|---|",
        ]
        lines += [_line(row) for row in rows] + [""]
    lines.append("Versions: " + "; ".join(f"{key}: {_named(found)}" for key, found in report["versions"].items()) + ".")
    return "\n".join(lines)


def _named(found: dict[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in found.items())


def _line(row: dict[str, Any]) -> str:
    if "tokens_per_second" not in row:
        return f"| {row['peer']} | not measured: {row['failure'].replace('|', ' ')} | | | | |"
    low, high = row["finetune_is_faster_by_range"]
    ratio = f"{row['finetune_is_faster_by']:.2f} × ({low:.2f} to {high:.2f})" if row["counts"] else "does not count"
    if row["peer"] == PEERS["finetune"].title:
        return (
            f"| **finetune** | {row['tokens_per_second']:,.0f} | | {row['peak_memory_bytes'] / 1e9:.2f} GB | | "
            f"{row['held_out_loss']:.3f} |"
        )
    return (
        f"| {row['peer']} | {row['tokens_per_second']:,.0f} | {ratio} | {row['peak_memory_bytes'] / 1e9:.2f} GB | "
        f"{row['finetune_memory_share']:.0%} | {row['held_out_loss']:.3f} |"
    )


def describe_machine(pythons: dict[str, Path]) -> dict[str, Any]:
    """Processor, threads, memory and GPUs, as finetune's own environment sees them."""
    code = (
        "import json, torch; from finetune.machine import describe_machine; "
        "print(json.dumps({**describe_machine(), 'threads': torch.get_num_threads()}))"
    )
    environment = {**os.environ, "PYTHONPATH": str(HERE.parents[1])}
    done = subprocess.run(
        [str(pythons["finetune"]), "-c", code], capture_output=True, text=True, env=environment, check=True
    )
    machine: dict[str, Any] = json.loads(done.stdout)
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    flags = next((line for line in lines if line.startswith("flags")), "")
    machine["processor"] = (names or [machine["platform"]])[0] + (" with AMX" if "amx_bf16" in flags else "")
    return machine


def faster_precision() -> str:
    """bf16 where there is a GPU or a CPU with units for it, else fp32."""
    code = (
        "import torch; from finetune.kernels.products import has_bf16_units\n"
        "print(torch.cuda.is_available() or has_bf16_units())"
    )
    environment = {**os.environ, "PYTHONPATH": str(HERE.parents[1])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    return "bf16" if last_line(done.stdout) == "True" else "fp32"


def find_pythons(root: Path, chosen: list[str]) -> tuple[dict[str, Path], dict[str, str]]:
    """The Python of every peer, and why others have none."""
    cuda = Path("/proc/driver/nvidia/version").exists()
    pythons: dict[str, Path] = {}
    failures: dict[str, str] = {}
    for key, peer in PEERS.items():
        try:
            if key not in chosen:
                raise PeerError("left out by --peers")
            if peer.needs_cuda and not cuda:
                raise PeerError("needs CUDA")
            python = Path(sys.executable) if peer.environment is None else environment_python(peer.environment, root)
            pythons[key] = python
        except PeerError as error:
            failures[key] = str(error)
    return pythons, failures


def main() -> None:
    """Measure, print the section, and write it with the figures into docs/ where that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="a folder with the two instruction files")
    parser.add_argument("--work", type=Path, default=Path(".bench/peers"), help="samples and converted models")
    parser.add_argument("--environments", type=Path, default=Path(".bench/environments"))
    parser.add_argument("--model", help="a model's directory; default: SmolLM2-135M-Instruct from its package")
    parser.add_argument("--peers", default=",".join(PEERS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--samples", type=int, default=SETTINGS["train_samples"], help="training samples of a run")
    parser.add_argument("--precision", choices=("bf16", "fp32"), help="the peers'; default: what is faster here")
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds that one run may take")
    parser.add_argument("--sources", default="GSM8K,GPTeacher", help="which of the data sets")
    parser.add_argument("--json", type=Path, help="write every figure there")
    parser.add_argument("--write", action="store_true", help="put table and figures into docs/")
    arguments = parser.parse_args()
    SETTINGS["train_samples"] = arguments.samples
    SETTINGS["precision"] = arguments.precision or faster_precision()
    arguments.work = arguments.work.resolve()
    sources = {
        "GSM8K": str(arguments.data / "gsm8k_train.instruction.jsonl"),
        "GPTeacher": str(arguments.data / "gpteacher_codegen.alpaca.jsonl"),
    }
    chosen = arguments.sources.split(",")
    if unknown := [name for name in chosen if name not in sources]:
        parser.error(f"--sources: {', '.join(unknown)} is none of {', '.join(sources)}")
    arguments.sources = {name: sources[name] for name in chosen}
    for file in arguments.sources.values():
        if not Path(file).is_file():
            parser.error(f"--data: no such file: {file}")
    pythons, failures = find_pythons(arguments.environments.resolve(), arguments.peers.split(","))
    rounds = measure_all(arguments, pythons, failures)
    report = {
        "command": "make bench-peers",
        "date": time.strftime("%Y-%m-%d"),
        "rounds": arguments.rounds,
        "settings": SETTINGS,
        "machine": describe_machine(pythons),
        "versions": {PEERS[key].environment or "finetune": versions(python) for key, python in pythons.items()},
        "results": {name: summary(runs, failures) for name, runs in rounds.items()},
        "runs": rounds,
    }
    text = markdown(report)
    print(text)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")
    if arguments.write:
        write_docs(text, report)


def write_docs(text: str, report: dict[str, Any]) -> None:
    """Replace the section between the two marks of docs/benchmarks.md, and the JSON beside it."""
    page = DOCS / "benchmarks.md"
    before, rest = page.read_text().split(START)
    after = rest.split(END)[1]
    page.write_text(f"{before}{START}\n{text}\n{END}{after}")
    (DOCS / "benchmarks_peers.json").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
