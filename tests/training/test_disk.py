"""Which file system is asked for what, and what the Hub's cache already holds."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from finetune.findings import Finding
from finetune.models.sources import ModelSource
from finetune.models.weights import WeightBytes
from finetune.training import disk
from finetune.training.strategy import Placement
from tests.models.test_memory import recipe
from tests.tiny import write_model

WEIGHTS = WeightBytes(300, 100, 200, 10, ((4, 4),), 10**6, 3)
HUB = ModelSource("acme/base", "acme/base", None)
GPU, CPU = Placement("cuda", 1, 1, "single"), Placement("cpu", 1, 1, "single")
FREE = {"runs": 10**4, "hub": 1_500_000, "cache": 10**4}


@pytest.fixture(autouse=True)
def _three_disks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in FREE:
        (tmp_path / name).mkdir()
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(disk, "file_system", lambda folder: list(FREE).index(folder.name))
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=FREE[Path(folder).name]))


def room(folder: Path, source: ModelSource, placement: Placement = GPU, **sections: Any) -> dict[str, Finding]:
    """What is found, by the name of the disk."""
    made = recipe(**sections).model_copy(update={"output_dir": str(folder / "runs" / "mine")})
    found = disk.find_room(made, source, WEIGHTS, placement)
    return {Path(finding.values["folder"]).name: finding for finding in found}


def keep(folder: Path, *names: str) -> None:
    """Files of a snapshot in the Hub's cache."""
    snapshot = folder / "hub" / "models--acme--base" / "snapshots" / "abc"
    snapshot.mkdir(parents=True, exist_ok=True)
    refs = snapshot.parents[1] / "refs"
    refs.mkdir(exist_ok=True)
    (refs / "main").write_text("abc")
    index = {"weight_map": {"one": "a.safetensors", "two": "b.safetensors"}}
    for name in names:
        (snapshot / name).write_text(json.dumps(index) if name.endswith(".json") else "")


def test_the_hub_s_cache_is_asked_for_what_it_lacks(tmp_path: Path) -> None:
    found = room(tmp_path, HUB)
    assert set(found) == {"runs", "hub"} and found["runs"].level == "fact"
    assert found["hub"].level == "error" and found["hub"].values["needed_bytes"] == 2 * 10**6
    assert "2.0 MB" not in found["runs"].text and "weights to download" in found["hub"].text
    keep(tmp_path, "model.safetensors.index.json", "a.safetensors")
    found = room(tmp_path, HUB)
    assert found["hub"].level == "fact" and found["hub"].values["needed_bytes"] == 10**6
    keep(tmp_path, "b.safetensors")
    assert set(room(tmp_path, HUB)) == {"runs"}


def test_a_whole_file_in_the_hub_s_cache_is_no_download(tmp_path: Path) -> None:
    keep(tmp_path, "model.safetensors")
    assert set(room(tmp_path, HUB)) == {"runs"}


def test_one_file_system_holds_the_sum(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "file_system", lambda folder: 1)
    (found,) = room(tmp_path, HUB).values()
    assert found.level == "error"
    assert "of checkpoints, 2 MB of weights to download, but only 0 MB are free" in found.text


def test_copies_of_the_base_go_to_our_cache(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", "llama")
    local = ModelSource("model", str(folder), None)
    assert set(room(tmp_path, local)) == {"runs"}
    quantized = {"model": {"quantization": "nf4"}}
    assert room(tmp_path, local, CPU, **quantized)["cache"].values["needed_bytes"] == 510
    assert (
        "weights as fsdp maps them" in room(tmp_path, local, Placement("cuda", 2, 1, "fsdp"), **quantized)["cache"].text
    )
    (folder / "model.safetensors").unlink()  # as a GGUF file's header leaves it
    found = room(tmp_path, local)["cache"]
    assert found.level == "error" and found.values["needed_bytes"] == 2 * 10**6
