"""Reads YAML as version 1.2 means it (`2e-4` is a number, `on` is text) and keeps the line of every key."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

import yaml

KeyPath = tuple[str, ...]

Number = TypeVar("Number", int, float)

_LARGEST_INTEGER, _LARGEST_NUMBER = 2**63 - 1, 3.4e38  # of a seed, and of fp32
_MAX_VALUES = 100_000  # a recipe has hundreds; more can only be aliases that multiply

_TAG = "tag:yaml.org,2002:"
# Source: YAML 1.2.2, section 10.3.2 (core schema); `_` between digits is kept from 1.1.
_RESOLVERS = (
    (f"{_TAG}bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), "tTfF"),
    (f"{_TAG}null", re.compile(r"^(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""]),
    (f"{_TAG}int", re.compile(r"^(?:[-+]?[0-9][0-9_]*|0o[0-7]+|0x[0-9a-fA-F]+)$"), "-+0123456789"),
    (
        f"{_TAG}float",
        re.compile(
            r"^(?:[-+]?(?:\.[0-9]+|[0-9][0-9_]*(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?"
            r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
        ),
        "-+0123456789.",
    ),
)


class RecipeLoader(yaml.SafeLoader):
    """A safe YAML loader with the scalars of YAML 1.2."""

    yaml_implicit_resolvers: dict[str, Any] = {}

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """The value of a node; what cannot be read is named with its place."""
        try:
            return super().construct_object(node, deep=deep)
        except (ValueError, KeyError, AttributeError) as error:  # `!!bool maybe` and `!!timestamp x` raise the last two
            kind = node.tag.removeprefix(_TAG)
            problem = str(error) if isinstance(error, ValueError) else f"{node.value!r} cannot be read as {kind}"
            raise yaml.constructor.ConstructorError(problem=problem, problem_mark=node.start_mark) from None

    def construct_number(self, node: yaml.ScalarNode) -> int:
        """An integer: decimal, `0o17` or `0x1f`; a leading zero changes nothing."""
        text = self.construct_scalar(node).replace("_", "")
        return self._within(_LARGEST_INTEGER, int(text, 0 if text[:2] in ("0o", "0x") else 10))

    def construct_decimal(self, node: yaml.ScalarNode) -> float:
        """A number; .inf and .nan too, which the schema refuses."""
        value = self.construct_yaml_float(node)
        return self._within(_LARGEST_NUMBER, value) if math.isfinite(value) else value

    def construct_text(self, node: yaml.ScalarNode) -> str:
        """Text that can be written to a file, and name one."""
        text: str = self.construct_scalar(node)
        if unfit := re.search("[\0\ud800-\udfff]", text):
            raise ValueError(f"the character U+{ord(unfit[0]):04X} is not allowed in a recipe")
        return text

    def _within(self, largest: Number, value: Number) -> Number:
        if abs(value) > largest:
            raise ValueError(f"{value:.3g} is beyond what any key takes")
        return value


class RecipeDumper(yaml.SafeDumper):
    """Quotes whatever `RecipeLoader`, or a YAML 1.1 parser, would not read back as text."""


for _tag, _pattern, _first in _RESOLVERS:
    RecipeLoader.add_implicit_resolver(_tag, _pattern, list(_first))
    RecipeDumper.add_implicit_resolver(_tag, _pattern, list(_first))
RecipeLoader.add_constructor(f"{_TAG}int", RecipeLoader.construct_number)
RecipeLoader.add_constructor(f"{_TAG}float", RecipeLoader.construct_decimal)
RecipeLoader.add_constructor(f"{_TAG}str", RecipeLoader.construct_text)


class YamlError(Exception):
    """Text that is not YAML, or not one document; line and column count from 1."""

    def __init__(self, problem: str, line: int = 1, column: int = 1) -> None:
        super().__init__(problem)
        self.problem, self.line, self.column = problem, line, column


@dataclass
class Document:
    """A YAML text: value, line of every key path, keys given twice (path, line, first line), scalar spans."""

    value: Any
    lines: dict[KeyPath, int] = field(default_factory=dict)
    duplicates: list[tuple[KeyPath, int, int]] = field(default_factory=list)
    spans: dict[KeyPath, tuple[int, int]] = field(default_factory=dict)


def parse_yaml(text: str) -> Document:
    """Parse one document. Keys in paths are text; list items are numbered from 0.

    Raises:
        YamlError: the text is not YAML, holds several documents, or an alias contains itself.
    """
    try:
        loader = RecipeLoader(text)
        node = loader.get_single_node()
        if node is None:
            return Document(None)
        document = Document(None)
        for count, (path, at, line) in enumerate(_walk(node, (), ())):
            if count > _MAX_VALUES:
                raise YamlError("more values than a recipe can have; write the aliases out", line)
            _note(document, path, at, line)
        document.value = loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise YamlError(error.problem or str(error), *((mark.line + 1, mark.column + 1) if mark else ())) from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise YamlError(f"the character U+{ord(text[error.position]):04X} is not allowed in YAML", line) from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise YamlError(str(error) or type(error).__name__) from None
    return document


def _note(document: Document, path: KeyPath, node: yaml.Node, line: int) -> None:
    within_duplicate = any(path[: len(above)] == above for above, _, _ in document.duplicates)
    if path in document.lines and not within_duplicate:
        document.duplicates.append((path, line, document.lines[path]))
    document.lines[path] = line
    if isinstance(node, yaml.ScalarNode):
        document.spans[path] = (node.start_mark.index, node.end_mark.index)


def _walk(node: yaml.Node, path: KeyPath, above: tuple[int, ...]) -> Iterator[tuple[KeyPath, yaml.Node, int]]:
    """Every value with its path and the line of its key, in the order of the text."""
    if id(node) in above:
        raise YamlError("an alias that contains itself", node.start_mark.line + 1, node.start_mark.column + 1)
    above = (*above, id(node))
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            name = key.value if isinstance(key, yaml.ScalarNode) else "?"
            yield (*path, name), value, key.start_mark.line + 1
            yield from _walk(value, (*path, name), above)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            yield (*path, str(index)), value, value.start_mark.line + 1
            yield from _walk(value, (*path, str(index)), above)
