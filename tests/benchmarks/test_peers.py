"""What the comparison with peers makes of its measurements; `make bench-peers` installs the peers themselves."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.scripts import ROOT, load_script
from tests.tiny import alpaca_rows, write_jsonl, write_model

FOLDER = ROOT / "benchmarks" / "peers"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script("benchmarks/peers/run.py")


def one(tokens: int, seconds: float, memory: float, loss: float) -> dict[str, Any]:
    return {"real_tokens": tokens, "seconds": seconds, "peak_memory_bytes": memory, "held_out_loss": loss}


def test_ratios_are_medians_over_rounds_and_a_wrong_loss_does_not_count(script: ModuleType) -> None:
    runs: dict[str, list[dict[str, Any]]] = {key: [] for key in script.PEERS}
    runs["finetune"] = [one(100, 1.0, 1e9, 1.30), one(100, 2.0, 1e9, 1.30), one(100, 1.0, 1e9, 1.30)]
    runs["trl"] = [one(100, 4.0, 2e9, 1.31), one(100, 4.0, 2e9, 1.31), one(100, 3.0, 2e9, 1.31)]
    runs["litgpt"] = [one(100, 4.0, 4e9, 1.40)]
    rows = {row["peer"]: row for row in script.summary(runs, {"unsloth": "needs an NVIDIA GPU"})}
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
    assert "| Unsloth | did not run: needs an NVIDIA GPU |" in text


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
