"""Reads units in other languages and scripts behind a number: 12 Stück, 12元, 12 рублей, 12 km par heure.

A word of another language is a unit as an English one is (units.py): it may be left out, or be added where the gold has
none. What makes another number of it (12 Dutzend, 12万, 12 mille, 3 millones) is no unit. The common units are put into
English, so that 12 Stunden is 12 hours and not 12 minutes, and 12 Prozent is 12 percent.
"""

import re
import unicodedata

from eepo_fast.rewards.answers.names import COUNTS, NOT_NUMBERS, NUMBER_CHARACTERS, NUMBER_WORDS, UNITS

WORD = re.compile(r"[^\W\d_]+")
TAIL = re.compile(
    r"(?<=[0-9}])(?:\s|\\text\s*\{\s*\}){0,3}(?:\\text\s*\{\s*([^{}\\]{1,80})\}|"
    r"([^\W\d_][^\d\\{}=<>+*()\[\],;:|$^]{0,60}))"
    r"(\^\{?[23]\}?)?$"
)
TEN_THOUSANDS = {"万": 4, "萬": 4, "만": 4, "亿": 8, "億": 8, "억": 8}
SCALE = re.compile(rf"([{''.join(TEN_THOUSANDS)}])([^\W\d_]*)$")
# a unit of one letter; another one would be a variable in a foreign alphabet
SCRIPTS_OF_ONE = ("CJK", "HIRAGANA", "KATAKANA", "HANGUL", "DEVANAGARI", "THAI")
SCRIPTS = (*SCRIPTS_OF_ONE, "LATIN", "CYRILLIC", "ARABIC", "HEBREW")
SYMBOLS = frozenset(("m", "cm", "mm", "km", "kg", "g", "L", "s", "min", "h"))
CATEGORIES = ("Lu", "Ll", "Lo", "Lm", "Mn", "Mc")


def mark_foreign(text: str) -> str:
    r"""Returns 12 Stunden as 12 hours, 12 Stück as 12 \text{Stück}; texts without such a unit as they are."""
    if (text[-1:].isdigit() and text[-2:-1] != "^") or not (match := TAIL.search(text)):
        return text
    words, power = (match.group(1) or match.group(2)).strip(" ."), match.group(3) or ""
    if scale := SCALE.match(words):
        rest = scale.group(2) + power
        return f"{text[: match.start()]}\\cdot 10^{TEN_THOUSANDS[scale.group(1)]}" + (
            f"\\text{{{rest}}}" if rest else ""
        )
    found = WORD.findall(words)
    known = [UNITS.get(word) or UNITS.get(word.casefold()) or (word if word in SYMBOLS else None) for word in found]
    if len(words) < 4 and words.isascii() and not words.isupper() and text[match.start()].isalpha():
        return text  # 2ans is a product
    if all(known) and known != found:
        names = iter(known)
        return f"{text[: match.start()]}\\text{{{WORD.sub(lambda m: next(names) or '', words)}}}{power}"
    if words.casefold() in UNITS:
        return f"{text[: match.start()]}\\text{{{UNITS[words.casefold()]}}}{power}"
    if match.group(1) or words.isascii() or not _is_unit(words, found):
        return text
    return f"{text[: match.start()]}\\text{{{words}}}{power}"


def _is_unit(words: str, found: list[str]) -> bool:
    """Returns whether these can be words, of scripts in which people write words and not variables."""
    if any(unicodedata.category(c) not in CATEGORIES and c not in " ./-·'" for c in words):
        return False
    for word in found:
        script = unicodedata.name(word[0], "").split(" ")[0]
        if not (script.startswith(SCRIPTS) and (len(word) > 1 or script.startswith(SCRIPTS_OF_ONE))):
            return False
    return bool(found)


def makes_another_number(unit: str) -> bool:
    """Returns whether words behind a number stand for a number, or for an operation: 12 Dutzend is not 12."""
    words = WORD.findall(unit.casefold())
    return (
        bool(words and words[0] in COUNTS)
        or any(map(NUMBER_WORDS.fullmatch, words))
        or any(NUMBER_CHARACTERS.search(NOT_NUMBERS.sub("", word)) for word in words if not word.isascii())
    )
