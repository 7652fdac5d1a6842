"""A run whose base is on the Hub: it is that base ever after, whatever of it lies on this machine."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from finetune.cli import main
from tests.export.push_run import hub
from tests.hub_double import HubDouble
from tests.tiny import alpaca_rows, tiny_recipe, write_jsonl, write_model, write_recipe

assert hub  # a fixture
BASE = "acme/base"


def add_commit(hub: HubDouble, changes: dict[str, bytes]) -> None:
    repository = hub.repositories["models", BASE]
    repository.add("a commit", repository.commits[-1].tree | {path: hub.store(changes[path], path) for path in changes})


def test_what_follows_a_run_from_an_empty_cache_is_accepted(
    hub: HubDouble, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    hub.add_repository(BASE, write_model(tmp_path / "files", "llama"))
    values = tiny_recipe(
        tmp_path,
        Path(BASE),
        write_jsonl(tmp_path / "rows.jsonl", alpaca_rows(24, longest=4)),
        data={"validation": {"size": 4}},
        checkpoint={"every_steps": 2},
        evaluation={"metrics": ["perplexity"]},
    )
    recipe, run = write_recipe(tmp_path / "recipe.json", values), tmp_path / "runs" / "tiny"

    def err(*arguments: str, code: int = 0) -> str:
        assert main([*arguments]) == code
        return capsys.readouterr().err

    err("run", str(recipe))
    assert "this run is finished" in err("run", str(recipe))
    # Preempted at step 2, on a machine that has nothing of the base.
    shutil.rmtree(run / "checkpoints" / "step-000004")
    (run / "results.json").unlink()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "another"))
    add_commit(hub, {"README.md": b"of another commit"})
    assert "continuing from step 2 of 4" in err("run", str(recipe))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "third"))
    err("merge", str(run))
    err("evaluate", str(run))
    write_model(tmp_path / "files", "llama", seed=1)
    add_commit(hub, {"model.safetensors": (tmp_path / "files" / "model.safetensors").read_bytes()})
    assert "the base model acme/base: its files are others than at the checkpoint" in err("run", str(recipe), code=2)
    for verb in (["merge"], ["evaluate"], ["generate", "--prompt", "count"]):
        said = err(verb[0], str(run), *verb[1:], code=2)
        assert "is not the base that the adapter was trained on" in said and "set model.revision" in said


def test_an_adapter_names_its_base_on_the_hub_and_no_copy_of_this_machine(
    hub: HubDouble, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    hub.add_repository(BASE, write_model(tmp_path / "files", "llama"))
    rows = write_jsonl(tmp_path / "rows.jsonl", alpaca_rows(8, longest=4))
    values = tiny_recipe(tmp_path, Path(BASE), rows, model={"quantization": "nf4"}, checkpoint={"every_steps": 2})
    assert main(["run", str(write_recipe(tmp_path / "recipe.json", values))]) == 0
    written = list((tmp_path / "runs" / "tiny").rglob("adapter_config.json"))
    assert len(written) > 1
    assert {json.loads(path.read_text())["base_model_name_or_path"] for path in written} == {BASE}
