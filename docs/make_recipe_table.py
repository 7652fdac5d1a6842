"""Writes the README's table of recipe keys from the schema.

python docs/make_recipe_table.py            # rewrite the table in README.md
python docs/make_recipe_table.py --check    # exit 1 if it is not what the schema says
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from finetune.recipe.keys import Place, root

README = Path(__file__).resolve().parents[1] / "README.md"
START = "<!-- recipe-table: made by docs/make_recipe_table.py -->"
END = "<!-- /recipe-table -->"


def main() -> int:
    """Rewrite the table, or compare it."""
    old = README.read_text(encoding="utf-8")
    new = with_table(old)
    if "--check" in sys.argv[1:]:
        return int(new != old)
    README.write_text(new, encoding="utf-8")
    return 0


def with_table(text: str) -> str:
    """`text` with what stands between the two marks replaced by the table."""
    before, _, rest = text.partition(START)
    _, found, after = rest.partition(END)
    assert found, f"{README} has lost its marks {START} and {END}"
    return f"{before}{START}\n{recipe_table()}{END}{after}"


def recipe_table() -> str:
    """One row a key, in the schema's order; a section's own row comes before its keys."""
    head = "| key | default | accepts | meaning |\n|---|---|---|---|\n"
    return head + "".join(f"| {' | '.join(cells)} |\n" for cells in _rows(root(), "", {}))


def _rows(section: Place, prefix: str, seen: dict[str, str]) -> Iterator[tuple[str, str, str, str]]:
    """The keys of `section`. `seen` has the first place of every kind of section: it is explained once."""
    required = {key for branch in section.branches for key in branch.get("required", [])}
    for key, place in section.keys.items():
        path = prefix + key
        item = place.below(0)
        items = item if item is not None and item.keys else None
        below = items or place
        meaning = _cell(place.node.get("description", ""))
        if not below.keys:
            yield f"`{path}`", _default(place, key in required), _cell(_accepts(place)), meaning
            continue
        inner = f"{path}[]" if items else path
        title = next(branch["title"] for branch in below.branches if "title" in branch)
        known = seen.setdefault(title, inner)
        words = ["a list of sections" if items else "a section"]
        words += [f"like `{known}`"] if known != inner else []
        words += ["or null"] if any(branch.get("type") == "null" for branch in place.branches) else []
        default = _default(place, key in required) if "or null" in words or key in required else ""
        yield f"**`{path}`**", default, " ".join(words), meaning
        if known == inner:
            yield from _rows(below, f"{inner}.", seen)


def _default(place: Place, required: bool) -> str:
    return "required" if required else f"`{_value(place.node.get('default'))}`"


def _value(value: Any) -> str:
    """A value as one would write it in a recipe."""
    if isinstance(value, str):
        return value
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list):
        return f"[{', '.join(map(_value, value))}]"
    return json.dumps(value)


def _accepts(place: Place) -> str:
    words = place.describe()
    for branch in place.branches:
        if "pattern" in branch:
            words = words.replace(branch["pattern"], f"`{branch['pattern']}`")
    return words


def _cell(text: str) -> str:
    return text.replace("|", r"\|").replace("\n", " ")


if __name__ == "__main__":
    sys.exit(main())
