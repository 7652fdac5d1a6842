"""`finetune merge` on runs that were really trained: the check, what it refuses, and what it leaves behind."""

from __future__ import annotations

import json
import os
import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from finetune.cli import main
from finetune.commands import merge as command
from finetune.export import check_merge, check_streamed
from finetune.export.check_merge import Drift, MergeCheck, find_fault
from finetune.models.adapters import WEIGHTS_NAME
from finetune.models.streamed import NotStreamableError
from finetune.recipe.schema import MergeSection
from tests.tiny import chat_rows, tiny_recipe, write_jsonl, write_model, write_recipe


def train(folder: Path, **model: Any) -> Path:
    """The directory of a finished run on a tiny model."""
    base = write_model(folder / "base", "tied_llama")
    data = write_jsonl(folder / "train.jsonl", chat_rows(48))
    recipe = tiny_recipe(
        folder,
        base,
        data,
        model={"compute_dtype": "fp32", **model},
        data={"validation": {"size": 6}},
        training={"max_steps": 8, "optimizer": {"lr": 3e-2}},
        evaluation={"metrics": ["perplexity", "token_f1"], "max_new_tokens": 4},
    )
    assert main(["run", str(write_recipe(folder / "recipe.json", recipe))]) == 0
    return folder / "runs" / "tiny"


@pytest.fixture(scope="module")
def plain_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def quantized_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("quantized"), quantization="nf4")


@pytest.fixture
def own_run(plain_run: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(plain_run, tmp_path / "run"))


def read_record(folder: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((folder / "merge.json").read_text())
    return record


def test_fm05_merge_checks_what_it_has_written(plain_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["merge", str(plain_run)]) == 0
    out, err = capsys.readouterr()
    assert str(plain_run / "merged") in out
    assert "6 validation rows" in err and "bare base" in err and "original" in err
    record = read_record(plain_run / "merged")
    assert record["usable"] and record["base"] == "original" and record["check"]["other"] is None
    assert record["check"]["merged"]["kl"] < 1e-6 and record["check"]["merged"]["agreement"] == 1.0
    assert record["check"]["bare"]["kl"] > 0.01
    assert len(record["weights"]) == 14 and record["weights"][0]["steps"][0]["scale"] == 2.0
    assert not (plain_run / "merged" / "UNUSABLE.md").exists()
    for folder in (plain_run / "adapter", plain_run / "merged"):
        settings = json.loads((folder / "tokenizer_config.json").read_text())
        assert settings["tokenizer_class"] == "PreTrainedTokenizerFast" and "is_local" not in settings
    # Nothing temporary stays, and merging again replaces.
    assert main(["merge", str(plain_run)]) == 0
    assert not [path.name for path in plain_run.iterdir() if path.name.startswith(".merged")]


def test_fm06_both_bases_are_reported(quantized_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["merge", str(quantized_run)]) == 0
    record = read_record(quantized_run / "merged")
    assert (record["base"], record["check"]["other_base"]) == ("dequantized", "original")
    assert record["check"]["merged"]["kl"] < 1e-6 < 1e-4 < record["check"]["other"]["kl"]
    err = capsys.readouterr().err
    assert "merged (dequantized)" in err and "merged (original)" in err


def test_drift_over_the_bound_is_marked(
    quantized_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Path(shutil.copytree(quantized_run, tmp_path / "run"))
    recipe = run / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("max_kl_original: 0.1", "max_kl_original: 1.0e-5"))
    assert main(["merge", str(run), "--base", "original", "--out", str(tmp_path / "out")]) == 1
    assert "above merge.max_kl_original 1e-05" in capsys.readouterr().err
    assert "--base dequantized" in (tmp_path / "out" / "UNUSABLE.md").read_text()
    record = read_record(tmp_path / "out")
    assert not record["usable"] and record["check"]["other"]["kl"] < 1e-6
    # The same figures from the other side: what is measured in memory is what would be written.
    assert main(["merge", str(run), "--out", str(tmp_path / "out")]) == 0
    assert read_record(tmp_path / "out")["check"]["other"]["kl"] == pytest.approx(
        record["check"]["merged"]["kl"], rel=1e-3
    )
    assert not (tmp_path / "out" / "UNUSABLE.md").exists()
    # One that may be used is not lost to one that may not.
    assert main(["merge", str(run), "--base", "original", "--out", str(tmp_path / "out")]) == 1
    assert f"{tmp_path / 'out'} is as it was" in capsys.readouterr().err
    assert read_record(tmp_path / "out")["usable"] and not (tmp_path / "out" / "UNUSABLE.md").exists()
    assert (tmp_path / "out-unusable" / "UNUSABLE.md").is_file()


def test_fm05_an_adapter_that_changes_nothing_is_said(own_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = own_run / "adapter" / WEIGHTS_NAME
    state = {name: tensor * (0 if "lora_B" in name else 1) for name, tensor in load_file(path).items()}
    save_file(state, path)
    assert main(["merge", str(own_run)]) == 1
    assert "the adapter changes nothing" in capsys.readouterr().err


@pytest.mark.parametrize("where", ["adapter", "merged"])
def test_what_cannot_be_checked_by_layers_is_loaded_whole(
    quantized_run: Path, tmp_path: Path, monkeypatch: Any, capsys: pytest.CaptureFixture[str], where: str
) -> None:
    assert main(["merge", str(quantized_run), "--out", str(tmp_path / "streamed")]) == 0
    assert "loaded whole" not in capsys.readouterr().err

    def refuse(*_: Any, **__: Any) -> None:
        raise NotStreamableError("it is odd")

    monkeypatch.setattr(check_streamed, f"stream_{where}", refuse)
    assert main(["merge", str(quantized_run), "--out", str(tmp_path / "whole")]) == 0
    err = capsys.readouterr().err
    assert err.count("is loaded whole for the check, because it is odd") == 1
    streamed, whole = (read_record(tmp_path / name)["check"] for name in ("streamed", "whole"))
    assert streamed == whole


def test_what_others_wrote_is_not_replaced(plain_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    assert main(["merge", str(plain_run), "--out", str(tmp_path)]) == 2
    assert "no merge has written" in capsys.readouterr().err
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_full_disk_is_said_before_anything_is_written(
    plain_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10, 10, 1000))
    assert main(["merge", str(plain_run), "--out", str(tmp_path / "out")]) == 1
    assert "0.0 GB are free" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


def test_a_kill_half_way_leaves_the_old_model(own_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(["merge", str(own_run)]) == 0
    before = (own_run / "merged" / "merge.json").read_text()

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "_check", stop)
    assert main(["merge", str(own_run), "--dtype", "bf16"]) != 0
    assert (own_run / "merged" / "merge.json").read_text() == before
    assert not [path.name for path in own_run.iterdir() if path.name.startswith(".merged")]


def test_a_base_that_has_changed_is_refused(own_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = own_run / "adapter" / "fingerprints.json"
    fingerprints = json.loads(path.read_text())
    fingerprints["base"]["sha256"] = "0" * 64
    path.write_text(json.dumps(fingerprints))
    for verb in (["merge"], ["evaluate"], ["generate", "--prompt", "count"]):
        assert main([verb[0], str(own_run), *verb[1:]]) == 2
        assert "is not the base that the adapter was trained on" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (WEIGHTS_NAME, f"{WEIGHTS_NAME}: cannot be read as an adapter: Error while deserializing header"),
        ("fingerprints.json", "fingerprints.json: is damaged, so the adapter's base cannot be told"),
    ],
)
def test_a_cut_file_of_the_adapter_is_named(name: str, said: str, own_run: Path, capsys: Any) -> None:
    path = own_run / "adapter" / name
    os.truncate(path, path.stat().st_size // 2)
    assert main(["merge", str(own_run)]) == 2
    error = capsys.readouterr().err
    assert said in error and "Traceback" not in error


def test_without_the_data_built_in_questions_are_used(
    own_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = own_run / "recipe.yaml"
    text = recipe.read_text()
    line = next(line for line in text.splitlines() if "train.jsonl" in line)
    recipe.write_text(text.replace(line, line.replace("train.jsonl", "gone.jsonl")))
    alone = own_run / "adapter"
    shutil.copy(recipe, alone / "recipe.yaml")
    assert main(["merge", str(alone)]) == 0
    assert "built-in questions" in capsys.readouterr().err
    # Of a run's final adapter, so it is the run's merged model.
    assert read_record(own_run / "merged")["check"]["num_samples"] == 4


def test_a_run_without_an_adapter(own_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(own_run / "adapter")
    shutil.rmtree(own_run / "checkpoints")
    assert main(["merge", str(own_run)]) == 2
    assert "holds no adapter" in capsys.readouterr().err


OWN = Drift(0.001, 1.0)


def drift(kl: float, agreement: float = 1.0, *, original: Drift | None = None) -> MergeCheck:
    return MergeCheck(
        "rows",
        1,
        1,
        "original",
        original is None,
        Drift(kl, agreement),
        Drift(0.5, 0.1),
        None if original is None else "dequantized",
        original,
    )


@pytest.mark.parametrize(
    ("check", "fault"),
    [
        (drift(0.001), None),
        (drift(0.02), "above merge.max_kl 0.01"),
        (drift(0.02, original=OWN), None),
        (drift(0.02, original=Drift(0.02, 1.0)), "even on the dequantized base"),
        (drift(0.2, original=OWN), "above merge.max_kl_original 0.1"),
        (drift(0.001, 0.5), "below merge.min_agreement 90.0%"),
        (drift(0.001, 0.5, original=OWN), "below merge.min_agreement 90.0%; merge into what it was trained on"),
        (drift(0.6), "the adapter is not in it"),
        (drift(float("nan")), "the adapter is not in it"),
    ],
)
def test_what_counts_as_a_fault(check: MergeCheck, fault: str | None) -> None:
    found = find_fault(check, MergeSection())
    assert found is None if fault is None else fault in str(found)


def test_positions_predict_supervised_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    ids, supervised = torch.arange(10), torch.tensor([1, 0, 0, 1, 1, 0, 0, 0, 0, 1], dtype=torch.bool)
    sample: Callable[..., Any] = check_merge._sample
    assert sample(ids, supervised).positions.tolist() == [2, 3, 8]
    monkeypatch.setattr(check_merge, "MAX_POSITIONS", 2)
    assert sample(ids, supervised).positions.tolist() == [2, 8]
    assert sample(ids, torch.zeros(10, dtype=torch.bool)) is None


def test_batches_do_not_change_log_probabilities(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoModelForCausalLM

    from tests.tiny import CONFIGS

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS["llama"]()).eval()
    samples = [check_merge.CheckSample(torch.arange(3, 3 + n), torch.tensor([0, n - 1])) for n in (9, 4, 17)]
    together = list(check_merge.log_probs(model, samples))
    monkeypatch.setattr(check_merge, "MAX_BATCH_TOKENS", 1)
    for one, other in zip(check_merge.log_probs(model, samples), together, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
