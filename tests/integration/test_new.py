"""`finetune new`: the recipe that it writes loads, says why, and trains."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from finetune.cli import main
from finetune.data.prepare import prepare_data
from finetune.data.template import load_template
from finetune.recipe.compose import scalar
from finetune.recipe.lines import parse_yaml
from finetune.recipe.load import load_recipe
from tests.tiny import alpaca_rows, chat_rows, write_jsonl, write_model

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with models, with and without a chat template, and rows of several shapes."""
    home = tmp_path_factory.mktemp("home")
    write_model(home / "model", "llama")
    write_model(home / "base", "falcon", template=None)
    rows = alpaca_rows(120)
    write_jsonl(home / "alpaca.jsonl", rows)
    write_jsonl(home / "chat.jsonl", chat_rows(40))
    write_jsonl(home / "text.jsonl", [{"text": row["instruction"]} for row in rows])
    qa = ["question,answer", *(f"{row['instruction']},{row['output']}" for row in rows)]
    (home / "qa.csv").write_text("\n".join(qa) + "\n")
    bad = alpaca_rows(40)
    bad[3]["output"] = ""
    write_jsonl(home / "bad.jsonl", bad)
    long = alpaca_rows(40)
    for row in long[::3]:
        row["output"] = " ".join(["red"] * 1500)
    write_jsonl(home / "long.jsonl", long)
    return home


def new(home: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> int:
    monkeypatch.chdir(home)
    given = {"model": "model", "data": "alpaca.jsonl", "hardware": "cpu", "epochs": "1", "force": True, **options}
    arguments = []
    for name, value in given.items():
        if value is not None:
            arguments += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return main(["new", *arguments])


@pytest.mark.parametrize(
    ("model", "data", "format_name", "template"),
    [
        ("model", "alpaca.jsonl", "alpaca", "auto"),
        ("base", "alpaca.jsonl", "alpaca", "alpaca"),
        ("model", "chat.jsonl", "messages", "auto"),
        ("base", "chat.jsonl", "messages", "chatml"),
        ("base", "text.jsonl", "text", "auto"),
        ("model", "qa.csv", "alpaca", "auto"),
        ("model", "bad.jsonl", "alpaca", "auto"),
    ],
)
def test_what_is_written_passes_check_and_trains(
    model: str, data: str, format_name: str, template: str, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = home / f"{model}-{data}.yaml"
    assert new(home, monkeypatch, model=model, data=data, output=output) == 0
    monkeypatch.chdir(tmp_path)  # its paths are relative to itself
    assert main(["check", str(output)]) == 0
    recipe = load_recipe(output)
    assert recipe.name == f"{model}-{data}"
    assert (recipe.data.sources[0].format, recipe.data.template) == (format_name, template)
    assert recipe.model.quantization == "none" and recipe.distributed.accelerator == "cpu"
    overrides = ["training.max_steps=2", "training.epochs=null", "training.precision=32-true", "evaluation.metrics=[]"]
    assert main(["run", str(output), *overrides, "data.num_workers=0", "evaluation.num_samples=0"]) == 0
    assert (tmp_path / "runs" / recipe.name / "adapter" / "adapter_config.json").is_file()


def test_the_recipe_says_what_was_seen_and_why(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert new(home, monkeypatch, data="qa.csv", epochs=None, steps=30, output="my qa.yaml") == 0
    text = (home / "my qa.yaml").read_text()
    recipe = load_recipe(home / "my qa.yaml")
    assert recipe.name == "my-qa" and recipe.training.max_steps == 30 and recipe.training.epochs is None
    assert recipe.data.sources[0].columns == {"instruction": "question", "output": "answer"}
    assert recipe.data.max_seq_len == 128 and recipe.data.validation.size == 0.05
    for part in (
        "# Purpose:  fine-tune ./model on ./qa.csv.",
        "path: ./qa.csv",
        "# guessed from the columns' names",
        "# the tokenizer's own chat template",
        "half of the rows have up to",
        "# 2.1 passes over 114 rows",
        "# samples a forward pass: speed and memory, not the result",
    ):
        assert part in text, part
    said = capsys.readouterr()
    assert "120 rows, format alpaca, instruction from question, output from answer" in said.err
    assert "finetune run 'my qa.yaml'" in said.out
    assert max(map(len, text.splitlines()[1:])) <= 140


def test_bad_rows_are_allowed_for_and_named(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert new(home, monkeypatch, data="bad.jsonl", output="bad.yaml") == 0
    assert load_recipe(home / "bad.yaml").data.max_rejected_share == 0.05
    assert "1 of 40 rows cannot be used; the first: " in capsys.readouterr().err
    assert "e.g." in (home / "bad.yaml").read_text()


def test_rows_that_are_cut_are_allowed_for(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert new(home, monkeypatch, data="long.jsonl", output="long.yaml") == 0
    data = load_recipe(home / "long.yaml").data
    assert (data.max_seq_len, data.over_length, data.max_over_length_share) == (1024, "truncate", 0.7)
    assert "# 35% of the rows looked at are cut" in (home / "long.yaml").read_text()
    tokenizer = AutoTokenizer.from_pretrained(home / "model")
    prepared = prepare_data(data, tokenizer, load_template(tokenizer, data), seed=0)
    assert prepared.ledger.sources[0].rows_truncated == 14


@pytest.mark.parametrize(
    ("model", "hardware", "quantization", "strategy", "devices"),
    [
        ("org/Model-7B", "24GB", "none", "auto", "auto"),
        ("org/Model-7B", "16 GB", "nf4", "auto", "auto"),
        ("org/Model-8B", "8x80GB", "none", "ddp", 8),
        ("org/Model-70B", "80GB", "nf4", "auto", "auto"),
        ("org/Model-70B", "8 x 24GB", "nf4", "fsdp", 8),
        ("org/no-size", "24gb", "nf4", "auto", "auto"),
    ],
)
def test_hardware_decides_how_the_base_is_kept(
    model: str,
    hardware: str,
    quantization: str,
    strategy: str,
    devices: Any,
    home: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Models that cannot be reached from here: their size is that of their name."""
    assert new(home, monkeypatch, model=model, hardware=hardware, output="far.yaml") == 0
    assert "its size is taken from its name" in capsys.readouterr().err
    recipe = load_recipe(home / "far.yaml")
    assert recipe.model.name == model and recipe.model.quantization == quantization
    assert (recipe.distributed.strategy, recipe.distributed.devices) == (strategy, devices)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data": None}, "--data is missing, and there is no terminal to ask at; give --data"),
        ({"model": None}, "--model is missing, and there is no terminal to ask at; give --model"),
        ({"model": "./absent"}, "model.name: no such directory or file"),
        ({"data": "absent.jsonl"}, "--data: there is no file"),
        ({"hardware": "big"}, "--hardware big: accepts auto, cpu, a GPU's memory such as 24GB, or 8x80GB"),
        ({"epochs": "some"}, "--epochs some: accepts a number above 0"),
        ({"epochs": None, "steps": "1.5"}, "--steps 1.5 steps: accepts a number above 0"),
        ({"output": "."}, "--output .: is a directory; name a file in it"),
        ({"output": "no/such/place.yaml"}, "there is no directory no/such"),
        ({"output": "alpaca.yaml", "force": None}, "--output alpaca.yaml: exists; name another file, or pass --force"),
    ],
    ids=str,
)
def test_a_wrong_or_missing_option_is_named(
    options: dict[str, Any],
    message: str,
    home: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (home / "alpaca.yaml").touch()
    assert new(home, monkeypatch, **options) == 2
    assert message in capsys.readouterr().err


def test_questions_are_asked_at_a_terminal_and_asked_again(home: Path, tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "finetune", "new"],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        cwd=home,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    os.close(theirs)
    answers = ["./nowhere", "./model", "nothing.jsonl", "alpaca.jsonl", "huge", "cpu", "20 steps", str(tmp_path / "r")]
    os.write(ours, "".join(f"{answer}\n" for answer in answers).encode())
    shown = b""
    while True:
        try:
            part = os.read(ours, 4096)
        except OSError:  # the terminal is gone with the process
            break
        if not part:
            break
        shown += part
    os.close(ours)
    assert process.wait() == 0, shown.decode()
    recipe = load_recipe(tmp_path / "r.yaml")
    assert recipe.name == "r" and recipe.training.max_steps == 20
    text = shown.decode()
    assert text.count("Which base model?") == 2 and text.count("Which data?") == 2
    assert text.count("Where does it run?") == 2 and "Where does it go? [alpaca.yaml]" in text


@pytest.mark.parametrize(
    "value", ["plain", "org/name", "yes", "null", "1.5", "a: b", "with space", "é", "a#b", 2e-4, 3.0]
)
def test_values_are_read_back_as_they_were(value: Any) -> None:
    assert parse_yaml(f"key: {scalar(value)}").value["key"] == value
