"""Generate the ticket task: free-text support messages, each with one JSON record.

    python data/tickets/generate.py            # rewrites train.jsonl and test.jsonl in place
    python data/tickets/generate.py --seed 7 --out more-tickets --train 3000

The same arguments give the same bytes on every Python from 3.10 on.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import date, timedelta
from pathlib import Path

import vocabulary
from compose import Composer, Facts
from dates import STYLES, ambiguous, pick_style, write_date
from draw import Draw
from noise import Style, draw_style, write
from wording import Wording
from wording_heldout import HELDOUT
from wording_train import TRAIN

DEFAULT_SEED = 20250303
SYSTEM = (
    "Extract the ticket as JSON with the keys customer, product, order_id, purchase_date, issue, "
    "urgent. Copy values as written, order_id without #; use null for what is missing; "
    "dates as YYYY-MM-DD."
)
KEYS = ("customer", "product", "order_id", "purchase_date", "issue", "urgent")
ISSUES = (
    "damaged",
    "late",
    "wrong_item",
    "refund",
    "warranty",
    "billing",
    "setup",
    "return",
)
MISSING = {"customer": 0.19, "product": 0.17, "order_id": 0.2, "purchase_date": 0.22}
URGENT = 0.38
DISTRACTORS = {"date": 0.15, "number": 0.13}

SHORTEST = 48
ORDER_SHAPES = ("@-?????", "???????", "ORD-{year}-????", "@@?????", "@@-??-????")
FIRST_DAY = date(2023, 1, 1)
DAYS = 1095
# Days after the purchase on which a second date may fall, by what it is the date of.
SECOND_DATE = {
    "promised": (5, 15),
    "received": (2, 9),
    "approved": (14, 40),
    "charged": (1, 5),
    "started": (150, 330),
    "callback": (41, 60),
    "by": (41, 60),
}
# A guarantee case is months old when the customer asks to be called about it.
GUARANTEE_AGE = 300
# Number ranges that are reserved for fiction, so that no real subscriber's number appears.
PHONES = ("555-01??", "+1 202 555 01??", "07700 900???", "020 7946 0???", "+49 30 23125 ???")


@dataclass(frozen=True)
class Source:
    """Everything one split is drawn from."""

    wording: Wording
    first: tuple[str, ...]
    last: tuple[str, ...]
    products: dict[str, tuple[str, ...]]
    heldout: bool


@dataclass(frozen=True)
class Plan:
    """What quotas decide for one row, before anything is drawn."""

    missing: frozenset[str]
    issue: str
    urgent: bool
    distractor: str


@dataclass(frozen=True)
class Ticket:
    """One message, its record, and the values in the message that must not be extracted."""

    message: str
    record: dict[str, str | bool | None]
    distractors: tuple[str, ...]

    def row(self) -> dict[str, list[dict[str, str]]]:
        """The ticket as a chat row."""
        contents = (SYSTEM, self.message, answer(self.record))
        roles = ("system", "user", "assistant")
        return {"messages": [{"role": role, "content": content} for role, content in zip(roles, contents, strict=True)]}


SOURCES = {
    "train": Source(
        TRAIN,
        vocabulary.TRAIN_FIRST,
        vocabulary.TRAIN_LAST,
        vocabulary.TRAIN_PRODUCTS,
        heldout=False,
    ),
    "test": Source(
        HELDOUT,
        vocabulary.HELDOUT_FIRST,
        vocabulary.HELDOUT_LAST,
        vocabulary.HELDOUT_PRODUCTS,
        heldout=True,
    ),
}


def answer(record: dict[str, str | bool | None]) -> str:
    """The record as the one line of JSON the model has to write."""
    return json.dumps(record, ensure_ascii=False, separators=(", ", ": "))


def plans(count: int, draw: Draw) -> list[Plan]:
    """Row plans that meet the rates exactly, so that no seed gives a lopsided split."""

    def flags(rate: float) -> list[bool]:
        return draw.shuffled([index < round(rate * count) for index in range(count)])

    missing = {key: flags(rate) for key, rate in MISSING.items()}
    issues = draw.shuffled([ISSUES[index % len(ISSUES)] for index in range(count)])
    kinds = [kind for kind, rate in DISTRACTORS.items() for _ in range(round(rate * count))]
    distractors = draw.shuffled([*kinds, *[""] * (count - len(kinds))])
    urgent = flags(URGENT)
    return [
        Plan(
            frozenset(key for key, chosen in missing.items() if chosen[index]),
            issues[index],
            urgent[index],
            distractors[index],
        )
        for index in range(count)
    ]


def heldout_day(day: date) -> bool:
    """Whether a purchase date is kept for the test split: every fifth day is."""
    return day.toordinal() % 5 == 0


def make_ticket(plan: Plan, source: Source, draw: Draw) -> Ticket:
    """Draw one ticket that follows the plan."""
    style = draw_style(draw)
    group, product = draw.pick([(name, item) for name in _groups(plan.issue) for item in source.products[name]])
    bought = _purchase_day(source.heldout, draw)
    copied = _copied_values(plan, source, product, bought, style, draw)
    facts = Facts(
        customer=copied["customer"] is not None,
        product=copied["product"],
        group=group,
        order=copied["order_id"] is not None,
        date="purchase_date" not in plan.missing,
        issue=plan.issue,
        urgent=plan.urgent,
        distractor=plan.distractor,
    )
    sentences = Composer(facts, source.wording, draw).compose()
    kinds = [sentence.kind for sentence in sentences]
    slots, distractors = _slots(copied, bought, plan.issue, kinds, style, draw)
    record: dict[str, str | bool | None] = {
        **copied,
        "purchase_date": bought.isoformat() if facts.date else None,
        "issue": plan.issue,
        "urgent": plan.urgent,
    }
    return Ticket(write(sentences, slots, style, draw), record, distractors)


def _groups(issue: str) -> tuple[str, ...]:
    if issue == "setup":
        return ("gadget", "display", "furniture")
    if issue == "warranty":
        return ("gadget", "display", "appliance", "furniture")
    return ("gadget", "display", "appliance", "furniture", "plain")


def _purchase_day(heldout: bool, draw: Draw) -> date:
    while True:
        day = FIRST_DAY + timedelta(days=draw.below(DAYS))
        if heldout_day(day) == heldout:
            return day


def _copied_values(
    plan: Plan, source: Source, product: str, bought: date, style: Style, draw: Draw
) -> dict[str, str | None]:
    """Customer, product and order id as this writer spells them; None where missing."""
    customer = draw.pick(source.first)
    if draw.chance(0.68):
        customer += f" {draw.pick(source.last)}"
    order = draw.fill(draw.pick(ORDER_SHAPES).replace("{year}", str(bought.year)))
    if style.lower:
        customer = customer.lower()
        product = product.lower() if draw.chance(0.6) else product
        order = order.lower() if draw.chance(0.4) else order
    values = {"customer": customer, "product": product, "order_id": order}
    return {key: None if key in plan.missing else value for key, value in values.items()}


def _slots(
    copied: dict[str, str | None],
    bought: date,
    issue: str,
    kinds: list[str],
    style: Style,
    draw: Draw,
) -> tuple[dict[str, str], tuple[str, ...]]:
    """What to write for every slot, and which of these values are distractors."""
    slots = {key: value for key, value in copied.items() if value}
    order = slots.pop("order_id", "")
    marked = draw.chance(0.65 if order.isdigit() else 0.08)
    slots["order"] = f"#{order}" if marked else order
    second = bought + timedelta(days=_delay(issue, kinds, draw))
    date_style = pick_style([bought, second], draw)
    slots["date"] = write_date(bought, date_style)
    other = date_style
    if draw.chance(0.3):
        other = draw.pick([name for name in STYLES if not ambiguous(second, name)])
    distracting = {
        "date2": write_date(second, other, with_year=draw.chance(0.7)),
        "phone": draw.fill(draw.pick(PHONES)),
        "amount": _amount(draw),
        "tracking": draw.fill("@@?????????") + draw.pick(("DE", "NL", "GB", "FR")),
        "serial": draw.fill("?@???-??@"),
    }
    if style.lower:
        slots["date"] = slots["date"].lower()
        distracting["date2"] = distracting["date2"].lower()
    used = [key for key in distracting if key in kinds]
    if any(kind in SECOND_DATE for kind in kinds):
        used.append("date2")
    return {**slots, **distracting}, tuple(distracting[key] for key in used)


def _delay(issue: str, kinds: list[str], draw: Draw) -> int:
    """Days from the purchase to the second date, later than all else the message tells of."""
    for kind in kinds:
        if kind in SECOND_DATE:
            first, last = SECOND_DATE[kind]
            late = issue == "warranty" and kind in ("callback", "by")
            return first + draw.below(last - first + 1) + (GUARANTEE_AGE if late else 0)
    return 0


def _amount(draw: Draw) -> str:
    amount = 15 + draw.below(280)
    cents = draw.pick((".00", ".50", ".90", ".95", ".99"))
    shapes = (f"{amount}{cents} EUR", f"€{amount}{cents}", f"${amount}", f"£{amount}{cents}")
    return draw.pick(shapes)


def build(split: str, count: int, seed: int, taken: set[str]) -> list[Ticket]:
    """Draw one split. `taken` holds the messages and order ids in use, and is added to."""
    draw = Draw(2 * seed + list(SOURCES).index(split))
    tickets = []
    for plan in plans(count, draw):
        while True:
            ticket = make_ticket(plan, SOURCES[split], draw)
            order = ticket.record["order_id"]
            marks = {ticket.message.casefold()}
            if order:
                marks.add(str(order).casefold())
            if len(ticket.message) >= SHORTEST and not marks & taken:
                break
        taken |= marks
        tickets.append(ticket)
    return tickets


def generate(train: int, test: int, seed: int) -> dict[str, list[Ticket]]:
    """Both splits, with no message and no order id in common."""
    taken: set[str] = set()
    counts = {"train": train, "test": test}
    return {split: build(split, count, seed, taken) for split, count in counts.items()}


def save(tickets: Iterable[Ticket], path: Path) -> None:
    """Write one JSON row per ticket, with Unix line ends on every system."""
    lines = [json.dumps(ticket.row(), ensure_ascii=False) + "\n" for ticket in tickets]
    path.write_bytes("".join(lines).encode("utf-8"))


def main(argv: list[str] | None = None) -> None:
    """Parse the command line and write both files."""
    parser = argparse.ArgumentParser(description="Generate the ticket task's train and test rows.")
    parser.add_argument("--seed", type=int, default=DEFAULT_SEED)
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent)
    parser.add_argument("--train", type=int, default=1500, help="number of training rows")
    parser.add_argument("--test", type=int, default=200, help="number of test rows")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    for split, tickets in generate(args.train, args.test, args.seed).items():
        save(tickets, args.out / f"{split}.jsonl")


if __name__ == "__main__":
    main()
