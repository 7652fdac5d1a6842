"""What `finetune check` says of the base's terms: licence, gate and revision, as the Hub has them."""

from __future__ import annotations

from pathlib import Path

import pytest

from finetune.export.base_terms import CHECKS
from finetune.findings import run_checks
from finetune.recipe.load import load_recipe
from finetune.recipe.schema import Recipe
from tests.export.push_run import hub
from tests.hub_double import HubDouble
from tests.tiny import tiny_recipe, write_recipe

assert hub  # a fixture
BASE = "acme/base"
CARD = {"README.md": b"---\nlicense: apache-2.0\n---\n# Base\n"}


def terms(folder: Path, **model: str) -> list[tuple[str, str]]:
    values = tiny_recipe(folder, Path(BASE), folder, model=model)
    recipe: Recipe = load_recipe(write_recipe(folder / "recipe.yaml", values))
    return [(one.level, one.text) for one in run_checks({"licence": CHECKS["licence"]}, recipe)]


@pytest.mark.parametrize("gated", [False, "manual"])
@pytest.mark.parametrize("login", [True, False])
def test_the_hub_tells_licence_gate_and_revision(
    gated: bool | str, login: bool, hub: HubDouble, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    revision = hub.add_repository(BASE, CARD).oid
    hub.repositories["models", BASE].gated = gated
    if not login:
        monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    first, *others = terms(tmp_path)
    gate = "gated" if gated else "not gated"
    assert first == ("fact", f"{BASE}: licence apache-2.0, {gate}, revision {revision}")
    refused = [text for level, text in others if level == "error"]
    assert bool(refused) == (bool(gated) and not login)
    assert all("accept its terms on the Hub, then run: hf auth login" in text for text in refused)
    assert others[-1] == ("warning", f"model.revision is not set; {revision} pins what is there now")
    assert len(terms(tmp_path, revision=revision)) == len(others)


def test_a_hub_that_cannot_be_reached_is_said(hub: HubDouble, tmp_path: Path) -> None:
    hub.fail("/api/models/", 503, times=99)
    ((level, text),) = terms(tmp_path)
    assert level == "fact" and "the Hub cannot be reached, so licence and access are not known" in text
