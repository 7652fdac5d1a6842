"""Tiny models on disk, and a run of a tiny recipe within this process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from finetune.cli import main
from finetune.run_dir import RunDir
from tests.tiny import alpaca_rows, tiny_recipe, write_jsonl, write_model, write_recipe

RunTiny = Callable[..., RunDir]


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folder of a tiny model of an architecture, written once a session."""
    made: dict[str, Path] = {}

    def get(architecture: str) -> Path:
        if architecture not in made:
            made[architecture] = write_model(tmp_path_factory.mktemp("models") / architecture, architecture)
        return made[architecture]

    return get


@pytest.fixture(scope="session")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 rows of ragged length."""
    return write_jsonl(tmp_path_factory.mktemp("rows") / "rows.jsonl", alpaca_rows(24))


@pytest.fixture
def run_tiny(model_dir: Callable[[str], Path], rows: Path, tmp_path: Path) -> RunTiny:
    """Run a tiny recipe through the command line and return its directory; the same name continues it."""

    def run(
        architecture: str = "llama",
        name: str = "tiny",
        *,
        expect: int = 0,
        arguments: tuple[str, ...] = (),
        **sections: Any,
    ) -> RunDir:
        recipe = tiny_recipe(tmp_path, model_dir(architecture), rows, **{"name": name, **sections})
        path = write_recipe(tmp_path / f"{name}.yaml", recipe)
        assert main(["run", str(path), *arguments]) == expect
        return RunDir(tmp_path / "runs" / name)

    return run
