"""Row shapes: a format is a function from a row to chat messages, and the fields that tell it."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from finetune.errors import DataError, first_line

Message = dict[str, Any]
Tools = list[dict[str, Any]] | None

_SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "system": "system",
    "tool": "tool",
    "function": "tool",
    "function_call": "assistant",
    "observation": "tool",
}
_ROLES = ("system", "developer", "user", "assistant", "tool")


class Conversation(NamedTuple):
    """A row as a chat."""

    messages: list[Message]
    tools: Tools = None
    """What the assistant may call, as JSON schemas."""


class RowError(Exception):
    """A row cannot be used; the message says which column and what was found there."""


@dataclass(frozen=True)
class Fields:
    """A row seen through the recipe's `columns`: the format's field names on the user's columns."""

    row: Mapping[str, Any]
    columns: Mapping[str, str]

    def get(self, field: str) -> Any:
        """The field's value, None where the column is absent or serves as another field."""
        if field not in self.columns and field in self.columns.values():
            return None
        return self.row.get(self.columns.get(field, field))

    def text(self, field: str) -> str:
        """The field's text.

        Raises:
            RowError: it is missing, empty or not text.
        """
        return check_text(self.get(field), f"column {self.columns.get(field, field)!r}")

    def optional_text(self, field: str) -> str:
        """The field's text, empty where it is missing or null."""
        value = self.get(field)
        if value is None or value == "":
            return ""
        return self.text(field)

    def turns(self, field: str) -> list[Mapping[str, Any]]:
        """The field's list of turns.

        Raises:
            RowError: it is not a list of objects, or is empty.
        """
        name = self.columns.get(field, field)
        value = self.get(field)
        if not isinstance(value, (list, tuple)) or not value:
            raise RowError(f"column {name!r} holds {describe(value)}; it must be a list of turns")
        for number, turn in enumerate(value, 1):
            if not isinstance(turn, Mapping):
                raise RowError(f"column {name!r}, turn {number}, holds {describe(turn)}; it must be an object")
        return list(value)

    def tools(self) -> Tools:
        """The field `tools`: a list of objects, or the JSON text of one, as tables carry it; None for none.

        Raises:
            RowError: it is anything else.
        """
        name = f"column {self.columns.get('tools', 'tools')!r}"
        value = self.get("tools")
        if isinstance(value, str):
            check_unicode(value, name)
            try:
                value = load_line(value.encode()) if value.strip() else None
            except RowError as error:
                raise RowError(f"{name}: {error}") from None
        if value is None or value == []:
            return None
        if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
            raise RowError(f"{name} holds {describe(value)}; it must be a list of objects, or its JSON text")
        check_unicode(value, name)
        return value


def describe(value: Any) -> str:
    """What a value is, in a user's words: `null`, `an integer (7)`, `an empty string`."""
    if value is None:
        return "null (or is missing)"
    if isinstance(value, bool):
        return f"a boolean ({value})"
    if isinstance(value, int):
        return f"an integer ({value})"
    if isinstance(value, float):
        return f"a number ({value})"
    if isinstance(value, str):
        return "an empty string" if not value.strip() else f"text ({value[:40]!r})"
    if isinstance(value, (list, tuple)):
        return f"a list of {len(value)}" if value else "an empty list"
    if isinstance(value, Mapping):
        return "an object"
    return f"a {type(value).__name__}"


def check_text(value: Any, where: str) -> str:
    """`value` if it is text with something in it.

    Raises:
        RowError: it is not.
    """
    if not isinstance(value, str) or not value.strip():
        raise RowError(f"{where} holds {describe(value)}; it must be text")
    check_unicode(value, where)
    return value


def check_unicode(value: Any, where: str) -> None:
    """Text, or the texts in a JSON value.

    Raises:
        RowError: one of them holds a lone surrogate, which is legal in JSON and refused by the tokenizer.
    """
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RowError(f"{where} holds text that is not valid Unicode ({error.reason})") from None


def alpaca(fields: Fields) -> list[Message]:
    """instruction, input (optional), output. The user's turn keeps both, for the alpaca template to place."""
    instruction, extra = fields.text("instruction"), fields.optional_text("input")
    user: Message = {"role": "user", "content": instruction}
    if extra:
        user = {
            "role": "user",
            "content": f"{instruction}\n\n{extra}",
            "instruction": instruction,
            "input": extra,
        }
    messages = [user, {"role": "assistant", "content": fields.text("output")}]
    return _with_system(fields, messages)


def messages(fields: Fields) -> list[Message]:
    """OpenAI's messages: role and content, with tool calls passed through, and `weight` where it is 0."""
    return _messages(fields, for_training=True)


def prompt_messages(fields: Fields) -> list[Message]:
    """As `messages`, for a prompt: a turn may be empty, and have any role, which the template takes or refuses."""
    return _messages(fields, for_training=False)


def _messages(fields: Fields, *, for_training: bool) -> list[Message]:
    result = []
    for number, turn in enumerate(fields.turns("messages"), 1):
        role, where = turn.get("role"), f"turn {number}: content"
        if role not in _ROLES and (for_training or not isinstance(role, str)):
            raise RowError(f"turn {number}: role is {describe(role)}; accepted: {', '.join(_ROLES)}")
        message = {key: value for key, value in turn.items() if value is not None and key != "weight"}
        content = _join_parts(turn.get("content"), where)
        if not message.get("tool_calls") and (for_training or not isinstance(content, str)):
            check_text(content, where)
        message["content"] = "" if content is None else content
        for key, value in message.items():
            check_unicode(value, f"turn {number}: {key}")
        result.append({**message, **_weight(turn, role, number)} if for_training else message)
    return result


def _join_parts(content: Any, where: str) -> Any:
    """The text of OpenAI's content parts; anything but a list of parts as it is.

    Raises:
        RowError: a part is not text.
    """
    if not isinstance(content, list) or not content or not all(isinstance(part, Mapping) for part in content):
        return content
    for part in content:
        if part.get("type") != "text":
            raise RowError(f"{where} has a part of type {part.get('type')!r}; only parts of type 'text' are accepted")
        check_text(part.get("text"), f"{where}: text of a part")
    return "".join(part["text"] for part in content)


def sharegpt(fields: Fields) -> list[Message]:
    """ShareGPT's conversations: from (human, gpt, system) and value; or role and content.

    LLaMA-Factory's function_call is an assistant's turn of tool calls, its observation a tool's turn.
    """
    result = []
    system = fields.optional_text("system")
    if system:
        result.append({"role": "system", "content": system})
    for number, turn in enumerate(fields.turns("conversations"), 1):
        speaker = turn.get("from", turn.get("role"))
        role = _SHAREGPT_ROLES.get(speaker) if isinstance(speaker, str) else None
        if role is None:
            accepted = ", ".join(_SHAREGPT_ROLES)
            raise RowError(f"turn {number}: from is {describe(speaker)}; accepted: {accepted}")
        content = check_text(turn.get("value", turn.get("content")), f"turn {number}: value")
        said: Message = {"content": content}
        if speaker == "function_call":
            said = {"content": "", "tool_calls": _tool_calls(content, f"turn {number}: value")}
        result.append({"role": role, **said, **_weight(turn, role, number)})
    return result


def _tool_calls(text: str, where: str) -> list[dict[str, Any]]:
    """The calls in the JSON text of one, or of a list of them, in OpenAI's shape."""
    try:
        value = load_line(text.encode())
    except RowError as error:
        raise RowError(f"{where} of a function_call: {error}") from None
    calls = value if isinstance(value, list) and value else [value]
    for call in calls:
        if not isinstance(call, dict) or not isinstance(call.get("name"), str) or "arguments" not in call:
            raise RowError(f'{where} of a function_call holds {describe(call)}; write {{"name": …, "arguments": …}}')
    check_unicode(calls, where)  # JSON may escape what the text itself did not hold
    return [{"type": "function", "function": {"name": c["name"], "arguments": c["arguments"]}} for c in calls]


def prompt_completion(fields: Fields) -> list[Message]:
    """prompt and completion."""
    pair = [
        {"role": "user", "content": fields.text("prompt")},
        {"role": "assistant", "content": fields.text("completion")},
    ]
    return _with_system(fields, pair)


def text(fields: Fields) -> list[Message]:
    """Plain text, as one message of the role `text`: it is not rendered, every token of it is supervised."""
    return [{"role": "text", "content": fields.text("text")}]


def _weight(turn: Mapping[str, Any], role: str, number: int) -> Message:
    """`weight: 0` where an assistant's turn is not to be trained, else nothing."""
    weight = turn.get("weight")
    if role != "assistant" or weight is None:
        return {}
    if isinstance(weight, bool) or weight not in (0, 1):
        raise RowError(f"turn {number}: weight is {describe(weight)}; accepted: 0 (not trained) and 1")
    return {} if weight else {"weight": 0}


def is_trained(message: Message) -> bool:
    """Whether a message is an assistant's, and not one of `weight: 0`."""
    return message["role"] == "assistant" and "weight" not in message


def _with_system(fields: Fields, turns: list[Message]) -> list[Message]:
    system = fields.optional_text("system")
    return [{"role": "system", "content": system}, *turns] if system else turns


@dataclass(frozen=True)
class Format:
    """A row shape: how it is read and which fields it has."""

    read: Callable[[Fields], list[Message]]
    required: tuple[str, ...]
    optional: tuple[str, ...] = ()


# Recognized in this order: a row with both messages and text is a conversation.
FORMATS: dict[str, Format] = {
    "messages": Format(messages, ("messages",), ("tools",)),
    "sharegpt": Format(sharegpt, ("conversations",), ("system", "tools")),
    "alpaca": Format(alpaca, ("instruction", "output"), ("input", "system")),
    "prompt_completion": Format(prompt_completion, ("prompt", "completion"), ("system",)),
    "text": Format(text, ("text",)),
}


def recognize_format(wanted: str, columns: Mapping[str, str], found: Iterable[str], where: str) -> str:
    """The format's name: `wanted`, or told from the columns that were `found`; checks `columns` on the way.

    Raises:
        DataError: a mapping to no column, or of no field of the format; or columns of no known format.
    """
    present = set(found)
    listed = ", ".join(sorted(present)) or "none"
    for field, column in columns.items():
        if column not in present:
            raise DataError(f"{where}.columns: {field}: {column!r} is no column of the data. Columns found: {listed}.")
    fields = (present - set(columns.values())) | set(columns)
    if wanted != "auto":
        shape = FORMATS[wanted]
        _check_fields(wanted, shape, columns, where)
        missing = [field for field in shape.required if field not in fields]
        if missing:
            raise DataError(
                f"{where}.format: {wanted} needs {', '.join(shape.required)}; missing: {', '.join(missing)}. "
                f"Columns found: {listed}. Set another format, or columns: {{{missing[0]}: your_column}}."
            )
        return wanted
    for name, shape in FORMATS.items():
        if all(field in fields for field in shape.required):
            _check_fields(name, shape, columns, where)
            return name
    shapes = "; ".join(f"{name} ({', '.join(shape.required)})" for name, shape in FORMATS.items())
    advice = "Map yours, e.g. columns: {instruction: question, output: answer}, or let `finetune new` guess."
    if where.startswith("--"):  # an option of `finetune new`, which could not
        advice = (
            "Rename yours, or set data.sources[0].columns: {instruction: your_column, output: your_column} "
            "in a recipe that `finetune recipes copy` gives."
        )
    raise DataError(f"{where}: no known format has these columns. Columns found: {listed}. Known: {shapes}. {advice}")


def _check_fields(name: str, shape: Format, columns: Mapping[str, str], where: str) -> None:
    known = (*shape.required, *shape.optional)
    for field in columns:
        if field not in known:
            raise DataError(f"{where}.columns: {name} has no field {field!r}; its fields: {', '.join(known)}.")


def parse_conversation(
    payload: bytes | Mapping[str, Any] | RowError, shape: Format, columns: Mapping[str, str]
) -> Conversation:
    """Messages and tools of one raw row, a JSON line or an object; a row that could not be read says why.

    Raises:
        RowError: the row cannot be used.
    """
    if isinstance(payload, RowError):
        raise payload
    row: Any = load_line(payload) if isinstance(payload, bytes) else payload
    if not isinstance(row, Mapping):
        raise RowError(f"the row is {describe(row)}; it must be an object with columns")
    fields = Fields(row, columns)
    return Conversation(shape.read(fields), fields.tools() if "tools" in shape.optional else None)


def digest_of(row: Conversation) -> int:
    """64 bits of a hash of a row's messages, and tools if it has any: rows of equal content are equal rows."""
    content = row if row.tools else row.messages
    text = json.dumps(content, ensure_ascii=True, sort_keys=True, default=str)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def load_line(line: bytes) -> Any:
    """One JSON line.

    Raises:
        RowError: it is not valid JSON, not UTF-8, or names a key of an object twice.
    """
    try:
        return json.loads(line, object_pairs_hook=each_key_once)
    except UnicodeDecodeError as error:
        raise RowError(f"not UTF-8 (byte {error.start} of the line)") from None
    except json.JSONDecodeError as error:
        length = len(error.doc)
        at = f"at character {error.pos + 1} of {length}" if error.pos < length else "where the line ends"
        raise RowError(f"not valid JSON: {error.msg.removesuffix(' at')} {at}") from None
    except RecursionError:
        raise RowError("not readable as JSON: nested too deeply") from None
    except ValueError as error:  # Python reads no integer of more than 4,300 digits
        raise RowError(f"not readable as JSON: {first_line(error)}") from None


def each_key_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON, of which no key stands twice: one of the two values would be lost.

    Raises:
        RowError: one does.
    """
    row = dict(pairs)
    if len(row) < len(pairs):
        repeated = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise RowError(f"the key {repeated!r} stands twice in one object; rename or remove one")
    return row
