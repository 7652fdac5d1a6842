"""Chat templates: which one, its terminator, its BOS; and prompts encoded exactly as a server encodes them.

Named templates are the `.jinja` files of the `templates` folder beside this module. A template is rendered by
transformers' own renderer, so what is trained is what `apply_chat_template` serves.
"""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.console import say, warn
from finetune.data.formats import Conversation, Message, RowError, Tools, check_unicode
from finetune.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from finetune.recipe.schema import DataSection

TEMPLATES_DIR = Path(__file__).parent / "templates"
_PROBE_USER = "finetune probe question"
_PROBE_SYSTEM = "finetune probe instructions"
_PROBE_ANSWER = "finetune probe answer"
# An id of nine characters, as Mistral's templates ask for.
_PROBE_CALL: Message = {"type": "function", "id": "finetune0", "function": {"name": "finetune_probe", "arguments": {}}}
# What an assistant's turn may hold beside its content: calls of tools, and its thoughts as servers name them.
_BESIDE_TEXT = ("tool_calls", "reasoning_content", "reasoning", "thinking")
# What a template is handed with every conversation, and a variable that the recipe has set before all else.
_GIVEN = ("messages", "tools", "documents", "add_generation_prompt")
_SET = re.compile(r'\{%- set (\w+) = (?:true|false|[-+.\deE]+|"(?:[^"\\]|\\.)*") %\}')
_DATE_CALL = re.compile(r"""strftime_now\(\s*(?:"([^"\\]*)"|'([^'\\]*)')\s*\)""")


@dataclass(frozen=True)
class ChatTemplate:
    """A Jinja chat template and what probing it with a tokenizer has shown."""

    name: str
    """`tokenizer`, `alpaca`, `chatml`, `plain`, or the file's name."""
    source: str
    """The Jinja text, with the day's date in the place of calls for it."""
    stop_token_ids: tuple[int, ...]
    """Tokens that end an assistant turn: that of an answer, that of a tool call where it is another, and EOS."""
    tail: str = ""
    """What follows an assistant turn's text: the terminator and, often, a newline."""
    terminator: str = ""
    """The text of the terminator, the last thing of a turn that is supervised."""
    system_role: bool = True
    """False where the template has no system role: system text then opens the first user turn."""
    date: datetime.date | None = None
    """The day that the template prints; None where it prints none."""


def load_template(tokenizer: PreTrainedTokenizerBase, data: DataSection) -> ChatTemplate:
    """The template that `data.template` names; also becomes `tokenizer.chat_template`, to be saved with it.

    Raises:
        DataError: no such template, a tokenizer without one, a template that does not render, that ends
            assistant turns with no token, or that writes two BOS tokens.
    """
    name, source = _find_source(tokenizer, data)
    if name == "chatml":
        source = _chatml_for(tokenizer, source)
    source = _with_variables(name, source, data.template_variables)
    has_bos_habit = bos_habit(tokenizer)
    special = dict(tokenizer.special_tokens_map)
    prompt = _probe(name, source, special, [_user()], add_generation_prompt=True)
    if has_bos_habit and not prompt.startswith(str(tokenizer.bos_token)):
        if name == "tokenizer":
            warn("the tokenizer's own chat template writes no BOS, though the tokenizer adds one to plain text")
        else:
            source = "{{- bos_token -}}" + source
            prompt = _probe(name, source, special, [_user()], add_generation_prompt=True)
    _check_one_bos(tokenizer, name, prompt)
    tail, terminator = _probe_tail(tokenizer, name, source)
    terminator_id = int(tokenizer.convert_tokens_to_ids(terminator))
    stop_ids = [terminator_id, *_probe_call_end(tokenizer, source)]
    if tokenizer.eos_token_id is not None:
        stop_ids.append(int(tokenizer.eos_token_id))
    tokenizer.chat_template = source
    system_role = _has_system_role(source, special)
    date = (data.date or datetime.date.today()) if "strftime_now" in source else None
    if date is not None:
        source = print_date(source, date)
    return ChatTemplate(name, source, tuple(dict.fromkeys(stop_ids)), tail, terminator, system_role, date)


def unprinted_date(template: ChatTemplate, data: DataSection) -> str | None:
    """What to say of a `data.date` that the template does not print."""
    if data.date is None or template.date is not None:
        return None
    return f"data.date: {data.date} has no effect: the chat template ({template.name}) prints no date"


def print_date(source: str, date: datetime.date) -> str:
    """`source` with `date` written out where it asks for today's, so that it renders the same on any day."""
    midnight = datetime.datetime.combine(date, datetime.time())
    source = _DATE_CALL.sub(lambda call: json.dumps(midnight.strftime(call[1] or call[2] or "")), source)
    if re.search(r"strftime_now\s*\(", source):
        warn("the chat template asks for today's date in a format that it computes: it prints each day's own")
    return source


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase,
    template: ChatTemplate,
    messages: list[Message],
    system: str | None = None,
    tools: Tools = None,
) -> list[int]:
    """Token ids of `messages` with the generation prompt: what a server feeds the model.

    `system` is used where `messages` carry none. The same ids as
    `tokenizer.apply_chat_template(messages, tools, add_generation_prompt=True)`.

    Raises:
        DataError: the template refuses these messages, or a text is not valid Unicode.
    """
    full = apply_system(messages, system, template.system_role)
    text = render(template.source, dict(tokenizer.special_tokens_map), full, tools, add_generation_prompt=True)
    try:
        check_unicode(text, "the conversation")
    except RowError as error:
        raise DataError(str(error)) from None
    return list(tokenizer(text, add_special_tokens=False).input_ids)


def render(
    source: str,
    special_tokens: Mapping[str, Any],
    messages: list[Message],
    tools: Tools = None,
    *,
    add_generation_prompt: bool,
) -> str:
    """The text of `messages` and `tools` under the Jinja template `source`, as `apply_chat_template` writes it.

    Raises:
        DataError: the template refuses these messages.
    """
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        texts, _ = render_jinja_template(
            # a turn's weight is for training alone
            conversations=[[{key: turn[key] for key in turn if key != "weight"} for turn in messages]],
            tools=tools,
            chat_template=source,
            add_generation_prompt=add_generation_prompt,
            **special_tokens,
        )
    except Exception as error:  # a template is a program of the user's: it may raise anything
        raise DataError(f"the chat template refuses this conversation: {error}") from error
    return str(texts[0])


def apply_system(messages: list[Message], system: str | None, system_role: bool) -> list[Message]:
    """`messages` with the default system prompt; merged into the user turn where there is no system role."""
    if system and not any(message["role"] == "system" for message in messages):
        messages = [{"role": "system", "content": system}, *messages]
    if system_role or not messages or messages[0]["role"] != "system":
        return messages
    opening = str(messages[0]["content"])
    if len(messages) < 2 or messages[1]["role"] != "user":
        return [{"role": "user", "content": opening}, *messages[1:]]
    merged = dict(messages[1])
    for field in ("content", "instruction"):
        if field in merged:
            merged[field] = f"{opening}\n\n{merged[field]}"
    return [merged, *messages[2:]]


def hidden_keys(source: str, row: Conversation) -> list[str]:
    """What `row` has beside its texts and the Jinja template `source` never names, so that no model sees it."""
    found = {key for message in row.messages for key in _BESIDE_TEXT if message.get(key)}
    found.update(["tools"] if row.tools else [])
    return sorted(key for key in found if not re.search(rf"\b{key}\b", source))


def check_shown(text: str, message: Message) -> None:
    """Whether a template has written anything of an assistant's turn: `text`, without the terminator.

    Raises:
        RowError: it has not: the model would learn to answer with nothing.
    """
    if not text.strip():
        found = ", ".join(key for key in message if key not in ("role", "weight") and message[key])
        raise RowError(
            f"an assistant turn that holds {found} is empty as the chat template writes it, and would be trained as "
            "an empty answer; set a data.template that shows it, give the turn weight 0, or leave the row out"
        )


def bos_habit(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer opens plain text with its BOS token."""
    ids = list(tokenizer("x").input_ids)
    return tokenizer.bos_token_id is not None and len(ids) > 1 and ids[0] == tokenizer.bos_token_id


def added_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Tokens that are cut out of a text before anything else is: text to id, whitespace runs left out."""
    decoder: dict[int, Any] = backend(tokenizer).get_added_tokens_decoder()
    return {
        token.content: index
        for index, token in decoder.items()
        # a normalized token is matched in normalized text: no border that the original text shows
        if token.content.strip() and (token.special or not token.normalized)
    }


def backend(tokenizer: PreTrainedTokenizerBase) -> Any:
    """The tokenizer's Rust object, without truncation or padding left over from an earlier call.

    Raises:
        DataError: the tokenizer is not a fast one.
    """
    rust = getattr(tokenizer, "backend_tokenizer", None)
    if rust is None or not hasattr(rust, "encode_batch"):
        raise DataError(
            f"model.tokenizer: {type(tokenizer).__name__} is not a fast tokenizer; "
            "use one that has a tokenizer.json (AutoTokenizer converts most others)."
        )
    rust.no_truncation()
    rust.no_padding()
    return rust


def _find_source(tokenizer: PreTrainedTokenizerBase, data: DataSection) -> tuple[str, str]:
    wanted = data.template
    if wanted == "auto":
        own = tokenizer.chat_template
        if isinstance(own, dict):
            own = own.get("default")
        if own:
            return "tokenizer", str(own)
        if all(source.format == "text" or source.path.endswith(".txt") for source in data.sources):
            wanted = "plain"  # plain text is not rendered; a prompt is then the text itself
        else:
            raise DataError(
                "data.template: auto asks for the tokenizer's own chat template, and this one has none. Set "
                "data.template: alpaca (or chatml, plain, a .jinja file); for plain text set format: text."
            )
    named = TEMPLATES_DIR / f"{wanted}.jinja"
    if re.fullmatch(r"\w+", wanted) and named.is_file():
        if not tokenizer.eos_token:
            raise DataError(f"data.template: {wanted} ends a turn with the EOS token, and this tokenizer has none.")
        return wanted, named.read_text(encoding="utf-8").strip()
    path = Path(wanted).expanduser()
    try:
        return path.name, path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        names = ", ".join(sorted(file.stem for file in TEMPLATES_DIR.glob("*.jinja")))
        raise DataError(
            f"data.template: {wanted!r} is neither auto, {names}, nor a readable Jinja file ({error})."
        ) from error


def _chatml_for(tokenizer: PreTrainedTokenizerBase, source: str) -> str:
    if "<|im_end|>" in backend(tokenizer).get_vocab(with_added_tokens=True):
        return source
    say("chatml: the tokenizer has no <|im_end|>; turns end with its EOS token instead")
    return source.replace("'<|im_end|>'", "eos_token")


def _with_variables(name: str, source: str, variables: Mapping[str, bool | int | float | str]) -> str:
    """`source` with `variables` set before all else: a server that is told nothing renders the same.

    Raises:
        DataError: the template `name` asks for no such variable.
    """
    kept, body = "", source
    while earlier := _SET.match(body):  # a base that was trained with values of its own
        kept += "" if earlier[1] in variables else earlier[0]
        body = body[earlier.end() :]
    for variable in variables:
        if variable in _GIVEN or not re.search(rf"\b{variable}\b", body):
            why = "is given anew with every conversation" if variable in _GIVEN else "does not occur in it"
            near = get_close_matches(variable, set(re.findall(r"\w+", body)) - set(_GIVEN), n=1, cutoff=0.8)
            hint = f"; did you mean {near[0]}?" if near else "."
            raise DataError(
                f"data.template_variables: the chat template ({name}) cannot be told {variable}, which {why}{hint}"
            )
    words = {True: "true", False: "false"}
    values = {name: words[value] if isinstance(value, bool) else json.dumps(value) for name, value in variables.items()}
    return "".join(f"{{%- set {name} = {value} %}}" for name, value in values.items()) + kept + body


def _user() -> Message:
    return {"role": "user", "content": _PROBE_USER}


def _probe(
    name: str,
    source: str,
    special: Mapping[str, Any],
    messages: list[Message],
    *,
    add_generation_prompt: bool,
) -> str:
    try:
        return render(source, special, messages, add_generation_prompt=add_generation_prompt)
    except DataError as error:
        raise DataError(f"data.template: {name} does not render a question and an answer: {error}") from error


def _check_one_bos(tokenizer: PreTrainedTokenizerBase, name: str, prompt: str) -> None:
    bos = tokenizer.bos_token_id
    if bos is not None and list(tokenizer(prompt, add_special_tokens=False).input_ids)[:2] == [bos, bos]:
        raise DataError(
            f"data.template: {name} opens a conversation with two BOS tokens ({tokenizer.bos_token}). "
            "Take one out of the template (or its system/bos line)."
        )


def _probe_tail(tokenizer: PreTrainedTokenizerBase, name: str, source: str) -> tuple[str, str]:
    """What stands after an assistant's text, and the first token in it that ends the turn."""
    messages = [_user(), {"role": "assistant", "content": _PROBE_ANSWER}]
    special = dict(tokenizer.special_tokens_map)
    text = _probe(name, source, special, messages, add_generation_prompt=False)
    at = text.rfind(_PROBE_ANSWER)
    if at < 0:
        raise DataError(f"data.template: {name} does not write the assistant's text.")
    tail = text[at + len(_PROBE_ANSWER) :]
    tokens = added_tokens(tokenizer)
    if tokenizer.eos_token:
        tokens.setdefault(str(tokenizer.eos_token), int(tokenizer.eos_token_id))
    found = token_pattern(tokens).search(tail) if tokens else None
    if found is None:
        raise DataError(
            f"data.template: {name} ends an assistant turn with {tail!r}, which holds no special token of "
            "this tokenizer, so a model trained with it never learns to stop. Write {{ eos_token }} after "
            "the assistant's text in the template, or take data.template: alpaca or chatml."
        )
    return tail, found.group()


def _probe_call_end(tokenizer: PreTrainedTokenizerBase, source: str) -> list[int]:
    """The token that ends a turn of a tool call, such as gpt-oss's <|call|>; none where the template writes no calls.

    Nor where each of several calls ends with it: an answer that stopped there would lack the others.
    """
    tokens, special = added_tokens(tokenizer), dict(tokenizer.special_tokens_map)

    def written(calls: list[Message]) -> str:
        turn = {"role": "assistant", "content": "", "tool_calls": calls}
        try:
            return render(source, special, [_user(), turn], add_generation_prompt=False).rstrip()
        except DataError:
            return ""

    text = written([_PROBE_CALL])
    # a template that drops an empty turn ends in what ends the question
    if not tokens or _PROBE_CALL["function"]["name"] not in text:
        return []
    ends = [found.group() for found in token_pattern(tokens).finditer(text) if found.end() == len(text)]
    several = written([_PROBE_CALL, {**_PROBE_CALL, "id": "finetune1"}])
    return [tokens[end] for end in ends if several.count(end) <= text.count(end)]


def token_pattern(tokens: Mapping[str, int]) -> re.Pattern[str]:
    """A pattern that finds any of the token texts, the longest first."""
    return re.compile("|".join(re.escape(text) for text in sorted(tokens, key=len, reverse=True)))


def _has_system_role(source: str, special: Mapping[str, Any]) -> bool:
    messages = [{"role": "system", "content": _PROBE_SYSTEM}, _user()]
    try:
        return _PROBE_SYSTEM in render(source, special, messages, add_generation_prompt=True)
    except DataError:
        return False


def special_tokens_of(tokens: Mapping[str, Any]) -> dict[str, Any]:
    """Special tokens as plain text, as a template sees them."""
    return {name: value if isinstance(value, (str, list)) else str(value) for name, value in tokens.items()}
