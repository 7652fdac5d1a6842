"""Training that goes on from an adapter with new data: `adapter.start_from`."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from finetune.cli import main
from finetune.export.hub_provenance import compare_fingerprints
from finetune.models.adapters import CONFIG_NAME, WEIGHTS_NAME
from finetune.run_dir import RunDir
from finetune.training.metrics import read_metrics
from tests.tiny import tiny_recipe, write_recipe
from tests.training.conftest import RunTiny

FAST = {"max_steps": 4, "optimizer": {"lr": 1e-2}}
STILL = {"max_steps": 1, "optimizer": {"lr": 1e-12}}


@pytest.fixture(scope="module")
def trained(model_dir: Callable[[str], Path], rows: Path, tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    folder = tmp_path_factory.mktemp("first")
    recipe = tiny_recipe(folder, model_dir("llama"), rows, name="first", training=FAST)
    assert main(["run", str(write_recipe(folder / "first.yaml", recipe))]) == 0
    return RunDir(folder / "runs" / "first")


@pytest.fixture
def first(trained: RunDir, tmp_path: Path) -> RunDir:
    """A run of the test's own, which it may change."""
    shutil.copytree(trained.root, tmp_path / "first")
    return RunDir(tmp_path / "first")


def losses(run: RunDir) -> list[float]:
    return [float(row["loss"] or 0.0) for row in read_metrics(run.metrics)]


@pytest.mark.parametrize("what", ["run", "adapter", "checkpoint", "another program's"])
def test_a_run_starts_from_an_adapter(what: str, first: RunDir, run_tiny: RunTiny, tmp_path: Path) -> None:
    folders = {"run": first.root, "adapter": first.adapter, "checkpoint": first.checkpoints / "step-000004"}
    if what not in folders:
        folders[what] = tmp_path / "foreign"
        folders[what].mkdir()
        for name in (CONFIG_NAME, WEIGHTS_NAME):
            shutil.copyfile(first.adapter / name, folders[what] / name)
    second = run_tiny(name="second", training=STILL, adapter={"start_from": str(folders[what])})
    want, got = (load_file(run.adapter / WEIGHTS_NAME) for run in (first, second))
    assert want.keys() == got.keys()
    for name, tensor in want.items():
        torch.testing.assert_close(got[name], tensor, rtol=1e-6, atol=1e-9)
    assert losses(second)[0] < 0.99 * losses(first)[0]


def test_it_is_resumed_from_its_own_checkpoint_and_refuses_another_start(
    first: RunDir, run_tiny: RunTiny, capsys: pytest.CaptureFixture[str]
) -> None:
    sections: dict[str, Any] = {"adapter": {"start_from": str(first.adapter)}, "checkpoint": {"every_steps": 1}}
    second = run_tiny(name="second", training=FAST, **sections)
    want = (second.adapter / WEIGHTS_NAME).read_bytes()
    for path in (second.checkpoints / "step-000004", second.adapter):
        shutil.rmtree(path)
    run_tiny(name="second", training=FAST, **sections)
    assert (second.adapter / WEIGHTS_NAME).read_bytes() == want
    save_file(
        {name: 2 * tensor for name, tensor in load_file(first.adapter / WEIGHTS_NAME).items()},
        first.adapter / WEIGHTS_NAME,
    )
    capsys.readouterr()
    run_tiny(name="second", training=FAST, expect=2, **sections)
    assert "the adapter that it starts from: its weights are others than at the checkpoint" in capsys.readouterr().err


def test_a_run_goes_on_where_its_start_is_gone_or_elsewhere(first: RunDir, run_tiny: RunTiny, tmp_path: Path) -> None:
    sections: dict[str, Any] = {"training": FAST, "checkpoint": {"every_steps": 1}}
    second = run_tiny(name="second", adapter={"start_from": str(first.root)}, **sections)
    want = (second.adapter / WEIGHTS_NAME).read_bytes()
    first.root.rename(tmp_path / "elsewhere")
    for start in (first.root, tmp_path / "elsewhere"):
        for path in (second.checkpoints / "step-000004", second.adapter):
            shutil.rmtree(path)
        run_tiny(name="second", adapter={"start_from": str(start)}, **sections)
        assert (second.adapter / WEIGHTS_NAME).read_bytes() == want


def test_before_is_the_bare_base(first: RunDir, run_tiny: RunTiny) -> None:
    evaluation = {"metrics": ["perplexity"], "before": True}
    data = {"validation": {"size": 4}}
    start = {"start_from": str(first.root)}
    bare = run_tiny(name="bare", training=STILL, evaluation=evaluation, data=data)
    second = run_tiny(name="second", training=STILL, evaluation=evaluation, data=data, adapter=start)
    values = [json.loads(run.results.read_text()) for run in (bare, second)]
    before, after = ([value[when]["metrics"]["perplexity"] for value in values] for when in ("before", "after"))
    assert before[0] == before[1] == pytest.approx(after[0], rel=1e-4)
    assert after[1] < 0.99 * before[1]


@pytest.mark.parametrize("tokens", [["<b>", "<a>"], ["<a>"], ["<a>", "<c>"], [5, 6]], ids=str)
def test_tokens_that_the_adapter_has_not_trained_are_refused(
    tokens: list[Any], run_tiny: RunTiny, capsys: pytest.CaptureFixture[str]
) -> None:
    trained = run_tiny(name="trained", adapter={"trainable_tokens": ["<a>", "<b>"]}, training=STILL)
    assert "adapter.trainable_tokens: <a>, <b>: in no row of data.sources" in " ".join(capsys.readouterr().err.split())
    start = {"start_from": str(trained.root)}
    run_tiny(name="same", adapter={"trainable_tokens": ["<a>", "<b>"], **start}, training=STILL)
    capsys.readouterr()
    run_tiny(name="other", adapter={"trainable_tokens": tokens, **start}, training=STILL, expect=2)
    assert "adapter.trainable_tokens: the same tokens in the same order" in capsys.readouterr().err


def test_fresh_does_not_put_its_own_start_aside(first: RunDir, run_tiny: RunTiny, tmp_path: Path) -> None:
    own = run_tiny(name="own", training=STILL)
    start = {"start_from": str(own.checkpoints / "step-000001")}
    run_tiny(name="own", training=STILL, adapter=start, arguments=("--fresh",), expect=2)
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["own"] and own.adapter.is_dir()


def damaged(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / CONFIG_NAME).read_text())
    (folder / CONFIG_NAME).write_text(json.dumps({**config, **changes}))


@pytest.mark.parametrize(
    ("adapter", "changes", "words"),
    [
        ({"rank": 2}, {}, "write what it has:\n  adapter.rank: 4"),
        ({}, {"lora_alpha": 99}, "adapter.alpha: 99"),
        ({}, {"use_rslora": True}, "adapter.use_rslora: true"),
        ({}, {"alpha_pattern": {"v_proj": 64, ".*_proj": 8}}, 'adapter.alpha_pattern: {"v_proj": 64, ".*_proj": 8}'),
        ({}, {"peft_type": "LOHA"}, "is not LoRA but LOHA"),
        ({}, {"init_lora_weights": "pissa"}, "fits only a base that pissa has changed"),
        ({"init": "gaussian"}, {}, "adapter.start_from gives others; remove one"),
        ({"start_from": "nowhere"}, {}, "nowhere: no such directory"),
        ({"start_from": "."}, {}, f"holds no adapter ({CONFIG_NAME}, {WEIGHTS_NAME})"),
        ({"start_from": "hf://one"}, {}, "write it as hf://ORG/NAME"),
        ({"start_from": "hf://org/none"}, {}, "adapter.start_from: org/none: "),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_cannot_be_started_from_is_refused(
    adapter: dict[str, Any],
    changes: dict[str, Any],
    words: str,
    first: RunDir,
    run_tiny: RunTiny,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    damaged(first.adapter, **changes)
    capsys.readouterr()
    run_tiny(name="second", adapter={"start_from": str(first.adapter), **adapter}, training=STILL, expect=2)
    assert words in capsys.readouterr().err and not (tmp_path / "runs/second/checkpoints").exists()


def test_an_adapter_of_another_base_is_said(
    first: RunDir, run_tiny: RunTiny, capsys: pytest.CaptureFixture[str]
) -> None:
    run_tiny("tied_llama", name="second", adapter={"start_from": str(first.root)}, training=STILL)
    assert "was trained on" in " ".join(capsys.readouterr().err.split())
    (first.adapter / "fingerprints.json").write_text('{"other": 1}')
    run_tiny("tied_llama", name="third", adapter={"start_from": str(first.root)}, training=STILL)
    assert "was trained on" in " ".join(capsys.readouterr().err.split())


def test_layers_that_the_adapter_lacks_are_named(run_tiny: RunTiny, capsys: pytest.CaptureFixture[str]) -> None:
    half = run_tiny(name="half", adapter={"target_modules": ["q_proj", "v_proj"]}, training=STILL)
    capsys.readouterr()
    run_tiny(name="second", adapter={"start_from": str(half.root)}, training=STILL, expect=2)
    assert "does not fit the model: 20 tensors missing" in " ".join(capsys.readouterr().err.split())


def test_the_check_looks_at_it(
    first: RunDir,
    model_dir: Callable[[str], Path],
    rows: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    recipe = tiny_recipe(tmp_path, model_dir("llama"), rows, adapter={"start_from": "first"})
    path = write_recipe(tmp_path / "r.yaml", recipe)
    assert main(["check", str(path)]) == 0
    assert f"starts from the adapter in {first.adapter}" in capsys.readouterr().out.replace("\n", "")
    assert main(["check", str(path), "adapter.rank=2"]) == 2
    assert "adapter.rank: 4" in capsys.readouterr().out


def test_a_run_that_is_made_again_starts_from_the_same_weights() -> None:
    assert compare_fingerprints({"start": "1" * 64}, {"start": "1" * 64}) == []
    for other in ({"start": "2" * 64}, {}):
        (line,) = compare_fingerprints({"start": "1" * 64}, other)
        assert line.startswith("adapter.start_from: weights of hash 111111111111 then")
