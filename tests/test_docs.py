"""The prose says what is there: tables, links, paths, verbs, make targets, recipe keys, test names."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from finetune.cli import VERBS
from finetune.recipe.keys import all_keys, place_at
from finetune.recipe.load import load_recipe
from finetune.recipe.schema import Recipe
from finetune.recipe.shipped import describe_recipe, shipped_recipes
from tests.scripts import ROOT, load_script
from tests.test_layers import LAYERS

README = ROOT / "README.md"
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "data").rglob("*.md")])
# What a path in the prose may be relative to: the repository, or the package.
BASES = (ROOT, ROOT / "finetune")
# `runs/` is there only after a run, whose names are a reader's own.
TOP = {path.name for base in BASES for path in base.iterdir()} - {"runs"}

LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
SPAN = re.compile(r"`([^`\n]+)`")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INDENTED = re.compile(r"(?:^    .+\n)+", re.MULTILINE)
PATH = re.compile(r"\.?[\w-]+(?:/[\w.-]+)+/?|\w[\w-]*/")
KEY = re.compile(r"([a-z_]+(?:\.[a-z_]+|\[\]|\.\d+)+)")


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def named(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def spans(text: str) -> list[str]:
    return SPAN.findall(FENCE.sub("", text))


def code_lines(text: str) -> Iterator[str]:
    """Lines of the code blocks, fenced or indented, that show commands."""
    for language, block in FENCE.findall(text):
        if language in ("", "bash", "sh"):
            yield from block.splitlines()
    for block in INDENTED.findall(FENCE.sub("", text)):
        yield from (line.strip() for line in block.splitlines())


def anchors(page: Path) -> set[str]:
    """The ids that a heading gets on the usual hosts."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", text_of(page)), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_recipe_table_is_the_schema() -> None:
    script = load_script("docs/make_recipe_table.py")
    text = text_of(README)
    assert script.with_table(text) == text, "run: python docs/make_recipe_table.py"
    cells = set(re.findall(r"^\| \**`([^`]+)`", script.recipe_table(), re.MULTILINE))
    repeated = ("data.validation.source.", "evaluation.source.")  # sections like data.sources[]
    wanted = {key.replace(".0.", "[].") for key in all_keys() if not key.startswith(repeated)}
    assert cells == wanted


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_links_lead_somewhere(page: Path) -> None:
    wrong = []
    for target in LINK.findall(FENCE.sub("", text_of(page))):
        if "://" in target:
            continue
        file, _, anchor = target.partition("#")
        path = page if not file else page.parent / file
        if not path.exists() or (anchor and anchor not in anchors(path)):
            wrong.append(target)
    assert not wrong


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_named_files_and_tests_exist(page: Path) -> None:
    """Paths in code spans and code blocks that begin with something of the repository, and the tests they name."""
    text = text_of(page)
    bases = (*BASES, page.parent)
    wrong = []
    for words in [*spans(text), *code_lines(text)]:
        for word in words.split():
            file, _, test = word.strip(",;()'\"").partition("::")
            if not PATH.fullmatch(file) or file.split("/")[0] not in TOP:
                continue
            found = next((base / file for base in bases if (base / file).exists()), None)
            if found is None or (test and not re.search(rf"^def {re.escape(test)}\(", text_of(found), re.MULTILINE)):
                wrong.append(word)
    assert not wrong


def test_every_verb_is_named_and_no_other() -> None:
    said = set(re.findall(r"^\| `finetune (\w+)", text_of(README), re.MULTILINE))
    assert said == set(VERBS)
    for page in PAGES:
        text = text_of(page)
        for line in [*spans(text), *code_lines(text)]:
            verb = re.match(r"(?:\S*/)?finetune ([a-z]+)", line)
            assert verb is None or verb[1] in VERBS, f"{named(page)}: {line}"


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", text_of(ROOT / "Makefile"), re.MULTILINE))
    for page in PAGES:
        text = text_of(page)
        for line in [*spans(text), *code_lines(text)]:
            target = re.match(r"make ([a-z-]+)", line)
            assert target is None or target[1] in targets, f"{named(page)}: {line}"


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_named_recipe_keys_exist(page: Path) -> None:
    text = text_of(page)
    wrong = []
    for words in [*spans(text), *code_lines(text)]:
        for word in re.split(r"[\s=:]+", words):
            if not KEY.fullmatch(word) or word.split(".")[0] not in Recipe.model_fields:
                continue
            path = tuple(word.replace("[]", ".0").split("."))
            is_file = word.endswith((".py", ".json", ".md", ".yaml", ".csv", ".gguf"))
            if not is_file and place_at(path) is None:
                wrong.append(word)
    assert not wrong


def test_commands_name_shipped_recipes() -> None:
    """`finetune run NAME` in a code block: a shipped recipe, or a file that stands for the reader's own."""
    shipped = shipped_recipes()
    for line in code_lines(text_of(README)):
        found = re.search(r"finetune run ([\w./-]+)", line)
        if found and "." not in found[1]:
            assert found[1] in shipped, line
    assert {name for name in shipped if f"`{name}`" in text_of(README)} == set(shipped)


def test_recipes_in_the_prose_are_valid(tmp_path: Path) -> None:
    blocks = [block for language, block in FENCE.findall(text_of(README)) if language == "yaml"]
    assert blocks
    for block in blocks:
        path = tmp_path / "recipe.yaml"
        path.write_text(block, encoding="utf-8")
        assert load_recipe(path).name == yaml.safe_load(block)["name"]


def test_the_readme_opens_with_two_commands_and_what_they_print() -> None:
    text = text_of(README)
    first = INDENTED.search(text)
    assert first is not None
    commands = [shlex.split(line, comments=True) for line in first[0].splitlines()]
    assert commands == [["make", "demo"], ["make", "test"]]
    for mark in ("demo-output", "test-output"):
        block = text.partition(f"<!-- {mark} -->")[2].partition(f"<!-- /{mark} -->")[0]
        assert FENCE.search(block.strip()), mark


def test_the_demos_recipe_says_of_itself_what_the_readme_shows() -> None:
    text = text_of(README)
    said = describe_recipe("demo", shipped_recipes()["smollm2_135m_tickets"])
    exact_match = re.search(r"^exact_match +([\d.]+)% +([\d.]+)%", text, re.MULTILINE)
    assert exact_match is not None
    assert f"{float(exact_match[1]):g} -> {exact_match[2]} %" in said.result
    assert f"peak memory {said.memory}\n" in text and f"It took {said.time} on" in text


def test_the_architecture_names_every_part_of_the_house() -> None:
    text = text_of(ROOT / "docs" / "architecture.md")
    house = text[text.index("## The house") : text.index("## A run")]
    for name in set().union(*LAYERS) - {""}:
        assert f"{name}/" in house or f"{name}.py" in house, name
