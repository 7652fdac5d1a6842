"""The ways a customer may write a date; none can be read as two different days."""

from __future__ import annotations

from collections.abc import Callable
from datetime import date

from draw import Draw

MONTHS = {
    "en": "January February March April May June July August September October November December",
    "short": "Jan Feb Mar Apr May Jun Jul Aug Sep Oct Nov Dec",
    "fr": "janvier février mars avril mai juin juillet août septembre octobre novembre décembre",
    "es": "enero febrero marzo abril mayo junio julio agosto septiembre octubre noviembre diciembre",
    "de": "Januar Februar März April Mai Juni Juli August September Oktober November Dezember",
    "nl": "januari februari maart april mei juni juli augustus september oktober november december",
    "it": "gennaio febbraio marzo aprile maggio giugno luglio agosto settembre ottobre novembre dicembre",
}

# Words: day number, day with its ordinal ending, month, year. A year-less date is cut at "|".
_WORDS = {
    "en_month_ordinal": ("en", "{m} {nth}|, {y}"),
    "en_month_day": ("en", "{m} {d}|, {y}"),
    "en_day_month": ("en", "{d} {m}| {y}"),
    "en_ordinal_of": ("en", "{nth} of {m}| {y}"),
    "en_short_day_first": ("short", "{d} {m}| {y}"),
    "en_short_month_first": ("short", "{m} {d}|, {y}"),
    "fr": ("fr", "{first} {m}| {y}"),
    "es": ("es", "{d} de {m}| de {y}"),
    "de": ("de", "{d}. {m}| {y}"),
    "nl": ("nl", "{d} {m}| {y}"),
    "it": ("it", "{d} {m}| {y}"),
}

_NUMBERS: dict[str, Callable[[date], str]] = {
    "iso": lambda day: day.isoformat(),
    "iso_slash": lambda day: f"{day.year}/{day.month:02d}/{day.day:02d}",
    "dots": lambda day: f"{day.day:02d}.{day.month:02d}.{day.year}",
    "dots_short": lambda day: f"{day.day}.{day.month}.{day.year}",
    "slash_day_first": lambda day: f"{day.day:02d}/{day.month:02d}/{day.year}",
    "slash_month_first": lambda day: f"{day.month:02d}/{day.day:02d}/{day.year}",
}

STYLES = (*_WORDS, *_NUMBERS)
_YEAR_FIRST = ("iso", "iso_slash")


def _ordinal(day: int) -> str:
    if day in (11, 12, 13):
        return f"{day}th"
    return f"{day}{({1: 'st', 2: 'nd', 3: 'rd'}).get(day % 10, 'th')}"


def ambiguous(day: date, style: str) -> bool:
    """Whether the style writes the day so that day and month could be swapped."""
    swappable = style in _NUMBERS and style not in _YEAR_FIRST
    return swappable and day.day <= 12 and day.day != day.month


def write_date(day: date, style: str, with_year: bool = True) -> str:
    """Write the day in the style; only the styles with a month name can leave out the year."""
    if style in _NUMBERS:
        return _NUMBERS[style](day)
    language, template = _WORDS[style]
    head, tail = template.split("|")
    return (head + tail if with_year else head).format(
        d=day.day,
        nth=_ordinal(day.day),
        first="1er" if day.day == 1 else day.day,
        m=MONTHS[language].split()[day.month - 1],
        y=day.year,
    )


def pick_style(days: list[date], draw: Draw) -> str:
    """A style in which none of the days is ambiguous."""
    return draw.pick([name for name in STYLES if not any(ambiguous(day, name) for day in days)])
