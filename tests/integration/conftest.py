"""What tests of whole runs share: a tiny model with rows, and a server that forks the command."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fork_server import ForkServer
from tests.tiny import alpaca_rows, write_jsonl, write_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with `model/` and `rows.jsonl`."""
    folder = tmp_path_factory.mktemp("runs")
    write_model(folder / "model", "llama")
    write_jsonl(folder / "rows.jsonl", alpaca_rows(28))
    return folder


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForkServer]:
    """Runs of the command; what they say and mark is kept in a directory of its own."""
    server = ForkServer(tmp_path_factory.mktemp("server"))
    yield server
    server.close()
