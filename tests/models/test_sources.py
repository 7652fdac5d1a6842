"""What a base's files are identified by."""

from __future__ import annotations

import json
import os
import resource
from pathlib import Path

import pytest
from huggingface_hub import snapshot_download

from finetune.errors import FinetuneError, ModelError
from finetune.export import gguf_model
from finetune.files import sha256_file
from finetune.models import sources
from finetune.models.sources import find_model, fingerprint
from finetune.recipe.schema import ModelSection
from tests.export.push_run import hub
from tests.hub_double import HubDouble
from tests.tiny import write_model

assert hub  # a fixture


def write_base(folder: Path, fill: bytes) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(fill * 2**21)
    return folder


def test_a_large_file_is_hashed_once_and_again_when_it_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "cache"
    monkeypatch.setenv("FINETUNE_CACHE", str(cache))
    monkeypatch.setattr(sources, "_SETTLED_SECONDS", -1.0)
    folder = write_base(tmp_path / "base", b"a")
    source = find_model(ModelSection(name=str(folder)))
    first = fingerprint(source)
    (kept,) = (cache / "hashes").iterdir()  # the small configuration is read each time
    weights = folder / "model.safetensors"
    assert kept.read_text() == sha256_file(weights)
    kept.write_text("f" * 64)
    assert fingerprint(source) != first  # what is kept is what counts
    kept.unlink()
    # Same size and the same mtime: the file system still knows that it was written.
    before = weights.stat()
    write_base(folder, b"b")
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert fingerprint(source) != first
    write_base(folder, b"a")
    assert fingerprint(source) == first


def test_a_file_that_has_just_changed_is_read_each_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sources, "_SETTLED_SECONDS", 3600.0)
    fingerprint(find_model(ModelSection(name=str(write_base(tmp_path / "base", b"a")))))
    assert not (tmp_path / "cache").exists()


def test_a_cache_that_cannot_be_written_costs_time_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cache").write_text("a file")
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sources, "_SETTLED_SECONDS", -1.0)
    source = find_model(ModelSection(name=str(write_base(tmp_path / "base", b"a"))))
    assert fingerprint(source) == fingerprint(source)


SHARDS = {"a.safetensors": b"weights", "b.safetensors": b"others"}
INDEX = json.dumps({"weight_map": {"one": "a.safetensors", "two": "b.safetensors", "three": "a.safetensors"}}).encode()
HUB_FILES = {
    "one file": {"model.safetensors": b"weights", "pytorch_model.bin": b"the same, pickled"},
    "shards": {"model.safetensors.index.json": INDEX, **SHARDS},
    "pickled": {"pytorch_model.bin": b"weights"},
    "pickled shards": {"pytorch_model.bin.index.json": INDEX, **SHARDS},
}


def add_commit(hub: HubDouble, changes: dict[str, bytes]) -> None:
    repository = hub.repositories["models", "acme/base"]
    repository.add("a commit", repository.commits[-1].tree | {path: hub.store(changes[path], path) for path in changes})


@pytest.mark.parametrize("kind", HUB_FILES)
def test_a_hub_base_is_the_same_before_and_after_its_weights_are_here(
    hub: HubDouble, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    hub.add_repository("acme/base", {"config.json": b"{}", "consolidated.safetensors": b"stray", **HUB_FILES[kind]})
    source = find_model(ModelSection(name="acme/base"))
    first = fingerprint(source)
    assert not hub.sent(r"GET .*(safetensors|bin)$") and first["revision"]
    # Offline without the weights nobody can know, and the model cannot be loaded.
    with monkeypatch.context() as offline, pytest.raises(ModelError, match="cannot load acme/base"):
        offline.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        fingerprint(source)
    snapshot_download("acme/base")
    assert fingerprint(source) == first
    with monkeypatch.context() as offline:
        offline.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        assert fingerprint(source) == first
    add_commit(hub, {"README.md": b"new", "consolidated.safetensors": b"another"})
    second = fingerprint(source)
    assert second["revision"] != first["revision"] and second["sha256"] == first["sha256"]
    name = next(name for name in ("a.safetensors", "model.safetensors", "pytorch_model.bin") if name in HUB_FILES[kind])
    for changes in ({"config.json": b"{ }"}, {name: b"other weights"}):
        add_commit(hub, changes)
        assert fingerprint(source)["sha256"] != second["sha256"]
        second = fingerprint(source)


def test_a_mirror_with_hashes_of_its_own_and_files_in_git_are_read(
    hub: HubDouble, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {"config.json": b"{}", "model.safetensors": b"weights"}
    found = []
    for suffixes in ((".safetensors",), ()):
        monkeypatch.setattr("tests.hub_double._LFS_SUFFIXES", suffixes)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / f"hub{len(suffixes)}"))
        hub.add_repository("acme/base", files)
        found += [fingerprint(find_model(ModelSection(name="acme/base")))["sha256"] for _ in range(2)]
    assert len(set(found)) == 1


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors.index.json").write_bytes(INDEX)
    (tmp_path / "a.safetensors").write_bytes(b"weights")
    with pytest.raises(ModelError, match=r"b\.safetensors is missing; download the model again"):
        fingerprint(find_model(ModelSection(name=str(tmp_path))))


@pytest.mark.parametrize(("saves_weights", "limit"), [(True, 20_000), (False, 2_000)], ids=["weights", "tokenizer"])
def test_a_gguf_file_that_does_not_fit_into_the_cache_leaves_nothing(
    saves_weights: bool, limit: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A limit on file sizes is a real failed write, which safetensors and tokenizers tell in errors of their own."""
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "tiny.gguf"
    gguf_model.write_model(write_model(tmp_path / "base", "llama"), path, "f16", "tiny")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with monkeypatch.context() as patched, pytest.raises(FinetuneError) as caught:
        if not saves_weights:
            patched.setattr("transformers.PreTrainedModel.save_pretrained", lambda self, folder: None)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
        try:
            find_model(ModelSection(name=str(path)))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
    said = str(caught.value)
    assert said.startswith(f"{tmp_path}/cache/models/tiny-") and "cannot be written: File too large." in said
    assert "tiny.gguf" in said and "FINETUNE_CACHE" in said
    assert [file.suffix for file in (tmp_path / "cache" / "models").iterdir()] == [".lock"]
    assert Path(find_model(ModelSection(name=str(path))).location, "model.safetensors").is_file()
