"""The committed JSON schema is the schema, and describes every key."""

from __future__ import annotations

import json
from pathlib import Path

import finetune.recipe
from finetune.recipe.json_schema import schema_json
from finetune.recipe.keys import all_keys, place_at
from tests.recipe.examples import MINIMAL, errors_of, write

COMMITTED = Path(finetune.recipe.__file__).with_name("schema.json")


def test_committed_schema_is_current() -> None:
    current = COMMITTED.read_text(encoding="utf-8") == schema_json()
    assert current, "run: finetune schema -o finetune/recipe/schema.json"


def test_schema_says_what_it_is_and_refuses_unknown_keys() -> None:
    schema = json.loads(schema_json())
    assert schema["$schema"].endswith("2020-12/schema")
    assert schema["title"] == "finetune recipe"
    sections = [schema, *schema["$defs"].values()]
    assert all(section["additionalProperties"] is False for section in sections)


def test_every_key_has_a_description() -> None:
    for key in all_keys():
        place = place_at(tuple(key.split(".")))
        assert place is not None and place.node.get("description"), key


def test_no_number_may_be_infinite(tmp_path: Path) -> None:
    path = write(tmp_path, MINIMAL)
    places = {key: place_at(tuple(key.split("."))) for key in all_keys()}
    numbers = [
        key for key, place in places.items() if place and any(at.get("type") == "number" for at in place.branches)
    ]
    lines = errors_of(path, *(f"{key}=.inf" for key in numbers))
    assert len(numbers) > 15 and len(lines) >= len(numbers)
    for key in numbers:
        assert any(line.startswith(f"override {key}=.inf: got Infinity; ") for line in lines), key
