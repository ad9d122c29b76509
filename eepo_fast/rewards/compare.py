"""Is this answer that gold answer? The strict decision, on normalised texts; mathematics is asked of someone else.

`compare` takes an answer apart as far as its form goes (lists, sets, tuples, intervals, unions, matrices, equations,
units) and settles what strings and exact numbers can settle. For the rest it calls `ask`, which may not know: then the
result is None, and a worker process does the same again with an `ask` that has math-verify.

Decisions, where careful people could differ:
- `x = 5` is 5 and `f(x) = 2x` is 2x where the gold has no such left side (and the other way round). Of a chain the last
  side counts. A left side that is plain arithmetic must hold: `2+5=7` is 7, `5=7` is not.
- Lists and sets match in any order, one to one; tuples, intervals, matrices in order, with the same kind of bracket.
  Several answers are never one: `1 or 2` is not 1. `{1,2}` is `1,2`; `(1,2)` is neither. Of `a \\pm b` both are meant.
- A unit may be left out, or be added where the gold has none; another unit than the gold's is wrong, and so are words
  that make another number (18 dozen, 2 and a half). $5 is 5 dollars, not 5 cents. Nothing is converted. So with bases:
  `1011` is 1011_2, but 1011_2 is not 1011.
- A percent sign is what it stands for: 50% is 0.5. A gold without it that is above 1 and no fraction may have left it
  out (50% is also 50); a smaller one or a fraction has not (0.5% is not 1/2), nor one that is no number. Without the
  sign nothing is ever taken times or over 100.
- `0<x<1` is the interval (0,1), `x \\ge 2` is [2,\\infty). An equation is another if their sides differ by a factor.
- `3:2` is a ratio or a time, compared part by part. A choice is its letter, with or without brackets. Words are
  compared without case, articles and punctuation.
- Arithmetic left undone (`2+2`, `2^{10}`, `10!`) is its value; an integral, sum, product, limit or determinant is not,
  unless the gold has one too.
"""

from __future__ import annotations

import re
from itertools import pairwise

from eepo_fast.rewards.leaves import Ask, compare_leaves
from eepo_fast.rewards.numbers import read_number

OPENING, CLOSING = ("(", "[", "\\{", "\\langle", "{"), (")", "]", "\\}", "\\rangle", "}")
TOKEN = re.compile(r"\\[A-Za-z]+|\\.|.", re.DOTALL)
RELATIONS = {"=": "=", "<": "<", ">": ">", "\\le": "\\le", "\\ge": "\\ge", "\\ne": "\\ne", "\\in": "\\in",
             "\\approx": "\\approx", "\\equiv": "\\equiv"}  # fmt: skip
FLIPPED = {"<": ">", ">": "<", "\\le": "\\ge", "\\ge": "\\le"}
MATRIX = re.compile(r"\\begin\{([pb]?matrix|array)\}(?:\{[lcr|]*\})?(.*)\\end\{\1\}", re.DOTALL)
NAME = re.compile(
    r"(?:\\text\{[^{}]*\}|(?:\\angle |\\triangle |m\\angle )?(?:\\[A-Za-z]+|[A-Za-z]{1,4}))"
    r"(?:_(?:\{[^{}]*\}|[0-9A-Za-z]))?(?:'|\^\{?\\prime\}?)*(?:\([A-Za-z0-9,]*\))?"
)
MAX_MATCHED = 64
VARIABLE = re.compile(r"(?:\\[A-Za-z]+|[A-Za-z])(?:_(?:\{[0-9A-Za-z]{1,9}\}|[0-9A-Za-z]))?")
FOR_ALL = re.compile(r",?\\text\{for (?:all|every|any)(?: real)?\}[A-Za-z](?:\\in ?\\mathbb\{[A-Z]\})?$")
MEMBER = re.compile(r"^[A-Za-z]\\in ?(?=\\\{)")
BUILDER = re.compile(r"\\\{[A-Za-z](?:\\in ?\\mathbb\{R\})?[|:](.*)\\\}", re.DOTALL)
PUNCTURED = re.compile(r"(?:x\\in ?)?\\mathbb\{R\}(?:\\setminus|\\backslash|-)\\\{([^{}]*)\\\}|[a-z]\\ne ?([^=<>]*)")


def compare(gold: str, answer: str, ask: Ask) -> bool | None:
    """True, False, or None where `ask` did not know enough."""
    if gold == answer:
        return True
    if "\ufffd" in answer:  # a character, or a negation, that means nothing here
        return False
    gold, answer = _outer(FOR_ALL.sub("", gold)), _outer(FOR_ALL.sub("", answer))
    if "\\in" not in answer[:4] or "\\in" not in gold[:4]:
        gold, answer = MEMBER.sub("", gold), MEMBER.sub("", answer)
    gold, answer = _condition(gold), _condition(answer)
    named = _assignments(gold), _assignments(answer)
    if named[0] or named[1]:
        return _compare_assignments(gold, answer, *named, ask)
    if "\\cup" in gold or "\\cup" in answer:
        gold, answer = _as_union(gold), _as_union(answer)
    golds, answers = _alternatives(gold), _alternatives(answer)
    if len(golds) > 1 or len(answers) > 1:
        return _unordered(golds, answers, ask)
    gold, answer = golds[0], answers[0]
    if gold == answer:
        return True
    gold_relation, answer_relation = _relation(gold), _relation(answer)
    if gold_relation or answer_relation:
        return _compare_relations(gold, answer, gold_relation, answer_relation, ask)
    unions = _split(gold, "\\cup"), _split(answer, "\\cup")
    if max(map(len, unions)) > 1:
        return _unordered(*unions, ask)
    matrices = _matrix(gold), _matrix(answer)
    if matrices[0] or matrices[1]:
        return bool(matrices[0] and matrices[1]) and _rows(*matrices, ask)
    groups = _group(gold), _group(answer)
    if groups[0] and groups[1]:
        return groups[0][0] == groups[1][0] and _ordered(groups[0][1], groups[1][1], ask)
    if groups[0] or groups[1]:
        return False
    return compare_leaves(gold, answer, ask)


def _condition(text: str) -> str:
    """Of {x | 1 <= x < 2} what it says about x, if that is an interval."""
    match = BUILDER.fullmatch(text)
    relation = _relation(match.group(1)) if match else None
    return (_as_interval(*relation) or text) if relation else text


def _assignments(text: str) -> dict[str, str] | None:
    """x=1,y=2 or (x,y)=(1,2) by its names, two or more."""
    if "=" not in text:
        return None
    sides = _split(text, "=")
    groups = [_group(side) for side in sides] if len(sides) == 2 else []
    if groups and all(groups):
        names, values = groups[0][1], groups[1][1]
    else:
        pairs = [_split(part, "=") for part in _split(text, ",", ";")]
        if any(len(pair) != 2 for pair in pairs):
            return None
        names, values = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    distinct = len(set(names)) == len(names) == len(values) > 1
    return dict(zip(names, values, strict=True)) if distinct and all(VARIABLE.fullmatch(n) for n in names) else None


def _compare_assignments(gold: str, answer: str, golds: dict | None, answers: dict | None, ask: Ask) -> bool | None:
    """By name; where only one side has names, in order with a tuple or list."""
    if golds and answers:
        if set(golds) != set(answers):
            return False
        return _ordered(list(golds.values()), [answers[name] for name in golds], ask)
    group = _group(answer if golds else gold)
    values = list((golds or answers).values())
    other = group[1] if group and group[0] == ("(", ")") else _split(answer if golds else gold, ",")
    return _ordered(values, other, ask) if golds else _ordered(other, values, ask)


def _as_union(text: str) -> str:
    """x<-2,x>1 and x \\ne 0 and \\mathbb{R}\\setminus\\{0\\} as unions of intervals."""
    match = PUNCTURED.fullmatch(text)
    if match and (match.group(1) or match.group(2)):
        points = [read_number(point) and point for point in (match.group(1) or match.group(2)).split(",")]
        if all(points):
            points.sort(key=lambda point: read_number(point).value)
            ends = ["-\\infty", *points, "\\infty"]
            return "\\cup".join(f"({a},{b})" for a, b in pairwise(ends))
    relations = [_relation(part) for part in _split(text, ",")]
    if len(relations) > 1 and all(relations):
        names = {side for sides, _ in relations for side in sides if NAME.fullmatch(side)}
        intervals = [_as_interval(*relation) for relation in relations]
        if len(names) == 1 and all(intervals):
            return "\\cup".join(intervals)
    return text


def _outer(text: str) -> str:
    """Without round brackets around all of it, unless they hold a tuple."""
    while text.startswith("(") and text.endswith(")") and _closes_at_end(text) and len(_split(text[1:-1], ",")) == 1:
        inner = text[1:-1]
        if "\\frac" in inner and "+" in inner and read_number(text):  # a mixed number
            break
        text = inner
    return text


def _closes_at_end(text: str) -> bool:
    """The bracket that opens the text is closed by its last character."""
    depth = 0
    tokens = TOKEN.findall(text)
    for i, token in enumerate(tokens):
        depth += (token in OPENING) - (token in CLOSING)
        if depth == 0:
            return i == len(tokens) - 1
    return False


def _split(text: str, *separators: str) -> list[str]:
    """Parts between separators outside of all brackets; in intervals the kinds of a pair may differ."""
    if not any(separator in text for separator in separators):
        return [text]
    parts, current, depth = [], [], 0
    for token in TOKEN.findall(text):
        if token in OPENING:
            depth += 1
        elif token in CLOSING:
            depth -= 1
        if depth == 0 and token in separators:
            parts.append("".join(current))
            current = []
        else:
            current.append(token)
    parts.append("".join(current))
    return [part.strip() for part in parts]


def _alternatives(text: str) -> list[str]:
    """The answers of an unordered list or set, both signs of every \\pm written out."""
    match = re.fullmatch(r"\\\{(.*)\\\}", text, re.DOTALL)
    if match and _closes_at_end(text) and not ("|" in text or ":" in text):
        text = match.group(1)
    parts = [part for part in _split(text, ",", ";") if part]
    result: list[str] = []
    for part in parts:
        if "\\pm" in part or "\\mp" in part:
            for plus, minus in (("+", "-"), ("-", "+")):
                result.append(re.sub(r"\\pm *", plus, re.sub(r"\\mp *", minus, part)).removeprefix("+"))
        else:
            result.append(part)
    return result or [text]


def _group(text: str) -> tuple[tuple[str, str], list[str]] | None:
    """(brackets, parts) of a tuple or an interval."""
    for opening in ("(", "[", "\\langle"):
        for closing in (")", "]", "\\rangle"):
            if text.startswith(opening) and text.endswith(closing) and len(text) > len(opening) + len(closing):
                if not _closes_at_end(text):
                    return None
                parts = _split(text[len(opening) : len(text) - len(closing)], ",")
                kinds = ("(" if opening == "\\langle" else opening, ")" if closing == "\\rangle" else closing)
                return (kinds, parts) if len(parts) > 1 else None
    return None


def _matrix(text: str) -> list[list[str]] | None:
    match = MATRIX.fullmatch(text)
    if not match:
        return None
    rows = [row for row in re.split(r"\\\\(?:\[[^\]]*\])?", match.group(2)) if row.strip()]
    return [[cell.strip() for cell in row.split("&")] for row in rows]


def _rows(golds: list[list[str]], answers: list[list[str]], ask: Ask) -> bool | None:
    if [len(row) for row in golds] != [len(row) for row in answers]:
        return False
    return _ordered([c for row in golds for c in row], [c for row in answers for c in row], ask)


def _ordered(golds: list[str], answers: list[str], ask: Ask) -> bool | None:
    if len(golds) != len(answers):
        return False
    result: bool | None = True
    for gold, answer in zip(golds, answers, strict=True):
        one = compare(gold, answer, ask)
        if one is False:
            return False
        result = None if one is None else result
    return result


def _unordered(golds: list[str], answers: list[str], ask: Ask) -> bool | None:
    """One to one, in any order."""
    if len(golds) != len(answers):
        return False
    rest = list(answers)
    open_golds = []
    for gold in golds:
        if gold in rest:
            rest.remove(gold)
        else:
            open_golds.append(gold)
    if len(open_golds) > MAX_MATCHED:
        return _ordered(open_golds, rest, ask)
    unknown = False
    for gold in open_golds:
        results = [(compare(gold, answer, ask), answer) for answer in rest]
        found = next((answer for result, answer in results if result), None)
        if found is not None:
            rest.remove(found)
        elif any(result is None for result, _ in results):
            unknown = True
        else:
            return False
    return None if unknown else True


def _relation(text: str) -> tuple[list[str], list[str]] | None:
    """(sides, relation signs) of an equation, an inequality or a chain of them."""
    signs = [t for t in _top_level(text) if t in RELATIONS]
    return (_split(text, *RELATIONS), signs) if signs else None


def _top_level(text: str) -> list[str]:
    if not any(sign in text for sign in RELATIONS):
        return []
    tokens, depth = [], 0
    for token in TOKEN.findall(text):
        depth += (token in OPENING) - (token in CLOSING)
        if depth == 0:
            tokens.append(token)
    return tokens


def _compare_relations(gold: str, answer: str, gold_relation, answer_relation, ask: Ask) -> bool | None:
    for side, relation in ((0, gold_relation), (1, answer_relation)):
        if relation and not relation[0][0] and relation[1] in (["="], ["\\approx"]):  # = 5, \approx 5
            return compare(*[relation[0][1] if i == side else text for i, text in enumerate((gold, answer))], ask)
    if gold_relation and answer_relation:
        return _compare_both(gold_relation, answer_relation, ask)
    if gold_relation:
        sides, signs = gold_relation
        if set(signs) <= {"=", "\\in"} and (NAME.fullmatch(sides[0]) or read_number(sides[0])):
            return compare(sides[-1], answer, ask)
        interval = _as_interval(sides, signs)
        return compare(interval, answer, ask) if interval else False
    sides, signs = answer_relation
    if not all(sides):
        return False
    if set(signs) <= {"=", "\\approx"}:
        return _last_side(gold, sides, signs, ask)
    if signs == ["\\in"]:
        return compare(gold, sides[1], ask)
    interval = _as_interval(sides, signs)
    return compare(gold, interval, ask) if interval else False


def _last_side(gold: str, sides: list[str], signs: list[str], ask: Ask) -> bool | None:
    """An equation, for a gold that is none: its last exact side counts, and the numbers before it must hold."""
    exact = sides[: signs.index("\\approx") + 1] if "\\approx" in signs else sides
    if len(exact) == 1 and NAME.fullmatch(exact[0]):
        return compare(gold, sides[-1], ask)  # x \approx 3.14
    first, last = read_number(exact[-1]), read_number(sides[-1])
    if first and last and abs(first.value - last.value) > abs(first.value) / 20:
        return False  # no approximation, but two answers
    result = compare(gold, exact[-1], ask)
    if not result and "\\approx" in signs and read_number(gold) and read_number(gold).ulp:
        result = compare(gold, sides[-1], ask)
    for side in exact[:-1]:
        if result is not False and not re.search(
            r"[A-Za-z]", re.sub(r"\\(?:frac|cdot|sqrt|pi|left|right|div)\b", "", side)
        ):
            holds = compare(exact[-1], side, ask)
            result = holds if not holds else result
    return result


def _compare_both(gold_relation, answer_relation, ask: Ask) -> bool | None:
    (golds, gold_signs), (answers, answer_signs) = _oriented(*gold_relation), _oriented(*answer_relation)
    if not all(golds) or not all(answers):
        return False
    if gold_signs != answer_signs:
        if set(gold_signs) == {"="} == set(answer_signs) and golds[0] == answers[0]:
            return compare(golds[-1], answers[-1], ask)
        first, second = _as_interval(golds, gold_signs), _as_interval(answers, answer_signs)
        return compare(first, second, ask) if first and second else False
    same_left = golds[0] == answers[0]
    if same_left or len(golds) > 2:
        result = _ordered(golds, answers, ask)
        if result or len(golds) > 2 or NAME.fullmatch(golds[0]):
            return result
    if gold_signs in (["\\in"], ["\\approx"], ["\\equiv"]):
        return _ordered(golds, answers, ask)
    question = "proportional" if gold_signs in (["="], ["\\ne"]) else "positively_proportional"
    return ask(question, f"({golds[0]})-({golds[1]})", f"({answers[0]})-({answers[1]})")


def _oriented(sides: list[str], signs: list[str]) -> tuple[list[str], list[str]]:
    """With the smaller side first."""
    if signs and all(sign in (">", "\\ge") for sign in signs):
        return sides[::-1], [FLIPPED[sign] for sign in signs[::-1]]
    return sides, signs


def _as_interval(sides: list[str], signs: list[str]) -> str | None:
    """0<x\\le 1 as (0,1], x>2 as (2,\\infty); `x \\in S` as S; None for what is no interval of one name."""
    if signs == ["\\in"]:
        return sides[1]
    sides, signs = _oriented(sides, signs)
    if not signs or not set(signs) <= {"<", "\\le"}:
        return None
    opening, closing = "(" if signs[0] == "<" else "[", ")" if signs[-1] == "<" else "]"
    if len(sides) == 3 and NAME.fullmatch(sides[1]):
        return f"{opening}{sides[0]},{sides[2]}{closing}"
    if len(sides) == 2 and NAME.fullmatch(sides[0]) and not NAME.fullmatch(sides[1]):
        return f"(-\\infty,{sides[1]}{closing}"
    if len(sides) == 2 and NAME.fullmatch(sides[1]) and not NAME.fullmatch(sides[0]):
        return f"{opening}{sides[0]},\\infty)"
    return None
