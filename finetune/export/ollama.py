"""A merged model for Ollama: a GGUF file and the Modelfile that `ollama create` reads.

Ollama fills Go templates, not Jinja. The Go template is derived: the chat template is rendered with probes, what
stands around them becomes the Go template's text, and both must then render a set of conversations alike. A
template that does more than put text around messages fails that and is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from finetune.errors import DataError
from finetune.files import write_atomic

Message = dict[str, str]
Render = Callable[[list[Message], bool], str]  # (messages, add_generation_prompt) -> text

MODEL_FILE = "model.gguf"
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

    def render(self, messages: list[Message]) -> str:
        """What Ollama sends to the model for `messages`."""
        if self.system and not any(message["role"] == "system" for message in messages):
            messages = [{"role": "system", "content": self.system}, *messages]
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
        return f"{self.opening}{{{{ range .Messages }}}}{cases}{{{{ end }}}}{{{{ end }}}}{self.generation}"

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
    if '"""' in text or any("{{" in part for part in literal):
        raise _refusal('its text holds """ or {{')
    return found


def modelfile(template: TurnTemplate, stops: list[str], system: str | None, model_file: str = MODEL_FILE) -> str:
    """The Modelfile: FROM, TEMPLATE, the texts that end a turn, and the system prompt, if any."""
    lines = [f"FROM ./{model_file}", f'TEMPLATE """{template.go_template()}"""']
    lines += [f'PARAMETER stop "{_quoted(stop)}"' for stop in stops]
    if system and "system" not in template.before:
        raise DataError("data.system: this chat template has no turn for a system prompt; export --to gguf instead")
    if chosen := system or template.system:
        if '"""' in chosen:
            raise DataError('data.system: holds """, which a Modelfile cannot')
        lines.append(f'SYSTEM """{chosen}"""')
    return "\n".join(lines) + "\n"


def write_modelfile(folder: Path, text: str) -> Path:
    """Write the Modelfile into `folder`."""
    path = folder / "Modelfile"
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
    return replace(found, opening=opening, before=before, after=after, system=own)


def _around(text: str, role: str) -> tuple[str, str]:
    before, probe, after = text.partition(_PROBES[role])
    if not probe:
        raise ValueError(f"it does not write the {role}'s text")
    return before, after


def _message(role: str) -> Message:
    return {"role": role, "content": _PROBES[role]}


def _conversations(template: TurnTemplate) -> list[list[Message]]:
    """What both renderings are compared on."""
    user, answer = {"role": "user", "content": "What is 1 + 1?"}, {"role": "assistant", "content": "2\n\nTwo."}
    plain = [[user], [user, answer, user], [user, answer, user, answer, user]]
    if "system" not in template.before:
        return plain
    system = {"role": "system", "content": "Be brief.\nBe kind."}
    return [*plain, *([system, *messages] for messages in plain)]


def _quoted(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def _refusal(why: str) -> DataError:
    return DataError(
        f"data.template: cannot be written as Ollama's Go template: {why}. Export --to gguf, which carries the "
        "template itself, and serve it with llama.cpp (llama-server --jinja)"
    )
