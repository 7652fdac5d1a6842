"""The committed JSON schema is the schema, and describes every key."""

from __future__ import annotations

import json
from pathlib import Path

import finetune.recipe
from finetune.recipe.json_schema import schema_json
from finetune.recipe.keys import all_keys, place_at

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
