"""A merged model for Ollama: a GGUF file and the Modelfile that `ollama create` reads.

Ollama fills Go templates, not Jinja. The Go template is derived: the chat template is rendered with probes, what
stands around them becomes the Go template's text, and both must then render a set of conversations alike. A
template that does more than put text around messages fails that and is refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from finetune.errors import DataError
from finetune.files import write_atomic

Message = dict[str, str]
Render = Callable[[list[Message], bool], str]  # (messages, add_generation_prompt) -> text

MODEL_FILE = "model.gguf"
MODELFILE = "Modelfile"
# What it opens with.
MODELFILE_MARK = re.compile(rb"FROM \./model\.gguf\n")
# What tells Alpaca's questions with an input from those without one; each kind has its own opening line.
_INPUT = "\n\n### Input:\n"
_ROLES = ("system", "user", "assistant")
_PROBES = {role: f"finetune-probe-{role}" for role in _ROLES}


@dataclass(frozen=True)
class TurnTemplate:
    """A chat template that only puts text around messages."""

    opening: str  # before everything, as BOS
    before: dict[str, str]  # by role
    after: dict[str, str]
    generation: str  # what asks for an answer
    system: str  # the system prompt that the template writes of its own; empty for none
    system_with_input: str = ""  # the same where the first question has an input; empty where that is no matter

    def render(self, messages: list[Message]) -> str:
        """What Ollama sends to the model for `messages`."""
        if self.system and not any(message["role"] == "system" for message in messages):
            has_input = self.system_with_input and _INPUT in messages[0]["content"]
            own = self.system_with_input if has_input else self.system
            messages = [{"role": "system", "content": own}, *messages]
        turns = [self.before[m["role"]] + m["content"] + self.after[m["role"]] for m in messages]
        return self.opening + "".join(turns) + self.generation

    def go_template(self) -> str:
        """The same in Go's template language."""
        roles = [role for role in _ROLES if role in self.before]
        cases = "".join(
            f'{{{{ {"if" if number == 0 else "else if"} eq .Role "{role}" }}}}'
            f"{self.before[role]}{{{{ .Content }}}}{self.after[role]}"
            for number, role in enumerate(roles)
        )
        turns = f"{{{{ range .Messages }}}}{cases}{{{{ end }}}}{{{{ end }}}}{self.generation}"
        return f"{self.opening}{self._own_system()}{turns}"

    def _own_system(self) -> str:
        """The system prompt by the first question, where it depends on that; else Ollama has it from the Modelfile.

        Go templates cannot search a text, but one can call itself on what follows the first byte.
        """
        if not self.system_with_input:
            return ""
        without, with_input = (
            self.before["system"] + text + self.after["system"] for text in (self.system, self.system_with_input)
        )
        size = len(_INPUT.encode())
        return (
            f'{{{{ define "own" }}}}{{{{ if lt (len .) {size} }}}}{without}'
            f"{{{{ else if eq (slice . 0 {size}) `{_INPUT}` }}}}{with_input}"
            '{{ else }}{{ template "own" (slice . 1) }}{{ end }}{{ end }}'
            "{{ if not .System }}{{ with .Messages }}"
            '{{ template "own" (index . 0).Content }}{{ end }}{{ end }}'
        )

    def without_bos(self, bos: str) -> TurnTemplate:
        """The same without the BOS that opens it, for a model file that has it added to every prompt."""
        if self.opening.startswith(bos):
            return replace(self, opening=self.opening.removeprefix(bos))
        if self.system and self.before["system"].startswith(bos):
            return replace(self, before={**self.before, "system": self.before["system"].removeprefix(bos)})
        return self


def derive_template(render: Render) -> TurnTemplate:
    """The turns of a chat template.

    Raises:
        DataError: the template does more than put text around messages, or its text cannot stand in a Modelfile.
    """
    try:
        found = _derive(render)
        agrees = all(found.render(messages) == render(messages, True) for messages in _conversations(found))
    except (DataError, ValueError, IndexError) as error:
        raise _refusal(str(error)) from error
    if not agrees:
        raise _refusal("it treats some turns unlike others")
    text = found.go_template()
    literal = [found.opening, found.generation, *found.before.values(), *found.after.values()]
    literal += [found.system, found.system_with_input] if found.system_with_input else []
    if '"""' in text or any("{{" in part for part in literal):
        raise _refusal('its text holds """ or {{')
    if odd := next((c for c in text if not (c.isprintable() or c in "\n\t")), None):
        raise _refusal(f"its text holds {odd!r}, which Ollama drops")
    return found


def modelfile(template: TurnTemplate, stops: list[str], system: str | None, model_file: str = MODEL_FILE) -> str:
    """The Modelfile: FROM, TEMPLATE, the texts that end a turn, and the system prompt, if any."""
    lines = [f"FROM ./{model_file}", f'TEMPLATE """{template.go_template()}"""']
    lines += [f"PARAMETER stop {_quoted(stop)}" for stop in stops]
    if system and "system" not in template.before:
        raise DataError("data.system: this chat template has no turn for a system prompt; export --to gguf instead")
    if chosen := system or ("" if template.system_with_input else template.system):
        if '"""' in chosen:
            raise DataError('data.system: holds """, which a Modelfile cannot')
        lines.append(f'SYSTEM """{chosen}"""')
    return "\n".join(lines) + "\n"


def write_modelfile(folder: Path, text: str) -> Path:
    """Write the Modelfile into `folder`."""
    path = folder / MODELFILE
    write_atomic(path, text)
    return path


def _derive(render: Render) -> TurnTemplate:
    user, answer = _message("user"), _message("assistant")
    alone, asked = render([user], False), render([user], True)
    pair, full = render([user, answer], False), render([user, answer, user], False)
    if not all(text.startswith(alone) for text in (asked, pair, full)):
        raise ValueError("it writes earlier turns anew when another follows")
    # The answer as it stands in a history; some templates write the last one differently (Qwen3's empty thoughts).
    before_answer, rest = _around(full[len(alone) :], "assistant")
    after_answer = _around(pair[len(alone) :], "assistant")[1]
    again = rest.removeprefix(after_answer)  # a question without what opens a conversation
    opening = alone.removesuffix(again)
    if after_answer + again != rest or opening + again != alone:
        raise ValueError("its first question is written unlike the second")
    before_user, after_user = _around(again, "user")
    before = {"user": before_user, "assistant": before_answer}
    after = {"user": after_user, "assistant": after_answer}
    found = TurnTemplate(opening, before, after, asked[len(alone) :], "")
    return _with_system(found, render, again)


def _with_system(found: TurnTemplate, render: Render, again: str) -> TurnTemplate:
    """The template with its system turn, if it has a role for it; some fold its text into the first question."""
    try:
        told = render([_message("system"), _message("user")], False)
    except DataError:
        return found
    if not told.endswith(again):
        return found
    prefix, suffix = _around(told.removesuffix(again), "system")
    opening = found.opening
    own = ""
    if prefix.startswith(opening):
        prefix = prefix.removeprefix(opening)
    elif opening.startswith(prefix) and opening.endswith(suffix):
        # What opens a conversation is a system turn of the template's own.
        own, opening = opening[len(prefix) : len(opening) - len(suffix)], ""
    else:
        raise ValueError("it opens conversations with and without a system prompt differently")
    before, after = {**found.before, "system": prefix}, {**found.after, "system": suffix}
    found = replace(found, opening=opening, before=before, after=after, system=own)
    return _with_input(found, render) if own else found


def _with_input(found: TurnTemplate, render: Render) -> TurnTemplate:
    """The template with the system prompt that it writes of its own for a first question with an input."""
    question = _with_marker("user")
    text = render([question], False)
    rest = found.before["user"] + question["content"] + found.after["user"]
    head, tail = found.before["system"], found.after["system"] + rest
    if not (text.startswith(head) and text.endswith(tail)):
        return found
    own = text[len(head) : len(text) - len(tail)]
    return found if own == found.system else replace(found, system_with_input=own)


def _around(text: str, role: str) -> tuple[str, str]:
    before, probe, after = text.partition(_PROBES[role])
    if not probe:
        raise ValueError(f"it does not write the {role}'s text")
    return before, after


def _message(role: str) -> Message:
    return {"role": role, "content": _PROBES[role]}


def _with_marker(role: str) -> Message:
    return {"role": role, "content": f"{_PROBES[role]}{_INPUT}{_PROBES[role]}"}


def _conversations(template: TurnTemplate) -> list[list[Message]]:
    """What both renderings are compared on."""
    user, answer = {"role": "user", "content": "What is 1 + 1?"}, {"role": "assistant", "content": "2\n\nTwo."}
    told = _with_marker("user")
    plain = [[user], [user, answer, user], [user, answer, user, answer, user]]
    plain += [[told], [told, answer, user], [user, answer, told]]
    if "system" not in template.before:
        return plain
    system = {"role": "system", "content": "Be brief.\nBe kind."}
    return [*plain, *([system, *messages] for messages in plain)]


def _quoted(text: str) -> str:
    """The text as a Modelfile's value; there are no escapes, and what stands between the quotes is taken as it is."""
    if '"""' in text:
        raise DataError(f'data.template: the text {text!r} ends a turn, and holds """, which a Modelfile cannot')
    return f'"""{text}"""' if '"' in text else f'"{text}"'


def _refusal(why: str) -> DataError:
    return DataError(
        f"data.template: cannot be written as Ollama's Go template: {why}. Export --to gguf, which carries the "
        "template itself, and serve it with llama.cpp (llama-server --jinja)"
    )
