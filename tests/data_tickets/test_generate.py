"""The ticket task: reproducible, solvable, and with nothing of the test split in train."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from collections import Counter
from datetime import date
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "data" / "tickets"
SPLITS = {"train": 1500, "test": 200}
ORDER_ID = re.compile(r"\b(?:[a-z]-\d{5}|\d{7}|ord-\d{4}-\d{4}|[a-z]{2}\d{5}|[a-z]{2}-\d{2}-\d{4})\b")
SLOTS = {"customer", "product", "order", "date", "item", "noun"}
DISTRACTOR_SLOTS = {"date2", "phone", "amount", "tracking", "serial"}


def load_generator() -> ModuleType:
    """Import generate.py by path, and leave no trace of its siblings' plain names behind."""
    before = set(sys.modules)
    written, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    sys.path.insert(0, str(FOLDER))
    try:
        spec = importlib.util.spec_from_file_location("tickets_generate", FOLDER / "generate.py")
        assert spec and spec.loader
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
        # generate.py imports names from these, the tests need the modules.
        for name in ("compose", "dates", "wording"):
            setattr(module, name, sys.modules[name])
        return module
    finally:
        sys.dont_write_bytecode = written
        sys.path.remove(str(FOLDER))
        siblings = {path.stem for path in FOLDER.glob("*.py")}
        for name in (set(sys.modules) - before) & siblings:
            del sys.modules[name]


gen = load_generator()


@pytest.fixture(scope="module")
def tickets():
    """Both splits, drawn anew: unlike the files, they tell which values are distractors."""
    return gen.generate(SPLITS["train"], SPLITS["test"], gen.DEFAULT_SEED)


@pytest.fixture(scope="module")
def rows():
    texts = {split: (FOLDER / f"{split}.jsonl").read_text("utf-8") for split in SPLITS}
    return {split: [json.loads(line) for line in text.splitlines()] for split, text in texts.items()}


@pytest.fixture(scope="module")
def every(tickets):
    return [ticket for split in SPLITS for ticket in tickets[split]]


def test_regenerating_gives_the_committed_bytes(tmp_path):
    gen.main(["--out", str(tmp_path)])
    for split in SPLITS:
        assert (tmp_path / f"{split}.jsonl").read_bytes() == (FOLDER / f"{split}.jsonl").read_bytes()


def test_arguments_are_heeded(tmp_path):
    gen.main(["--out", str(tmp_path / "a"), "--train", "20", "--test", "8", "--seed", "1"])
    gen.main(["--out", str(tmp_path / "b"), "--train", "20", "--test", "8", "--seed", "2"])
    first, second = ((tmp_path / name / "train.jsonl").read_text("utf-8") for name in "ab")
    assert first.count("\n") == second.count("\n") == 20
    assert (tmp_path / "a" / "test.jsonl").read_text("utf-8").count("\n") == 8
    assert first != second


def test_files_hold_the_promised_rows(rows):
    for split, count in SPLITS.items():
        assert len(rows[split]) == count
        for row in rows[split]:
            assert list(row) == ["messages"]
            assert [message["role"] for message in row["messages"]] == ["system", "user", "assistant"]
            assert row["messages"][0]["content"] == gen.SYSTEM
            assert row["messages"][1]["content"].strip() == row["messages"][1]["content"]


def test_records_are_canonical(rows):
    for split in SPLITS:
        for row in rows[split]:
            text = row["messages"][2]["content"]
            record = json.loads(text)
            assert tuple(record) == gen.KEYS
            assert json.dumps(record, ensure_ascii=False, separators=(", ", ": ")) == text
            assert record["issue"] in gen.ISSUES
            assert isinstance(record["urgent"], bool)
            if record["purchase_date"] is not None:
                assert date.fromisoformat(record["purchase_date"]).isoformat() == record["purchase_date"]


def test_copied_values_are_in_the_message_verbatim(every):
    for ticket in every:
        for key in ("customer", "product", "order_id"):
            value = ticket.record[key]
            assert value is None or re.search(rf"(?<!\w){re.escape(value)}(?!\w)", ticket.message)
        order = ticket.record["order_id"]
        assert order is None or ORDER_ID.fullmatch(order.casefold())


def test_purchase_date_is_in_the_message_in_some_style(every):
    for ticket in every:
        if ticket.record["purchase_date"]:
            day = date.fromisoformat(ticket.record["purchase_date"])
            written = {gen.write_date(day, style).casefold() for style in gen.STYLES}
            assert any(text in ticket.message.casefold() for text in written), ticket.message


def without_values(ticket) -> str:
    text = ticket.message
    copied = [ticket.record[key] for key in ("customer", "product", "order_id")]
    for value in sorted([*ticket.distractors, *filter(None, copied)], key=len, reverse=True):
        assert value in text
        text = text.replace(value, " | ")
    return text.casefold()


def test_missing_values_are_absent_from_the_message(every):
    sources = gen.SOURCES.values()
    names = {name.casefold() for source in sources for name in source.first + source.last}
    products = [name.casefold() for source in sources for names_ in source.products.values() for name in names_]
    for ticket in every:
        rest = without_values(ticket)
        assert not names & set(re.findall(r"\w+", rest)), ticket.message
        assert not any(product in rest for product in products), ticket.message
        assert not ORDER_ID.search(rest), ticket.message
        if ticket.record["purchase_date"] is None:
            assert not re.search(r"\b20\d\d\b|\d[./]\d", rest), ticket.message


def test_no_date_can_be_read_as_two_days(every):
    numeric = re.compile(r"\b(\d{1,2})[./](\d{1,2})[./]\d{4}\b")
    found = [match.groups() for ticket in every for match in numeric.finditer(ticket.message)]
    assert len(found) > 100
    assert all(one == two or max(int(one), int(two)) > 12 for one, two in found)


@pytest.mark.parametrize("split", SPLITS)
def test_every_date_style_and_order_shape_occurs(tickets, split):
    assert len(gen.STYLES) >= 12
    for style in gen.STYLES:
        assert any(
            gen.write_date(date.fromisoformat(day), style).casefold() in ticket.message.casefold()
            for ticket in tickets[split]
            if (day := ticket.record["purchase_date"])
        ), style
    orders = [ticket.record["order_id"] for ticket in tickets[split] if ticket.record["order_id"]]
    shapes = {re.sub(r"[a-z]", "@", re.sub(r"\d", "?", order.casefold())) for order in orders}
    assert len(shapes) == len(gen.ORDER_SHAPES)
    assert any(f"#{order}" in ticket.message for ticket in tickets[split] for order in orders)


@pytest.mark.parametrize("split", SPLITS)
def test_rates(tickets, split):
    count = len(tickets[split])
    for key in ("customer", "product", "order_id", "purchase_date"):
        missing = sum(ticket.record[key] is None for ticket in tickets[split])
        assert 0.15 <= missing / count <= 0.25, key
    issues = Counter(ticket.record["issue"] for ticket in tickets[split])
    assert set(issues) == set(gen.ISSUES)
    assert max(issues.values()) - min(issues.values()) <= 1
    assert 0.3 <= sum(ticket.record["urgent"] for ticket in tickets[split]) / count <= 0.45
    assert 0.2 <= sum(bool(ticket.distractors) for ticket in tickets[split]) / count <= 0.3
    lower = sum(ticket.message[0].islower() for ticket in tickets[split])
    assert 0.15 <= lower / count <= 0.3


def test_lengths(every):
    messages = sorted(len(ticket.message) for ticket in every)
    records = [len(gen.answer(ticket.record)) for ticket in every]
    assert messages[0] >= 45
    assert messages[-1] <= 400
    assert 140 <= sum(messages) / len(messages) <= 220
    assert 130 <= sum(records) / len(records) <= 160


def test_no_duplicates_within_or_between_splits(every):
    assert len({ticket.message.casefold() for ticket in every}) == len(every)
    orders = [ticket.record["order_id"].casefold() for ticket in every if ticket.record["order_id"]]
    assert len(set(orders)) == len(orders)


def test_values_of_the_splits_are_disjoint(tickets):
    train, test = gen.SOURCES["train"], gen.SOURCES["test"]
    assert not set(train.first + train.last) & set(test.first + test.last)
    brands = [{name.split()[0] for names in source.products.values() for name in names} for source in (train, test)]
    assert not brands[0] & brands[1]
    for key in ("customer", "product", "order_id", "purchase_date"):
        seen, held_out = (
            {ticket.record[key].casefold() for ticket in tickets[split] if ticket.record[key]} for split in SPLITS
        )
        assert not seen & held_out, key


def test_templates_of_the_splits_are_disjoint():
    def said(source) -> set[str]:
        return {
            re.sub(r"[\s.,:;!?()]+", " ", text).strip().casefold()
            for _, template in gen.wording.templates(source.wording)
            for text in gen.wording.expand(template)
        }

    assert not said(gen.SOURCES["train"]) & said(gen.SOURCES["test"])


def test_no_run_of_five_words_is_in_both_splits(tickets):
    months = {month.casefold() for names in gen.dates.MONTHS.values() for month in names.split()}

    def runs(ticket) -> set[tuple[str, ...]]:
        found: set[tuple[str, ...]] = set()
        # Dates are not masked as values: digits end a run, and a month name rules it out.
        for part in re.split(r"[|\n.!?]|\S*\d\S*", without_values(ticket)):
            words = re.findall(r"[^\W\d_]+(?:'[a-z]+)?", part)
            for start in range(len(words) - 4):
                run = tuple(words[start : start + 5])
                if not months & set(run):
                    found.add(run)
        return found

    seen = set().union(*(runs(ticket) for ticket in tickets["train"]))
    for ticket in tickets["test"]:
        assert not runs(ticket) & seen, (runs(ticket) & seen, ticket.message)


def test_train_lists_are_large_enough_to_generalise_from():
    def count(templates) -> int:
        return len(set(templates))

    train, test = gen.SOURCES["train"], gen.SOURCES["test"]
    words = train.wording
    assert count(words.greetings) >= 12
    assert count(words.intros) >= 8
    assert count(words.follows["order"]) >= 10
    assert count(words.follows["date"]) >= 10
    assert count(words.urgent + words.urgent_first + words.urgent_item + words.urgent_by) >= 15
    assert set(words.issues) == set(test.wording.issues) == set(gen.ISSUES)
    assert all(count(by_trait["any"]) >= 10 for by_trait in words.issues.values() if len(by_trait) < 4)
    assert all(sum(map(count, by_trait.values())) >= 10 for by_trait in words.issues.values())
    assert count(train.first) >= 150
    assert count(train.last) >= 80
    assert sum(map(count, train.products.values())) >= 80
    assert count(test.first) >= 40
    assert count(test.last) >= 40
    assert sum(map(count, test.products.values())) >= 25


@pytest.mark.parametrize("split", SPLITS)
def test_templates_use_known_slots_and_closed_brackets(split):
    for field, template in gen.wording.templates(gen.SOURCES[split].wording):
        assert set(re.findall(r"\{(\w+)\}", template)) <= SLOTS | DISTRACTOR_SLOTS, (field, template)
        for text in gen.wording.expand(template):
            assert not re.search(r"[<>|]", text), (field, template)


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("the delivery of {item} is late", "its delivery is late"),
        ("the power button of {item} broke", "its power button broke"),
        ("is there a guide for setting up {item}?", "is there a guide for setting it up?"),
        ("I want to send {item} back", "I want to send it back"),
        ("where do I drop off {item} for a return?", "where do I drop it off for a return?"),
    ],
)
def test_a_product_named_before_becomes_a_pronoun(template, said):
    assert gen.compose._pronoun(template) == said
