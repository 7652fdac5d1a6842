"""The wheel works outside the checkout and brings recipes and data along."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from finetune.recipe.shipped import copied_text

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def finetune(installed: Path, folder: Path, *arguments: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    command = [sys.executable, "-m", "finetune", *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_wheel_holds_the_package_recipes_and_data_alone(installed: Path) -> None:
    top = {path.name for path in installed.iterdir() if not path.name.endswith(".dist-info")}
    assert top == {"finetune"}
    assert (installed / "finetune" / "py.typed").is_file()
    recipes = {path.name for path in (installed / "finetune" / "_shipped" / "recipes").iterdir()}
    assert recipes == {path.name for path in (ROOT / "recipes").glob("*.yaml")}
    assert not list(installed.rglob("__pycache__"))


@pytest.mark.parametrize("name", sorted(path.name for path in (ROOT / "recipes").glob("*.yaml")))
def test_the_first_line_of_a_recipe_leads_an_editor_to_the_schema(name: str, installed: Path) -> None:
    schema = (ROOT / "finetune" / "recipe" / "schema.json").read_bytes()
    for folder in (ROOT / "recipes", installed / "finetune" / "_shipped" / "recipes"):
        first = (folder / name).read_text(encoding="utf-8").split("\n", 1)[0]
        directive, named, path = first.partition("$schema=")
        assert directive == "# yaml-language-server: " and named
        assert (folder / path).read_bytes() == schema
    copied = copied_text(folder / name).split("\n", 1)[0]
    assert Path(copied.removeprefix("# yaml-language-server: $schema=")).read_bytes() == schema


def test_a_shipped_recipe_is_listed_copied_and_finds_its_data(installed: Path, tmp_path: Path) -> None:
    assert "smollm2_135m_tickets" in finetune(installed, tmp_path, "recipes")
    finetune(installed, tmp_path, "recipes", "copy", "smollm2_135m_tickets", "my.yaml")
    assert (tmp_path / "my.yaml").is_file()
    where = "import finetune, sys; sys.stdout.write(finetune.__file__)"
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    found = subprocess.run([sys.executable, "-c", where], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert found.stdout.startswith(str(installed))


def test_the_copied_recipe_names_data_that_exists(installed: Path, tmp_path: Path) -> None:
    code = (
        "from pathlib import Path; from finetune.recipe.load import load_recipe; "
        "from finetune.recipe.shipped import find_recipe; "
        "recipe = load_recipe(find_recipe('smollm2_135m_tickets'), []); "
        "assert all(Path(source.path).is_file() for source in recipe.data.sources), recipe.data.sources"
    )
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
