"""A number's unit: where it begins, and which other spelling is the same one."""

from __future__ import annotations

import re

UNIT = re.compile(r"(?:(?:\\text\{[^{}]*\}(?:\^\{?-?[0-9]\}?)?|/|\\cdot)+)$")
HEDGES = re.compile(r"^\\text\{(?:about|approximately|approx|roughly|is|usd|rs|exactly)\}", re.IGNORECASE)
TRIGONOMETRY = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc)(?![a-z])")
DEGREES = re.compile(r"([0-9.]+)\\text\{deg(?:ree|rees)?\}")
UNIT_NAMES = {
    "deg": "degree", "degrees": "degree", "inches": "inch", "in": "inch", "feet": "foot", "ft": "foot", "cents": "cent",
    "meters": "m", "meter": "m", "metres": "m", "metre": "m", "centimeters": "cm", "centimeter": "cm", "am": "a.m.",
    "kilometers": "km", "kilometer": "km", "grams": "g", "gram": "g", "kilograms": "kg", "kilogram": "kg", "sec": "s",
    "seconds": "s", "second": "s", "secs": "s", "hours": "h", "hour": "h", "hr": "h", "hrs": "h", "mins": "min",
    "minutes": "min", "minute": "min", "pm": "p.m.", "a.m": "a.m.", "p.m": "p.m.", "sq": "square", "liters": "l",
    "liter": "l", "litres": "l", "litre": "l", "yards": "yard", "miles": "mile", "mi": "mile", "percentage": "percent",
}  # fmt: skip


def without_unit(text: str) -> tuple[str, str]:
    if TRIGONOMETRY.search(text):
        text = DEGREES.sub(r"(\\frac{\1\\pi}{180})", text)
    text = HEDGES.sub("", text)
    match = UNIT.search(text)
    if not match or not match.group().startswith("\\text"):
        return text, ""
    return text[: match.start()], match.group()


def unit_words(text: str) -> list[str]:
    """A unit's words and exponents under common names; `sq units`, `square units` and `units^2` are one."""
    words = []
    for word in re.findall(r"[a-z.]+|[0-9]", re.sub(r"\\text|\\cdot", " ", text.lower())):
        name = UNIT_NAMES.get(word, word)
        words.append(name if name in ("a.m.", "p.m.") or len(name) < 3 else name.rstrip("s."))
    swapped = [w for w in words if w not in ("square", "cubic", "2", "3", "of", "unit")]
    powers = [{"square": "2", "cubic": "3"}.get(w, w) for w in words if w in ("square", "cubic", "2", "3")]
    return sorted(swapped) + sorted(powers)
