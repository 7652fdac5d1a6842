"""The recipe's JSON schema, for editors and for tools that write recipes."""

from __future__ import annotations

import json
import re

from finetune.recipe.keys import json_schema

# A schema as `schema_json` writes it: its own title, not that of a key in it.
SCHEMA_MARK = re.compile(rb'\{\n  "\$schema": .*\n  "title": "finetune recipe"', re.DOTALL)


def schema_json() -> str:
    """The JSON schema (draft 2020-12) of a recipe as text; `finetune/recipe/schema.json` is a copy."""
    schema = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **json_schema(),
        "title": "finetune recipe",
    }
    return json.dumps(schema, indent=2, ensure_ascii=False) + "\n"
