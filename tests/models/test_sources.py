"""What a base's files are identified by."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from finetune.files import sha256_file
from finetune.models import sources
from finetune.models.sources import find_model, fingerprint
from finetune.recipe.schema import ModelSection


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
