"""The table of computed tokens: every way to pack computes less than the one before it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.scripts import load_script
from tests.tiny import alpaca_rows, write_jsonl, write_model


def test_each_way_to_pack_computes_less(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = load_script("benchmarks/packing.py")
    monkeypatch.setattr(script, "PACKAGE", str(write_model(tmp_path / "model", "llama")))
    rows = write_jsonl(tmp_path / "rows.jsonl", alpaca_rows(64))
    count, mean, (unsorted, padded, isolated, shared) = script.ratios(tmp_path, rows, {"template": "alpaca"})
    assert count == 64 and mean > 10
    assert unsorted > padded > isolated >= 1 > shared
