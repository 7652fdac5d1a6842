"""Turn the facts of one ticket into an ordered list of sentences."""

from __future__ import annotations

import re
from dataclasses import dataclass

from draw import Draw
from noise import Sentence
from wording import Wording

# What a product group can suffer from, beside what any product can ("any").
TRAITS = {
    "gadget": ("device", "app", "electric"),
    "display": ("device", "screen", "electric"),
    "appliance": ("electric",),
    "furniture": ("assemble",),
    "plain": (),
}
_NOUN_KIND = {"late": "order", "refund": "order", "billing": "order", "wrong_item": "expected"}
_DATE_KIND = {
    "late": "promised",
    "damaged": "received",
    "wrong_item": "received",
    "setup": "received",
    "return": "received",
    "warranty": "started",
    "refund": "approved",
    "billing": "charged",
}
_NUMBER_KINDS = {
    "late": ("phone", "tracking", "tracking", "amount"),
    "damaged": ("phone", "tracking", "amount"),
    "wrong_item": ("phone", "tracking", "amount"),
    "setup": ("phone", "serial"),
    "return": ("phone", "amount"),
    "warranty": ("phone", "serial"),
    "refund": ("phone", "amount"),
    "billing": ("phone", "amount"),
}


# "the delivery of it" becomes "its delivery", "set up it" becomes "set it up".
_OF_IT = re.compile(r"\bthe ((?:\w+ )?\w+) of it\b")
_PARTICLE = re.compile(r"\b(set|setting|send|drop) (up|back|off) it\b")


def _pronoun(text: str) -> str:
    text = text.replace("{item}", "it")
    return _PARTICLE.sub(r"\1 it \2", _OF_IT.sub(r"its \1", text))


@dataclass(frozen=True)
class Facts:
    """What the message has to say. `distractor` is "", "date" or "number"."""

    customer: bool
    product: str | None
    group: str
    order: bool
    date: bool
    issue: str
    urgent: bool
    distractor: str


class Composer:
    """Composes the sentences of one message; `pending` holds what is still to be said."""

    def __init__(self, facts: Facts, wording: Wording, draw: Draw) -> None:
        self.facts = facts
        self.wording = wording
        self.draw = draw
        self.pending = [name for name in ("order", "date") if getattr(facts, name)]
        self.deadline = facts.urgent and facts.distractor == "date" and draw.chance(0.4)

    def compose(self) -> list[Sentence]:
        """All sentences: greeting, name, subject line, the complaint, the rest, sign-off."""
        facts, draw = self.facts, self.draw
        core = self._core()
        tail = self._distractor() + self._mood() + self._filler()
        signed = facts.customer and draw.chance(0.45)
        end = draw.pick((".", ".", ","))
        named = [] if signed or not facts.customer else [self._sentence("intros", "intro", end)]
        greeting = self._greeting()
        subject = self._header()
        tail += self._follows()
        if named and draw.chance(0.25):
            tail += named
            named = []
        tail = draw.shuffled(tail)
        first = [part for part in tail if part.kind == "urgent_first"]
        rest = [part for part in tail if part.kind != "urgent_first"]
        if draw.chance(0.5):
            opening = first + greeting + named + subject
        else:
            opening = greeting + named + first + subject
        return opening + core + rest + self._signoff(signed)

    def _fill(self, template: str) -> str:
        while "<" in template:
            head, _, tail = template.rpartition("<")
            options, _, tail = tail.partition(">")
            template = head + self.draw.pick(options.split("|")) + tail
        product = self.facts.product
        if product and product[0].lower() in "aeiou":
            template = template.replace(" a {product}", " an {product}")
        return template

    def _pick(self, templates: tuple[str, ...]) -> str:
        return self._fill(self.draw.pick(templates))

    def _sentence(self, field: str, kind: str, end: str = ".", gap: str = " ") -> Sentence:
        return Sentence(self._pick(getattr(self.wording, field)), kind, end, gap)

    def _take(self, probability: float) -> list[str]:
        taken = [name for name in self.pending if self.draw.chance(probability)]
        self.pending = [name for name in self.pending if name not in taken]
        return taken

    def _greeting(self) -> list[Sentence]:
        if self.draw.chance(0.25):
            return []
        end, gap = self.draw.pick(((",", " "), (",", " "), (",", "\n"), ("!", " "), (".", " ")))
        return [self._sentence("greetings", "greeting", end, gap)]

    def _issue(self) -> tuple[str, bool]:
        by_trait = self.wording.issues[self.facts.issue]
        traits = ["any", *TRAITS[self.facts.group]]
        if self.facts.product:
            traits.append("embed")
        pool = [(text, trait == "embed") for trait in traits for text in by_trait.get(trait, ())]
        text, embedded = self.draw.pick(pool)
        return self._fill(text), embedded

    def _core(self) -> list[Sentence]:
        text, embedded = self._issue()
        known = ["product"] if self.facts.product else []
        inside = "{item}" in text and (embedded or self.draw.chance(0.5))
        key = "" if inside else "+".join(known + self._take(0.6))
        if not key:
            return [self._said(self._with_item(text, known))]
        lead = self._pick(self.wording.leads[key])
        text = _pronoun(text)
        if lead.endswith(":"):
            end = self.draw.pick((":", ".", " -"))
            return [Sentence(lead[:-1], "lead", end), self._said(text)]
        joinable = not ("?" in text or "," in lead or text.startswith("please"))
        if not joinable or self.draw.chance(0.35):
            return [Sentence(lead, "lead"), self._said(text)]
        contrast = self.facts.issue in ("late", "wrong_item", "damaged") and " but " not in text
        word = self.draw.pick(("and", "but") if contrast else ("and",))
        return [self._said(f"{lead} {word} {text}")]

    def _said(self, text: str, kind: str = "issue") -> Sentence:
        return Sentence(text.rstrip("?"), kind, "?" if text.endswith("?") else ".")

    def _with_item(self, text: str, known: list[str]) -> str:
        # An item drawn for a text that has no place for it would lose the order or date it states.
        return text.replace("{item}", self._item(known)) if "{item}" in text else text

    def _item(self, known: list[str]) -> str:
        items = self.wording.items
        if known:
            return self._pick(items["+".join(known + self._take(0.5))])
        device = self.facts.issue in ("setup", "warranty") and self.facts.group != "furniture"
        kind = _NOUN_KIND.get(self.facts.issue, "device" if device else "goods")
        noun = self._pick(self.wording.nouns[kind])
        key = "+".join(self._take(0.5)) if kind != "expected" else ""
        if not key:
            return noun
        if kind == "order":
            return self._pick(items[key])
        return self._pick(items[f"noun+{key}"]).replace("{noun}", noun)

    def _header(self) -> list[Sentence]:
        key = "+".join(self._take(0.7)) if self.draw.chance(0.25) else ""
        if not key:
            return []
        text = self._pick(self.wording.headers[key])
        colon = (".", "\n") if ":" in text else (":", " ")
        end, gap = self.draw.pick(((".", " "), ("", "\n"), colon))
        return [Sentence(text, "header", end, gap)]

    def _follows(self) -> list[Sentence]:
        keys = self.pending
        if len(keys) == 2 and self.draw.chance(0.6):
            keys = ["order+date"]
        self.pending = []
        return [Sentence(self._pick(self.wording.follows[key]), "follow") for key in keys]

    def _distractor(self) -> list[Sentence]:
        facts, wording = self.facts, self.wording
        if facts.distractor == "number":
            kind = self.draw.pick(_NUMBER_KINDS[facts.issue])
            if kind == "serial" and "electric" not in TRAITS[facts.group]:
                kind = "phone"
            return [Sentence(self._pick(wording.numbers[kind]), kind)]
        if facts.distractor == "date" and not self.deadline:
            own = _DATE_KIND[facts.issue]
            kind = own if facts.urgent else self.draw.pick((own, "callback"))
            return [self._said(self._pick(wording.second_dates[kind]), kind)]
        return []

    def _mood(self) -> list[Sentence]:
        if self.deadline:
            return [self._sentence("urgent_by", "by")]
        if self.facts.urgent:
            if self.draw.chance(0.25):
                end, gap = self.draw.pick((("!", " "), (":", " "), ("", "\n"), (".", " ")))
                return [self._sentence("urgent_first", "urgent_first", end, gap)]
            wants_item = self.facts.issue not in ("refund", "return", "billing")
            field = "urgent_item" if wants_item and self.draw.chance(0.2) else "urgent"
            return [self._sentence(field, "urgent")]
        return [self._sentence("calm", "calm")] if self.draw.chance(0.22) else []

    def _filler(self) -> list[Sentence]:
        if not self.draw.chance(0.2):
            return []
        return [self._said(self._pick(self.wording.fillers), "filler")]

    def _signoff(self, signed: bool) -> list[Sentence]:
        if not signed and self.draw.chance(0.6):
            return []
        gap = self.draw.pick(("\n", "\n", " "))
        return [self._sentence("signoffs" if signed else "closings", "signoff", "", gap)]
