"""What the comparison with peers makes of its measurements; `make bench-peers` installs the peers themselves."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.utils.data import SequentialSampler
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    Trainer,
    TrainingArguments,
)

from tests.scripts import ROOT, load_script
from tests.tiny import alpaca_rows, write_jsonl, write_model

FOLDER = ROOT / "benchmarks" / "peers"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script("benchmarks/peers/run.py")


@pytest.fixture
def peers(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """Loads a file of the folder, which finds its neighbours as it does when it is run."""
    monkeypatch.syspath_prepend(str(FOLDER))
    return lambda name: load_script(f"benchmarks/peers/{name}.py")


def one(tokens: int, seconds: float, memory: float, loss: float) -> dict[str, Any]:
    return {"real_tokens": tokens, "seconds": seconds, "peak_memory_bytes": memory, "held_out_loss": loss}


def test_ratios_are_medians_over_rounds_and_a_wrong_loss_does_not_count(script: ModuleType) -> None:
    runs: dict[str, list[dict[str, Any]]] = {key: [] for key in script.PEERS}
    runs["finetune"] = [one(100, 1.0, 1e9, 1.30), one(100, 2.0, 1e9, 1.30), one(100, 1.0, 1e9, 1.30)]
    runs["trl"] = [one(100, 4.0, 2e9, 1.31), one(100, 4.0, 2e9, 1.31), one(100, 3.0, 2e9, 1.31)]
    runs["litgpt"] = [one(100, 4.0, 4e9, 1.40)]
    rows = {row["peer"]: row for row in script.summary(runs, {"unsloth": "needs CUDA"})}
    trl, litgpt = rows["TRL, its defaults"], rows["LitGPT finetune_lora"]
    assert trl["finetune_is_faster_by"] == 3.0 and trl["finetune_is_faster_by_range"] == [2.0, 4.0]
    assert trl["finetune_memory_share"] == 0.5 and trl["counts"]
    assert not litgpt["counts"]
    report = {
        "command": "make bench-peers",
        "date": "2026-01-01",
        "rounds": 3,
        "settings": script.SETTINGS,
        "machine": {"processor": "x", "threads": 2, "memory_bytes": 8e9, "gpus": []},
        "results": {"GSM8K": list(rows.values())},
        "versions": {"trl": {"trl": "1.0"}},
    }
    text = script.markdown(report)
    assert "3.00 × (2.00 to 4.00)" in text and "| does not count |" in text
    assert "| Unsloth | not measured: needs CUDA |" in text


def test_a_peer_that_fails_says_why(script: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(script.PeerError, match=r"No such file|not enough values|Error"):
        script.call(Path(sys.executable), "peer_finetune.py", {"recipe": str(tmp_path / "none.yaml")}, 60)


@pytest.mark.slow
def test_samples_are_the_same_for_all_and_finetune_trains_on_them(script: ModuleType, tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", "llama")
    rows = write_jsonl(tmp_path / "rows.jsonl", alpaca_rows(40))
    settings = {**script.SETTINGS, "max_length": 128, "train_samples": 24, "held_out_samples": 8}
    task = {"folder": str(tmp_path / "work"), "model": str(model), "sources": {"rows": str(rows)}, "settings": settings}
    assert script.call(Path(sys.executable), "prepare.py", task, 120)["model"] == str(model)
    samples = [json.loads(line) for line in (tmp_path / "work" / "rows_train.jsonl").read_text().splitlines()]
    assert len(samples) == 24
    assert all(len(one["labels"]) == len(one["input_ids"]) and one["labels"][0] == -100 for one in samples)
    result = script.call(
        Path(sys.executable),
        "peer_finetune.py",
        {
            "recipe": str(tmp_path / "work" / "rows_train.rows.yaml"),
            "overrides": [],
            "held_out": str(tmp_path / "work" / "rows_held_out.jsonl"),
        },
        120,
    )
    assert result["steps"] == 2 and result["held_out_loss"] > 0
    assert result["real_tokens"] < sum(len(one["input_ids"]) for one in samples)


def test_the_requirements_of_every_environment_are_pinned(script: ModuleType) -> None:
    for name in {peer.environment for peer in script.PEERS.values()} - {None}:
        lines = (FOLDER / f"{name}.txt").read_text().split()
        assert lines and all("==" in line for line in lines)


def test_every_peer_has_its_script_and_environment(script: ModuleType) -> None:
    for peer in script.PEERS.values():
        assert (FOLDER / peer.script).is_file()
        assert peer.environment is None or (FOLDER / f"{peer.environment}.txt").is_file()


@pytest.mark.skipif(Path("/proc/driver/nvidia/version").exists(), reason="there is a GPU")
def test_without_cuda_what_needs_it_is_listed_and_nothing_is_installed(script: ModuleType, tmp_path: Path) -> None:
    pythons, failures = script.find_pythons(tmp_path, ["finetune", "unsloth", "axolotl"])
    assert list(pythons) == ["finetune"] and not list(tmp_path.iterdir())
    assert failures["unsloth"] == failures["axolotl"] == "needs CUDA"
    assert failures["trl"] == "left out by --peers"
    rows = script.summary({key: [] for key in script.PEERS}, failures)
    assert script._line(rows[-1]) == "| axolotl, packed | not measured: needs CUDA | | | | |"


@pytest.mark.parametrize("name", ["unsloth", "axolotl"])
def test_a_peer_that_is_not_installed_says_so(script: ModuleType, tmp_path: Path, name: str) -> None:
    if importlib.util.find_spec(name) is not None:
        pytest.skip(f"{name} is installed here")
    task = {"folder": str(tmp_path), "model": "x", "settings": script.SETTINGS, "train": "x", "held_out": "x"}
    with pytest.raises(script.PeerError, match=f"ModuleNotFoundError: No module named '{name}"):
        script.call(Path(sys.executable), script.PEERS[name].script, task, 60)


def test_axolotl_gets_the_common_settings_and_rows_that_it_takes_for_tokenized(
    script: ModuleType, peers: Callable[[str], ModuleType], tmp_path: Path
) -> None:
    peer = peers("peer_axolotl")
    settings = {**script.SETTINGS, "rank": 12, "alpha": 48, "lr": 3e-4, "max_length": 256, "packed_rows_per_step": 3}
    config = peer.config_of({"model": "/models/base", "settings": settings}, tmp_path)
    shared = {"base_model": "/models/base", "lora_r": 12, "lora_alpha": 48, "learning_rate": 3e-4, "sequence_len": 256}
    assert shared.items() <= config.items()
    assert config["sample_packing"] and config["lora_target_linear"] and config["bf16"]
    assert config["micro_batch_size"] * config["gradient_accumulation_steps"] == 3
    (data,) = config["datasets"]
    assert "type" not in data, "a prompt type would make it tokenize again"
    samples = [{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}, {"input_ids": [8], "labels": [8]}]
    peer.write_rows(samples, Path(data["path"]))
    rows = [json.loads(line) for line in Path(data["path"]).read_text().splitlines()]
    assert rows == [{**samples[0], "attention_mask": [1, 1, 1]}, {**samples[1], "attention_mask": [1]}]


def test_packed_samples_are_counted_one_by_one(peers: Callable[[str], ModuleType]) -> None:
    def collate(rows: list[list[dict[str, list[int]]]]) -> dict[str, torch.Tensor]:
        return {"input_ids": torch.zeros(len(rows), 8)}

    count = peers("hf_trainer").CountingCollator(collate)
    count([[{"input_ids": [1, 2, 3]}, {"input_ids": [4, 5]}], [{"input_ids": [6]}]])
    assert count.real == [6] and count.computed == [16]


class InOrder(Trainer):
    """Samples as they come, so that a test knows which are in the first step."""

    def _get_train_sampler(self, train_dataset: Any = None) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)  # type: ignore[arg-type]


def in_order(folder: Path, samples: list[dict[str, list[int]]], **arguments: Any) -> Trainer:
    """A trainer of a tiny model: batches of two, two of them a step."""
    model = AutoModelForCausalLM.from_pretrained(write_model(folder / "model", "llama"))
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    values: dict[str, Any] = {
        "output_dir": str(folder / "out"),
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "num_train_epochs": 1,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    collator = DataCollatorForSeq2Seq(tokenizer)
    return InOrder(model, TrainingArguments(**values, **arguments), collator, samples)  # type: ignore[arg-type]


@pytest.mark.skipif(torch.cuda.is_available(), reason="the figures of a CPU")
def test_a_trainers_run_is_measured_without_its_first_step(
    peers: Callable[[str], ModuleType], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lengths = [5, 9, 4, 4, 7, 3, 8, 6, 2, 5]
    samples = [{"input_ids": list(range(3, 3 + n)), "labels": [-100, *range(4, 3 + n)]} for n in lengths]
    held_out = write_jsonl(tmp_path / "held_out.jsonl", samples[:3])
    trainer = in_order(tmp_path, samples)
    module = peers("hf_trainer")
    result = module.train_and_measure(trainer, str(held_out))
    # Steps of four samples: 4, 4 and the last 2. Pairs are padded to the longer one.
    assert result["steps"] == 2 and len(result["losses"]) == 3 and result["seconds"] > 0
    assert result["real_tokens"] == sum(lengths[4:])
    assert result["computed_tokens"] == 2 * (7 + 8 + 5)
    losses, count = 0.0, 0
    for sample in samples[:3]:
        batch = {key: torch.tensor([value]) for key, value in sample.items()}
        losses += trainer.model(**batch).loss.item() * (len(sample["input_ids"]) - 1)
        count += len(sample["input_ids"]) - 1
    assert result["held_out_loss"] == pytest.approx(losses / count, abs=5e-3)  # it computes in bf16
    capsys.readouterr()
    module.measure.report(**result)
    assert json.loads(capsys.readouterr().out) == result


def test_a_loader_with_workers_cannot_be_counted(peers: Callable[[str], ModuleType], tmp_path: Path) -> None:
    trainer = in_order(tmp_path, [{"input_ids": [3, 4], "labels": [3, 4]}], dataloader_num_workers=1)
    with pytest.raises(ValueError, match="has workers"):
        peers("hf_trainer").train_and_measure(trainer, "none.jsonl")
