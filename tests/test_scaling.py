"""docs/scaling.md is what the code says."""

from __future__ import annotations

from types import ModuleType

import pytest

from tests.scripts import load_script


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script("docs/make_scaling_tables.py")


def test_the_tables_are_up_to_date(script: ModuleType) -> None:
    text = script.PAGE.read_text(encoding="utf-8")
    assert script.with_tables(text) == text, "run: python docs/make_scaling_tables.py"


def test_the_models_have_their_published_size(script: ModuleType) -> None:
    published = {"Falcon-7B": 6.92e9, "Falcon-40B": 41.3e9, "Llama-3-70B": 70.55e9, "Falcon-180B": 178.5e9}
    for model, size in published.items():
        assert script.estimate(model, "nf4", 1).weights.num_parameters == pytest.approx(size, rel=0.02), model
