"""Trackers: what they wrote is read back from their own files; none of them stops training."""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from finetune.cli import main
from finetune.findings import run_checks
from finetune.machine import refuse_telemetry
from finetune.recipe.load import load_recipe
from finetune.recipe.preflight import CHECKS
from finetune.recipe.schema import Recipe
from finetune.run_dir import RunDir
from finetune.training import trackers
from finetune.training.metrics import read_metrics
from tests.tiny import tiny_recipe, write_recipe
from tests.training.conftest import RunTiny
from tests.training.test_checkpoint import interrupt_after

SECTIONS: dict[str, Any] = {
    "data": {"validation": {"size": 4}},
    "evaluation": {"every_steps": 2, "num_samples": 2, "max_new_tokens": 4},
    "checkpoint": {"every_steps": 1, "keep_last": 9},
}


def run_and_continue(run_tiny: RunTiny, tracker: str, **logging: Any) -> tuple[RunDir, dict[int, float]]:
    """A run of 4 steps, continued from its second; returns the loss of each step as metrics.csv has it."""
    sections = {**SECTIONS, "logging": {"trackers": [tracker], **logging}}
    run = run_tiny(**sections)
    interrupt_after(run, 2)
    run_tiny(**sections)
    return run, {int(row["step"] or 0): float(row["loss"] or 0) for row in read_metrics(run.metrics)}


@pytest.fixture(scope="module", autouse=True)
def _own_trackio(tmp_path_factory: pytest.TempPathFactory) -> None:
    """trackio reads this once, when it is imported."""
    os.environ["TRACKIO_DIR"] = str(tmp_path_factory.mktemp("trackio"))


@pytest.fixture
def wandb_modes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The modes that wandb is opened in, where there is no key and nothing but the code chooses; online it fails."""
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "netrc").write_text("")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    modes: list[str] = []
    if importlib.util.find_spec("wandb") is None:
        return modes
    import wandb

    init = wandb.init

    def spy(**given: Any) -> Any:
        modes.append(given["mode"])
        if given["mode"] != "offline":
            raise ConnectionError("a test has no service")
        return init(**given)

    monkeypatch.setattr(wandb, "init", spy)
    return modes


def wandb_records(path: Path) -> Iterator[Any]:
    """The records of a .wandb file: a LevelDB log of protobuf messages.

    Source: LevelDB, doc/log_format.md; the file's own header has seven bytes.
    """
    from wandb.proto.wandb_internal_pb2 import Record

    data, position, parts = path.read_bytes(), 7, b""
    while position + 7 <= len(data):
        left = 32_768 - position % 32_768
        if left < 7:
            position += left
            continue
        length, kind = int.from_bytes(data[position + 4 : position + 6], "little"), data[position + 6]
        parts += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            record = Record()
            record.ParseFromString(parts)
            yield record
            parts = b""


NETRC = "machine {} login user password 0123456789abcdef0123456789abcdef01234567\n"
# Environment and netrc file -> the mode.
WANDB_KEYS: dict[str, tuple[dict[str, str], str, str]] = {
    "none": ({}, "", "offline"),
    "environment": ({"WANDB_API_KEY": "0" * 40}, "", "online"),
    "netrc": ({}, NETRC.format("api.wandb.ai"), "online"),
    "netrc, for another service": ({}, NETRC.format("example.org"), "offline"),
    "netrc, for a server of one's own": (
        {"WANDB_BASE_URL": "https://wandb.example.org"},
        NETRC.format("wandb.example.org"),
        "online",
    ),
    "a mode that is asked for": ({"WANDB_API_KEY": "0" * 40, "WANDB_MODE": "disabled"}, "", "disabled"),
}


@pytest.mark.parametrize("key", WANDB_KEYS)
def test_wandb_is_online_where_it_finds_a_key(
    key: str, wandb_modes: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = pytest.importorskip("wandb")
    environment, netrc, mode = WANDB_KEYS[key]
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "netrc").write_text(netrc)
    opened: list[str] = []
    monkeypatch.setattr(wandb, "init", lambda **given: opened.append(given["mode"]))
    recipe = Recipe.model_validate(tiny_recipe(tmp_path, tmp_path, tmp_path, logging={"trackers": ["wandb"]}))
    trackers.TrackerGroup(recipe, RunDir(tmp_path / "run"), 0)
    assert opened == [mode]


def test_wandb_is_offline_without_a_key_and_keeps_its_id(run_tiny: RunTiny, wandb_modes: list[str]) -> None:
    pytest.importorskip("wandb")
    run, losses = run_and_continue(run_tiny, "wandb", log_adapter=True, tags=["a"])
    assert wandb_modes == ["offline"] * 2
    identity = (run.logs / "tracker_id").read_text()
    logged: dict[int, float] = {}
    configs, tables, artifacts, ids = [], [], set(), set()
    for record in (record for path in run.logs.rglob("*.wandb") for record in wandb_records(path)):
        if record.HasField("run"):
            ids.add(record.run.run_id)
            configs += [json.loads(item.value_json) for item in record.run.config.update if item.key == "adapter"]
        if record.HasField("artifact"):
            artifacts.add((record.artifact.type, record.artifact.name))
        if record.HasField("history"):
            items = {item.key or ".".join(item.nested_key): item.value_json for item in record.history.item}
            if "loss" in items:
                logged[record.history.step.num] = json.loads(items["loss"])
            if "samples.nrows" in items:
                tables.append((json.loads(items["samples.nrows"]), json.loads(items["samples.ncols"])))
    assert ids == {identity}
    assert logged == pytest.approx(losses)
    assert configs and all(config["rank"] == 4 for config in configs)
    assert ("model", "tiny-adapter") in artifacts
    assert tables == [(2, 3)] * 3, "of steps 2 and 4, and of 4 again"


ACME = "https://wandb.acme.com"


@pytest.mark.parametrize(
    ("environment", "machine", "mode", "said"),
    [
        ({}, None, "offline", "no key, so it logs offline"),
        ({"WANDB_API_KEY": "k"}, None, "online", "a key is there"),
        ({}, "api.wandb.ai", "online", "a key is there"),
        ({"WANDB_BASE_URL": ACME}, "wandb.acme.com", "online", "a key is there"),
        ({"WANDB_BASE_URL": "http://localhost:8080"}, "localhost:8080", "online", "a key is there"),
        ({"WANDB_BASE_URL": ACME}, "api.wandb.ai", "offline", "no key, so it logs offline"),
        ({"WANDB_MODE": "offline"}, "api.wandb.ai", "offline", "WANDB_MODE is offline"),
    ],
)
def test_check_says_what_wandb_will_do(
    environment: dict[str, str],
    machine: str | None,
    mode: str,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("WANDB_API_KEY", "WANDB_BASE_URL", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    keys = tmp_path / "netrc"
    keys.write_text("" if machine is None else f"machine {machine} login user password {'k' * 40}\n")
    for name, value in {"NETRC": str(keys), **environment}.items():
        monkeypatch.setenv(name, value)
    values = tiny_recipe(tmp_path, tmp_path, tmp_path, logging={"trackers": ["wandb"]})
    recipe = load_recipe(write_recipe(tmp_path / "recipe.yaml", values))
    found, *_ = run_checks({"logins": CHECKS["logins"]}, recipe)
    assert found.level == "fact" and said in found.text
    started: list[dict[str, Any]] = []
    double = SimpleNamespace(init=lambda **keys: started.append(keys), Settings=lambda **_: None)
    monkeypatch.setitem(sys.modules, "wandb", double)
    trackers.TRACKERS["wandb"](recipe, RunDir(tmp_path / "run"), "id", 0)
    assert started[0]["mode"] == mode


def test_tensorboard_shows_every_step_once_after_a_resume(run_tiny: RunTiny) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run, losses = run_and_continue(run_tiny, "tensorboard")
    events = EventAccumulator(str(run.logs / "tensorboard")).Reload()
    assert {event.step: event.value for event in events.Scalars("loss")} == pytest.approx(losses)
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3, 4]
    assert [event.step for event in events.Scalars("validation_loss")] == [2, 4]
    texts = {event.step: event.tensor_proto.string_val[0].decode() for event in events.Tensors("samples/text_summary")}
    assert list(texts) == [2, 4]
    assert all(text.startswith("| prompt | expected | completion |") for text in texts.values())
    assert b"rank: 4" in events.Tensors("recipe/text_summary")[-1].tensor_proto.string_val[0]


def test_trackio_keeps_one_run_in_its_database(run_tiny: RunTiny, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("trackio")
    from trackio.sqlite_storage import SQLiteStorage

    run, losses = run_and_continue(run_tiny, "trackio", project="tests", log_adapter=True)
    assert "Trackio" not in capsys.readouterr().out
    (name,) = SQLiteStorage.get_runs("tests")
    assert name == f"tiny-{(run.logs / 'tracker_id').read_text()}"
    logs = SQLiteStorage.get_logs("tests", name)
    seen = defaultdict(list)
    for row in logs:
        for key in row:
            seen[key].append(row["step"])
    assert {row["step"]: row["loss"] for row in logs if "loss" in row} == pytest.approx(losses)
    assert seen["loss"] == [1, 2, 3, 4] and seen["samples"] == [2, 4]
    config = SQLiteStorage.get_run_config("tests", name)
    assert config is not None and config["adapter"]["rank"] == 4
    assert any((Path(os.environ["TRACKIO_DIR"]) / "artifacts").rglob("*"))


@pytest.mark.parametrize("moment", ["start", "log", "log_samples", "log_adapter", "finish"])
def test_a_tracker_that_fails_never_stops_training(
    moment: str, run_tiny: RunTiny, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Broken:
        def __init__(self, *_: object) -> None:
            self._fail("start")

        def __getattr__(self, name: str) -> Any:
            return lambda *_: self._fail(name)

        def _fail(self, name: str) -> None:
            if name == moment:
                raise ConnectionError("the service went away")

    monkeypatch.setitem(trackers.TRACKERS, "wandb", Broken)
    run = run_tiny(**SECTIONS, logging={"trackers": ["wandb"], "log_adapter": True})
    assert len(list(read_metrics(run.metrics))) == 4 and run.adapter.is_dir()
    assert capsys.readouterr().err.count("the service went away") == 1


def test_fm30_training_completes_with_every_socket_blocked(
    run_tiny: RunTiny, wandb_modes: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    connect = socket.socket.connect

    def refuse(self: socket.socket, address: Any) -> None:
        if self.family != socket.AF_UNIX:
            raise OSError(101, "Network is unreachable")
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", refuse)
    installed = [name for name in trackers.TRACKERS if importlib.util.find_spec(name) is not None]
    run = run_tiny(**SECTIONS, logging={"trackers": installed, "project": "blocked"})
    assert wandb_modes == ["offline"] * ("wandb" in installed)
    assert len(list(read_metrics(run.metrics))) == 4 and run.adapter.is_dir()


def test_an_absent_package_is_refused_before_anything_is_computed(
    run_tiny: RunTiny, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "trackio" else find(name))
    run = run_tiny(expect=2, logging={"trackers": ["trackio"]})
    assert "logging.trackers: trackio is not installed; run: pip install trackio" in capsys.readouterr().err
    assert not run.recipe.exists()


def test_telemetry_is_off_unless_the_user_sets_it(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("HF_HUB_DISABLE_TELEMETRY", "WANDB_ERROR_REPORTING", "GRADIO_ANALYTICS_ENABLED")
    for name in names:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("GRADIO_ANALYTICS_ENABLED", "True")
    assert main([]) == 2
    assert [os.environ[name] for name in names] == ["1", "false", "True"]
    refuse_telemetry()
    assert os.environ["GRADIO_ANALYTICS_ENABLED"] == "True"
