"""Compares parts of an answer and of the gold that have no parts of their own: a number, an expression, a word."""

import re
from collections.abc import Callable

from eepo_fast.rewards.answers.numbers import Number, read_number, same_number
from eepo_fast.rewards.answers.units import same_unit, without_unit

Ask = Callable[[str, str, str], bool | None]
"""(question, gold, answer) -> yes, no, or None: not known. Questions: equal, proportional, positively_proportional."""

TEXT = re.compile(r"\\text\{([^{}]*)\}")
BASE = re.compile(r"(-?[0-9A-Fa-f.]+)_\{?([0-9]{1,2})\}?")
WORD = re.compile(r"\\text\{([A-Za-z]{2,})\}")
MAX_COMMUTED = 3
CLOCK = re.compile(r"\\text\{[ap]\.?m")
PRODUCT = re.compile(r"\\text\{([A-Za-z]{2,3}|[A-Za-z]\^1(?:\.[A-Za-z]\^1){1,2})\}")
LONE_LETTERS = re.compile(r"\\text\{([A-Za-z]{1,3})(?:\^([0-9]))?\}(?:\^\{?([0-9])\}?)?")


def compare_leaves(gold: str, answer: str, ask: Ask) -> bool | None:
    """Compares what has no more parts: a number, an expression, words."""
    result = _compare(gold, answer, ask)
    product = _as_product(gold, answer) if result is False else None
    return product[0] == product[1] or ask("equal", *product) if product else result


def _as_product(gold: str, answer: str) -> tuple[str, str] | None:
    """Returns 6 m and 6m, or 2 m g and 2mg, with letters for what one side took for a unit; None for other pairs."""
    (gold, gold_unit), (answer, answer_unit) = without_unit(gold), without_unit(answer)
    match = LONE_LETTERS.fullmatch(gold_unit or answer_unit)
    if not gold or not answer or (gold_unit and answer_unit) or not match:
        return None
    if not set(match[1]) <= set(re.findall(r"\\[A-Za-z]+|[A-Za-z]", answer if gold_unit else gold)):
        return None
    power = match[2] or match[3]
    letters = match[1] + (f"^{power}" if power not in (None, "1") else "")
    return (gold + letters, answer) if gold_unit else (gold, answer + letters)


def _compare(gold: str, answer: str, ask: Ask) -> bool | None:
    words = _word(gold), _word(answer)
    if words[0] and words[1] and ("\\text" in gold or "\\text" in answer):
        return words[0].casefold() == words[1].casefold()
    if any(text.startswith("[") and text.endswith("]") for text in (gold, answer)) and gold[:1] != answer[:1]:
        return False  # [18] may be a floor, an interval, a reference: not 18
    (gold, gold_unit), (answer, answer_unit) = without_unit(gold), without_unit(answer)
    if not gold or not answer:
        return _same_text(gold_unit, answer_unit) if not gold and not answer else False
    percents = "percent" in gold_unit, "percent" in answer_unit
    if not same_unit(gold_unit, answer_unit) and _letters(gold_unit) != _letters(answer_unit):
        return False
    if percents[1] and not percents[0] and not read_number(gold):
        return False  # \\sqrt{2} percent
    if "\\pmod" in gold or "\\pmod" in answer:
        golds, answers = gold.split("\\pmod"), answer.split("\\pmod")
        return golds[1:] == answers[1:] and compare_leaves(golds[0], answers[0], ask)
    if ":" in gold or ":" in answer:
        golds, answers = gold.split(":"), answer.split(":")
        if CLOCK.search(gold_unit + answer_unit):  # 9 a.m. is 9:00 a.m.
            golds, answers = (part[:-1] if len(part) == 2 and part[1] == "00" else part for part in (golds, answers))
        return len(golds) == len(answers) and _parts(golds, answers, ask)
    gold_base, answer_base = _based(gold), _based(answer)
    if gold_base and answer_base:
        return gold_base == answer_base
    if gold_base or answer_base:
        return gold_base is not None and gold_base[0] == answer
    number, other = read_number(gold), read_number(answer)
    if gold.replace("+\\infty", "\\infty") == answer.replace("+\\infty", "\\infty") and not (number and percents[1]):
        return True
    if number and other:
        if same_number(number, other) and not (percents[1] and not percents[0] and _is_share(gold, number)):
            return True
        if percents[0] != percents[1]:  # the sign stands for a hundredth
            marked, plain = (number, other) if percents[0] else (other, number)
            return marked.value == 100 * plain.value
        return False
    if gold.isalpha() and len(gold) == 1 and re.fullmatch(r"\(?" + gold + r"\)?", answer):
        return True
    if gold.isalpha() and answer.isalpha():
        product = len(gold) <= MAX_COMMUTED and gold.islower() and sorted(gold) == sorted(answer)
        named = gold.istitle() or answer.istitle()  # Red is red, but mgL is not mgl
        return product or (len(gold) > 2 and named and gold.casefold() == answer.casefold())
    if "\\infty" in (gold.lstrip("-"), answer.lstrip("-")):
        return False
    return ask("equal", gold, answer)


def _based(text: str) -> tuple[str, str] | None:
    """Returns a number's digits and its base; None for other texts, such as 2a_1."""
    match = BASE.fullmatch(text)
    if not match or any(int(digit, 16) >= int(match[2]) for digit in match[1] if digit.isalpha()):
        return None
    return match[1], match[2]


def _letters(unit: str) -> list[str] | str:
    """Returns the sorted letters of a unit such as m g or mg, which may be a product; any other unit as it is."""
    match = PRODUCT.fullmatch(unit)
    return sorted(match[1].replace("^1", "").replace(".", "")) if match else unit


def _is_share(gold: str, number: Number) -> bool:
    """Returns whether a percent sign behind this number can only mean a hundredth; 18 may have had one, left out."""
    return number.value != 0 and (abs(number.value) <= 1 or "/" in gold or "\\frac" in gold)


def _parts(golds: list[str], answers: list[str], ask: Ask) -> bool | None:
    results = [compare_leaves(gold, answer, ask) for gold, answer in zip(golds, answers, strict=True)]
    return False if False in results else None if None in results else True


def _word(text: str) -> str | None:
    r"""Returns the letters of \text{word}, or of what could be one; None for other texts."""
    match = WORD.fullmatch(text)
    return match.group(1) if match else text if text.isalpha() and text.isascii() else None


def _words(text: str) -> list[str]:
    """Returns the words without articles, in the singular."""
    found = re.findall(r"[a-z0-9.]+", (" ".join(TEXT.findall(text)) if "\\text" in text else text).lower())
    words = [word if word in ("a.m.", "p.m.") else word.rstrip(".") for word in found]
    return [word.removesuffix("s") if len(word) > 4 else word for word in words if word not in ("the", "a", "an")]


def _same_text(gold: str, answer: str) -> bool:
    golds, answers = _words(gold), _words(answer)
    return "".join(golds) == "".join(answers) and bool(golds)
