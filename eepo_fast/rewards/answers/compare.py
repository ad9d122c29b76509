r"""Decides strictly, on normalised texts, whether an answer is the gold answer; mathematics is left to `ask`.

`compare` takes an answer apart as far as its form goes (lists, sets, tuples, intervals, unions, matrices, equations,
units) and settles what strings and exact numbers can settle. For the rest it calls `ask`, which may not know: then the
result is None, and a worker process does the same again with an `ask` that has math-verify.

Decisions, where careful people could differ:
- `x = 5` is 5 and `f(x) = 2x` is 2x where the gold has no such left side (and the other way round). Of a chain the last
  side counts. A left side that is plain arithmetic must hold: `2+5=7` is 7, `5=7` is not.
- Lists and sets match in any order, one to one; tuples, intervals, matrices in order, with the same kind of bracket.
  Several answers are never one: `1 or 2` is not 1. `{1,2}` is `1,2`; `(1,2)` is neither. Of `a \pm b` both are meant.
  `y=2, x=1` is (1,2); `x_1=2, x_2=1` is a list of roots. `x=y` is not y.
- A unit may be left out, or be added where the gold has none; another unit than the gold's is wrong, and so are words
  that make another number (18 dozen, 2 and a half). $5 is 5 dollars, not 5 cents. Nothing is converted. So with bases:
  `1011` is 1011_2, but 1011_2 is not 1011. `6 m` is `6m`, whether that m is a unit or a variable.
- So with units of other languages: `12 Stück` and `12元` are 12; `12 Dutzend` and `12 mille` are not. A scale counts
  (`12万` is 120000), the common units are known (`12 Stunden` is 12 hours, not 12 minutes), `12 Prozent` is 12
  percent. A foreign letter alone is a variable. A currency sign is no unit: `€12` and `¥12` are 12.
- A percent sign is what it stands for: 50% is 0.5. A gold without it that is above 1 and no fraction may have left it
  out (50% is also 50); a smaller one or a fraction has not (0.5% is not 1/2), nor one that is no number. Without the
  sign nothing is ever taken times or over 100.
- `0<x<1` is the interval (0,1), `x \ge 2` is [2,\infty); of several inequalities both hold, unless nothing would be
  left out. An equation is another if their sides differ by a factor.
- `]0,1[` is (0,1), `[0;1]` is [0,1], `(1;2)`, `(1|2)` and `<1,2>` are (1,2), and so is a column of 1 and 2. Whether an
  end is open still counts. A comma is a decimal one only beside semicolons or bars: `(0,5;1)` is (0.5,1), while `3,14`
  is a list. Equations behind one brace are `x=1,y=2`; cases match in any order.
- `3:2` is a ratio or a time, compared part by part. Words are compared without case, articles and punctuation.
- A choice is its letter, with or without brackets, and whatever its text says: `(B) 12` is B. Of a gold `(B) 12` the
  letter counts, and an answer without a letter may be the text, so `12` is right and `(C) 12` is not. Of a gold that is
  no choice the text counts: `(B) 12` is 12, but B alone never is. Two letters are no choice, and B=12, (B)+12 are none.
- A script without braces is one character: `\log_2 8` is 3, `2^3 5` is 40, `\log_28` is 3. But `2^10` is 1024, and
  `\log_10 100` is 2, which is what people mean. `C_5^2` is a binomial coefficient, `\lg` has the base 10, `A^T` is
  not A, and gcd of letters is never worked out.
- A gold that no grammar reads (`\det A`, `P(A \mid B)`, `p \to q`, words in other scripts) is text: right is the same
  text, spaces, fonts and needless braces aside (texts.py). A gold that is not even whole, such as one with a brace left
  open, is an `error` whatever is answered, but for the very same text.
- Arithmetic left undone (`2+2`, `2^{10}`, `10!`) is its value; an integral, sum, product, limit or determinant is not,
  unless the gold has one too.
"""

import re

from eepo_fast.rewards.answers.domains import as_interval, as_union, condition, has_inequalities, is_domain
from eepo_fast.rewards.answers.forms import NAME, closes_at_end, group, oriented, relation, split
from eepo_fast.rewards.answers.leaves import Ask, compare_leaves
from eepo_fast.rewards.answers.numbers import read_number

MATRIX = re.compile(r"(.*?)\\begin\{([pb]?matrix|smallmatrix|array)\}(?:\{[lcr|]*\})?(.*)\\end\{\2\}", re.DOTALL)
CASES = re.compile(r"\\begin\{cases\}(.*)\\end\{cases\}", re.DOTALL)
NEW_ROW = re.compile(r"\\\\(?:\[[^\]]*\])?")
WHERE = re.compile(r"^\\text\{(?:if|when|for|where)\}")
MAX_MATCHED = 64
VARIABLE = re.compile(r"(?:\\[A-Za-z]+|[A-Za-z])(?:_(?:\{[0-9A-Za-z]{1,9}\}|[0-9A-Za-z]))?")
COORDINATE = re.compile(r"[xyz]|[A-Z]{2,5}")
VALUE_OF = re.compile(  # P(A \cap B), \det A
    r"(?:[A-Z]|\\text\{[A-Za-z]{2,9}\}|\\(?:det|dim|deg|gcd|lcm|arg|Re|Im)|\\mathbb\{[A-Z]\}) ?"
    r"(?:\([^()=]{1,40}\)|[A-Za-z])"
)
WORD = re.compile(r"^\\text\{([A-Za-z]+)\}$")
INDEX = re.compile(r"_(?:\{[^{}]*\}|[0-9A-Za-z])$|\([A-Za-z]\)$")
ARITHMETIC = re.compile(r"\\(?:frac|cdot|sqrt|pi|left|right|div)\b")
FOR_ALL = re.compile(r",?(?:\\text\{for (?:all|every|any)(?: real)?\}|\\forall ?)[A-Za-z](?:\\in ?\\mathbb\{[A-Z]\})?$")
SET_NAME = re.compile(r"^(?:[A-Z]|\\mathbb\{L\})=(?=\\\{[^=]*\\\}$)")
MEMBER = re.compile(r"^[A-Za-z]\\in ?(?=\\\{)")


def compare(gold: str, answer: str, ask: Ask) -> bool | None:
    """Returns True, False, or None where `ask` did not know enough."""
    if gold == answer:
        return True
    if "\ufffd" in answer:  # what normalise puts for a control character or \not
        return False
    gold, answer = _system(gold), _system(answer)
    gold_cases, answer_cases = _cases(gold), _cases(answer)
    if gold_cases and answer_cases:
        if max(len(gold_cases), len(answer_cases)) > 1:
            return _unordered(gold_cases, answer_cases, ask)
        golds, answers = (CASES.sub(r"\1", cases[0]).split("&") for cases in (gold_cases, answer_cases))
        return _ordered(golds, answers, ask)
    gold, answer = _outer(FOR_ALL.sub("", gold)), _outer(FOR_ALL.sub("", answer))
    if "\\in" not in answer[:4] or "\\in" not in gold[:4]:
        gold, answer = MEMBER.sub("", gold), MEMBER.sub("", answer)
    if bool(SET_NAME.match(gold)) != bool(SET_NAME.match(answer)):
        gold, answer = SET_NAME.sub("", gold), SET_NAME.sub("", answer)
    gold, answer = condition(gold), condition(answer)
    named = _assignments(gold), _assignments(answer)
    if named[0] or named[1]:
        return _compare_assignments(gold, answer, *named, ask)
    if "\\cup" in gold and ";" in answer and all(map(group, split(answer, ";"))):  # (-\infty,2) or (3,\infty)
        answer = answer.replace(";", "\\cup")
    if is_domain(gold) or is_domain(answer) or (group(gold) and has_inequalities(answer)):
        gold, answer = as_union(gold), as_union(answer)
    golds, answers = _alternatives(gold), _alternatives(answer)
    if len(golds) > 1 or len(answers) > 1:
        return _unordered(golds, answers, ask)
    gold, answer = golds[0], answers[0]
    if gold == answer:
        return True
    gold_relation, answer_relation = relation(gold), relation(answer)
    if gold_relation or answer_relation:
        return _compare_relations(gold, answer, gold_relation, answer_relation, ask)
    unions = split(gold, "\\cup"), split(answer, "\\cup")
    if max(map(len, unions)) > 1:
        return _unordered(*unions, ask)
    gold_matrix, answer_matrix = _matrix(gold), _matrix(answer)
    if gold_matrix and answer_matrix:
        return _rows(gold_matrix, answer_matrix, ask)
    gold_group, answer_group = group(gold) or _column(gold_matrix), group(answer) or _column(answer_matrix)
    if gold_group and answer_group:
        return gold_group[0] == answer_group[0] and _ordered(gold_group[1], answer_group[1], ask)
    if gold_group or answer_group or gold_matrix or answer_matrix:
        return False
    return compare_leaves(gold, answer, ask)


def _assignments(text: str) -> dict[str, str]:
    """Returns the values of x=1,y=2 or (x,y)=(1,2) by their names, two or more; none for other texts."""
    if "=" not in text:
        return {}
    sides = split(text, "=")
    groups = [found for side in sides if (found := group(side))]
    if len(sides) == len(groups) == 2:
        names, values = groups[0][1], groups[1][1]
    else:
        pairs = [split(part, "=") for part in split(text, ",", ";")]
        if any(len(pair) != 2 for pair in pairs):
            return {}
        names, values = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    distinct = len(set(names)) == len(names) == len(values) > 1
    return dict(zip(names, values, strict=True)) if distinct and all(VARIABLE.fullmatch(n) for n in names) else {}


def _compare_assignments(gold: str, answer: str, golds: dict, answers: dict, ask: Ask) -> bool | None:
    """Compares values by name, or in order where one side has no names; x_1=2, x_2=1 is a list of roots."""
    if golds and answers:
        if set(golds) != set(answers):
            return False
        return _ordered(list(golds.values()), [answers[name] for name in golds], ask)
    found = group(answer if golds else gold)
    named, other_side = (golds, answer) if golds else (answers, gold)
    values = _in_order(named)
    other = found[1] if found and found[0] == ("(", ")") else split(other_side, ",", ";")
    if other_side[:1] != "(" and len({name.partition("_")[0] for name in named}) == 1:
        return _unordered(values, other, ask) if golds else _unordered(other, values, ask)
    return _ordered(values, other, ask) if golds else _ordered(other, values, ask)


def _in_order(named: dict[str, str]) -> list[str]:
    """Returns values as a tuple has them: y=2,x=1 is (1,2), and so is (y,x)=(2,1); other names stay in their order."""
    letters = {name.partition("_")[0] for name in named}
    known = letters <= set("xyz") or letters <= set("abcd")
    return [named[name] for name in (sorted(named) if known else named)]


def _outer(text: str) -> str:
    """Drops round brackets around all of the text, unless they hold a tuple or a mixed number."""
    while text.startswith("(") and text.endswith(")") and closes_at_end(text) and len(split(text[1:-1], ",")) == 1:
        inner = text[1:-1]
        if "\\frac" in inner and "+" in inner and read_number(text):  # a mixed number
            break
        text = inner
    return text


def _alternatives(text: str) -> list[str]:
    r"""Returns the answers of an unordered list or set, both signs of every \pm written out."""
    match = re.fullmatch(r"\\\{(.*)\\\}", text, re.DOTALL)
    if match and closes_at_end(text) and not ("|" in text or ":" in text):
        text = match.group(1)
    parts = [part for part in split(text, ",", ";") if part]
    result: list[str] = []
    for part in parts:
        if "\\pm" in part or "\\mp" in part:
            for plus, minus in (("+", "-"), ("-", "+")):
                result.append(re.sub(r"\\pm *", plus, re.sub(r"\\mp *", minus, part)).removeprefix("+"))
        else:
            result.append(part)
    return result or [text]


def _matrix(text: str) -> list[list[str]] | None:
    """Returns the matrix's cells, times the scalar before it; None where the text is no matrix."""
    inside = text[1:-1] if text.startswith("[") and text.endswith("]") else text
    match = MATRIX.fullmatch(inside)
    if not match or "\\begin" in match.group(3):
        return None
    scalar = match.group(1).strip().removesuffix("\\cdot")
    if relation(scalar) or len(split(scalar, ",", ";")) > 1:
        return None
    rows = [row for row in NEW_ROW.split(match.group(3)) if row.strip()]
    cells = [[cell.strip() for cell in row.split("&")] for row in rows]
    if not scalar:
        return cells
    return [[f"-({c})" if scalar == "-" else f"({scalar})\\cdot ({c})" for c in row] for row in cells]


def _system(text: str) -> str:
    r"""Returns x=1,y=2 for equations under each other behind one brace; other texts as they are."""
    match = CASES.fullmatch(text)
    if not match or "&" in text or "\\begin" in match.group(1):
        return text
    return ",".join(row.strip(" ,;") for row in NEW_ROW.split(match.group(1)) if row.strip())


def _cases(text: str) -> list[str]:
    """Returns the cases of a function by cases, each as one of a single case; none for other texts."""
    match = CASES.fullmatch(text)
    if not match or "\\begin" in match.group(1):
        return []
    cases = [
        [WHERE.sub("", cell.strip()).strip(" ,;.") for cell in row.split("&")] for row in NEW_ROW.split(match.group(1))
    ]
    return ["\\begin{cases}" + "&".join(cells) + "\\end{cases}" for cells in cases if any(cells)]


def _column(matrix: list[list[str]] | None) -> tuple[tuple[str, str], list[str]] | None:
    """Returns a column as the tuple of its coordinates."""
    column = [row[0] for row in matrix or [] if len(row) == 1]
    return (("(", ")"), column) if matrix and len(column) == len(matrix) > 1 else None


def _rows(golds: list[list[str]], answers: list[list[str]], ask: Ask) -> bool | None:
    if [len(row) for row in golds] != [len(row) for row in answers]:
        return False
    return _ordered([c for row in golds for c in row], [c for row in answers for c in row], ask)


def _ordered(golds: list[str], answers: list[str], ask: Ask) -> bool | None:
    if len(golds) != len(answers):
        return False
    result: bool | None = True
    for gold, answer in zip(golds, answers, strict=True):
        if (one := compare(gold, answer, ask)) is False:
            return False
        result = None if one is None else result
    return result


def _unordered(golds: list[str], answers: list[str], ask: Ask) -> bool | None:
    """Compares one to one, in any order."""
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


def _compare_relations(gold: str, answer: str, gold_relation, answer_relation, ask: Ask) -> bool | None:
    for place, found in ((0, gold_relation), (1, answer_relation)):
        if found and not found[0][0] and found[1] in (["="], ["\\approx"]):  # = 5, \approx 5
            return compare(gold if place else found[0][1], found[0][1] if place else answer, ask)
    if gold_relation and answer_relation:
        return _compare_both(gold_relation, answer_relation, ask)
    if gold_relation:
        sides, signs = gold_relation
        if set(signs) <= {"=", "\\approx"} and "\\approx" in signs:
            results = [compare(side, answer, ask) for side in sides if not NAME.fullmatch(side)]
            return True if True in results else None if None in results else False
        if signs == ["="] and all(map(COORDINATE.fullmatch, sides)):
            return False  # x=y is not y, but F=ma is ma
        named = NAME.fullmatch(sides[0]) or VALUE_OF.fullmatch(sides[0])
        if set(signs) <= {"=", "\\in"} and (named or read_number(sides[0])):
            return compare(sides[-1], answer, ask)
        interval = as_interval(sides, signs)
        return compare(interval, answer, ask) if interval else False
    sides, signs = answer_relation
    if not all(sides):
        return False
    if set(signs) <= {"=", "\\approx"}:
        return _last_side(gold, sides, signs, ask)
    if signs == ["\\in"]:
        return compare(gold, sides[1], ask)
    interval = as_interval(sides, signs)
    return compare(gold, interval, ask) if interval else False


def _last_side(gold: str, sides: list[str], signs: list[str], ask: Ask) -> bool | None:
    """Compares an equation with a gold that is none: its last exact side counts, and numbers before it must hold."""
    exact = sides[: signs.index("\\approx") + 1] if "\\approx" in signs else sides
    if len(exact) == 1 and NAME.fullmatch(exact[0]):
        return compare(gold, sides[-1], ask)  # x \approx 3.14
    first, last = read_number(exact[-1]), read_number(sides[-1])
    if first and last and abs(first.value - last.value) > abs(first.value) / 20:
        return False  # no approximation, but two answers
    result = compare(gold, exact[-1], ask)
    if not result and "\\approx" in signs and (number := read_number(gold)) and number.ulp:
        result = compare(gold, sides[-1], ask)
    for side in exact[:-1]:
        if result is not False and not re.search(r"[A-Za-z]", ARITHMETIC.sub("", side)):
            holds = compare(exact[-1], side, ask)
            result = holds if not holds else result
    return result


def _compare_both(gold_relation, answer_relation, ask: Ask) -> bool | None:
    (golds, gold_signs), (answers, answer_signs) = oriented(*gold_relation), oriented(*answer_relation)
    golds, answers = ([WORD.sub(r"\1", side) for side in sides] for sides in (golds, answers))
    if not all(golds) or not all(answers):
        return False
    if gold_signs != answer_signs:
        if set(gold_signs) == {"="} == set(answer_signs) and golds[0] == answers[0]:
            return compare(golds[-1], answers[-1], ask)
        first, second = as_interval(golds, gold_signs), as_interval(answers, answer_signs)
        return compare(first, second, ask) if first and second else False
    if golds[0] == answers[0] or len(golds) > 2:
        result = _ordered(golds, answers, ask)
        if result or len(golds) > 2 or NAME.fullmatch(golds[0]):
            return result
    if gold_signs == ["="] and NAME.fullmatch(golds[0]) and NAME.fullmatch(answers[0]):
        names = {INDEX.sub("", golds[0]), INDEX.sub("", answers[0])}
        if len(names) == 1 and {golds[0], answers[0]} & names:  # m_{\max} and m, f(x) and f
            return compare(golds[1], answers[1], ask)
    if gold_signs in (["\\in"], ["\\approx"], ["\\equiv"]):
        return _ordered(golds, answers, ask)
    question = "proportional" if gold_signs in (["="], ["\\ne"]) else "positively_proportional"
    return ask(question, f"({golds[0]})-({golds[1]})", f"({answers[0]})-({answers[1]})")
