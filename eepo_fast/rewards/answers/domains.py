"""Reads sets of real numbers as people write them: intervals and their unions, inequalities, exclusions."""

import math
import re
from collections.abc import Sequence
from fractions import Fraction
from itertools import pairwise
from typing import NamedTuple

from eepo_fast.rewards.answers.forms import NAME, closes_at_end, group, oriented, relation, split
from eepo_fast.rewards.answers.numbers import read_number

REALS = "\\mathbb{R}"
CONSTANTS = (REALS, "\\infty", "\\pi", "e")
BUILDER = re.compile(r"\\\{[A-Za-z](?:\\in ?(?:\\mathbb\{R\}|R))?[|:](.*)\\\}", re.DOTALL)
MEMBER = re.compile(r"^[a-z]\\in ?(?=[\\(\[])")
ALL_BUT = re.compile(r"\\text\{(?:all )?reals?(?: numbers?)?(?: (?:except|but|other than))(?: for)?\}(.+)")
MAX_PIECES = 64


class Piece(NamedTuple):
    """Is an interval, or a point where both ends are one and closed."""

    low: str
    high: str
    left: bool
    """Whether it is closed on the left."""
    right: bool


EVERYTHING = Piece("-\\infty", "\\infty", False, False)


def is_domain(text: str) -> bool:
    """Returns whether this can only be a set of real numbers."""
    if any(sign in text for sign in ("\\cup", "\\setminus", "\\infty", REALS)):
        return True
    found = group(text)
    return found is not None and ("[" in found[0] or "]" in found[0])


def has_inequalities(text: str) -> bool:
    """Returns whether there is more than one inequality, such as x>2,x<3."""
    return "," in text and any(sign in text for sign in ("<", ">", "\\le", "\\ge"))


def condition(text: str) -> str:
    """Returns what {x | 1 <= x < 2} says about x, if that is an interval; other texts as they are."""
    match = BUILDER.fullmatch(text)
    found = relation(match.group(1)) if match else None
    return (as_interval(*found) or text) if found else text


def as_union(text: str) -> str:
    r"""Writes x<-2,x>1, x \ne 0 and \mathbb{R}\setminus\{0\} as unions of intervals; other texts stay as they are."""
    try:
        return "\\cup".join(map(_written, _read(text)))
    except ValueError:
        pass
    parts = split(text, ",", ";")
    relations = [found for part in parts if (found := relation(part))]  # their ends need not be plain numbers
    if len(relations) == len(parts) > 1:
        names = {side for sides, _ in relations for side in sides if NAME.fullmatch(side)}
        intervals = [interval for found in relations if (interval := as_interval(*found))]
        if len(names) == 1 and len(intervals) == len(parts):
            return "\\cup".join(intervals)
    return text


def as_interval(sides: list[str], signs: list[str]) -> str | None:
    r"""Writes 0<x\le 1 as (0,1], x>2 as (2,\infty), `x \in S` as S; None for what is no interval of one name."""
    if signs == ["\\in"]:
        return sides[1]
    sides, signs = oriented(sides, signs)
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


def _read(text: str, depth: int = 0) -> list[Piece]:
    """Returns the pieces in order; ValueError for all but sets of real numbers whose ends are plain numbers."""
    if depth > 4:
        raise ValueError
    text = MEMBER.sub("", text, count=1) if "," not in text else text
    if text == REALS:
        return [EVERYTHING]
    if match := ALL_BUT.fullmatch(text):
        return _common([EVERYTHING], _rest(_points(split(match.group(1), ","))))
    unions = split(text, "\\cup")
    if len(unions) > 1:
        return _sorted([piece for part in unions for piece in _read(part, depth + 1)])
    without = split(re.sub(r"(?<=[\])}])-(?=\\\{)", r"\\setminus", text), "\\setminus")
    if len(without) == 2:
        return _common(_read(without[0], depth + 1), _rest(_read(without[1], depth + 1)))
    if match := BUILDER.fullmatch(text):
        return _conditions(match.group(1))
    if text.startswith("\\{") and text.endswith("\\}") and closes_at_end(text):
        return _points(split(text[2:-2], ","))
    found = group(text)
    if found and len(found[1]) == 2:
        return [_interval(text)]
    return _conditions(text)


def _conditions(text: str) -> list[Piece]:
    r"""Reads conditions on one name: x>3,x\le4 is both (nobody writes all numbers with a comma, but with "or", which is
    `;`), x<2,x>3 is either, and x\ne-8,-2 leaves out two."""
    pieces, excluded, excluding, names = [], [], False, set()
    for part in split(text, ",", ";"):
        found = relation(part)
        if found is None and excluding:
            excluded.append(part)
            continue
        if found is None or not all(found[0]):
            raise ValueError
        sides, signs = found
        names |= {side for side in sides if NAME.fullmatch(side) and side not in CONSTANTS}
        if excluding := signs == ["\\ne"]:
            excluded.append(sides[1])
        elif signs == ["="]:
            pieces += _points(sides[1:])
        elif sides[1:] != [REALS]:
            pieces.append(_interval(as_interval(sides, signs) or ""))
    if len(names) != 1:
        raise ValueError
    pieces = _sorted(pieces)
    if any(_value(a.high) > _value(b.low) for a, b in pairwise(pieces)):
        if len(split(text, ";")) > 1:
            raise ValueError  # alternatives that overlap are one set
        together = pieces[:1]
        for piece in pieces[1:]:
            together = _common(together, [piece])
        pieces = together
    return _common(pieces or [EVERYTHING], _rest(_points(excluded))) if excluded or not pieces else pieces


def _interval(text: str) -> Piece:
    found = group(text)
    if not found or len(found[1]) != 2:
        raise ValueError
    (opening, closing), (low, high) = found
    if not _value(low) < _value(high):
        raise ValueError
    return Piece(low, high, opening == "[", closing == "]")


def _points(texts: Sequence[str]) -> list[Piece]:
    return _sorted([Piece(text, text, True, True) for text in texts])


def _value(text: str) -> Fraction | float:
    if text.lstrip("+-") == "\\infty":
        return -math.inf if text.startswith("-") else math.inf
    if (number := read_number(text)) is None:
        raise ValueError
    return number.value


def _sorted(pieces: list[Piece]) -> list[Piece]:
    if len(pieces) > MAX_PIECES:
        raise ValueError
    return sorted(pieces, key=lambda piece: (_value(piece.low), _value(piece.high)))


def _rest(pieces: list[Piece]) -> list[Piece]:
    """Returns all real numbers but these."""
    rest, low, closed = [], "-\\infty", False
    for piece in pieces:
        if _value(low) < _value(piece.low):
            rest.append(Piece(low, piece.low, closed, not piece.left))
        low, closed = piece.high, not piece.right
    return [*rest, Piece(low, "\\infty", closed, False)] if _value(low) < math.inf else rest


def _common(first: list[Piece], second: list[Piece]) -> list[Piece]:
    found = []
    for a in first:
        for b in second:
            low, left = max((a.low, a.left), (b.low, b.left), key=lambda end: (_value(end[0]), not end[1]))
            high, right = min((a.high, a.right), (b.high, b.right), key=lambda end: (_value(end[0]), end[1]))
            if _value(low) < _value(high) or (_value(low) == _value(high) and left and right):
                found.append(Piece(low, high, left, right))
    if not found:
        raise ValueError
    return _sorted(found)


def _written(piece: Piece) -> str:
    if piece.low == piece.high:
        return f"\\{{{piece.low}\\}}"
    return f"{'[' if piece.left else '('}{piece.low},{piece.high}{']' if piece.right else ')'}"
