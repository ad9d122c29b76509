r"""Reads numbers exactly as they are written (integers, decimals, fractions, e-notation, mixed numbers), and says when
two of them are the same answer.

- equal values are equal, however written: 0.5, 1/2, 5e-1, 5 \times 10^{-1};
- a gold decimal that looks rounded (three significant digits or more, in e-notation two) also accepts what is given to
  more places, or exactly, and rounds to it: 3.14 accepts 3.1416 and 22/7. Never what differs by a unit of its last
  digit. A shorter one (0.5, 0.33) is taken as exact;
- an exact gold that no decimal can say (1/3, the square root of 2) accepts a decimal of six significant digits or more
  that is its rounding or truncation: 0.333333, 0.666667, never 0.33 or 0.333334;
- nothing is ever taken times or over 100.
"""

import re
from dataclasses import dataclass
from fractions import Fraction

MAX_EXPONENT = 4000  # a larger power of ten is not written out
MIN_ROUNDED_DIGITS, MIN_ROUNDED_DIGITS_E, MIN_APPROXIMATION_DIGITS = 3, 2, 6
DECIMAL = re.compile(r"([-+]*)([0-9]*)(\.[0-9]*)?(?:(?:[eE]|\\cdot10\^)\{?([-+]?[0-9]{1,6})\}?)?")
POWER = re.compile(r"([-+]*)10\^\{?([-+]?[0-9]{1,6})\}?")
FRACTION = re.compile(r"([-+]*)\\frac\{([^{}]*)\}\{([^{}]*)\}")
MIXED = re.compile(r"([-+]*)\(([0-9]+)\+\\frac\{([0-9]+)\}\{([0-9]+)\}\)")
REPEATING = re.compile(r"([-+]*)([0-9]*)\.([0-9]*)\\(?:overline|bar|dot)\{?([0-9]+)\}?")


@dataclass(frozen=True)
class Number:
    value: Fraction
    ulp: Fraction | None = None
    """One unit of a decimal's last digit; None for other numbers."""
    digits: int = 0
    """A decimal's significant digits."""
    scientific: bool = False

    @property
    def terminates(self) -> bool:
        rest = self.value.denominator
        for prime in (2, 5):
            while rest % prime == 0:
                rest //= prime
        return rest == 1

    @property
    def looks_rounded(self) -> bool:
        return self.ulp is not None and self.digits >= (MIN_ROUNDED_DIGITS_E if self.scientific else MIN_ROUNDED_DIGITS)


def read_number(text: str) -> Number | None:
    """Returns the number that a normalised text is; None where it is something else."""
    if len(text) > 400 or not text:
        return None
    if match := POWER.fullmatch(text):
        return _scientific(match.group(1), "1", "", match.group(2))
    if match := DECIMAL.fullmatch(text):
        sign, whole, point, exponent = match.groups()
        return _scientific(sign, whole, point, exponent) if whole or (point and len(point) > 1) else None
    if match := FRACTION.fullmatch(text):
        return _quotient(match.group(1), match.group(2), match.group(3))
    if match := MIXED.fullmatch(text):
        integer, numerator, denominator = (int(n) for n in match.groups()[1:])
        return Number(_sign(match.group(1)) * (integer + Fraction(numerator, denominator))) if denominator else None
    if match := REPEATING.fullmatch(text):
        sign, whole, start, period = match.groups()
        value = Fraction(int("0" + whole + start)) + Fraction(int(period), 10 ** len(period) - 1)
        return Number(_sign(sign) * value / 10 ** len(start))
    above, slash, below = text.partition("/")
    if slash:
        return _quotient("", above, below)
    if text.startswith("(") and text.endswith(")"):
        return read_number(text[1:-1])
    if text.startswith("-(") and text.endswith(")"):
        inner = read_number(text[2:-1])
        return inner and Number(-inner.value, inner.ulp, inner.digits, inner.scientific)
    return None


def _scientific(sign: str, whole: str, point: str | None, exponent: str | None) -> Number | None:
    places = point[1:] if point else ""
    power = int(exponent or 0)
    if abs(power) > MAX_EXPONENT:
        return None
    scale = Fraction(10) ** power
    digits = whole + places
    value = _sign(sign) * int(digits) * scale / 10 ** len(places)
    if exponent is None and not places:
        return Number(value)
    if exponent is not None and not places and len(whole.rstrip("0")) <= 1:
        return Number(value)  # 10^3, 4e33: exact, as far as anyone can say
    return Number(value, scale / 10 ** len(places), len(digits.lstrip("0")), exponent is not None)


def _quotient(sign: str, above: str, below: str) -> Number | None:
    a, b = (read_number(part) if "/" not in part and "\\frac" not in part else None for part in (above, below))
    return Number(_sign(sign) * a.value / b.value) if a and b and b.value else None


def _sign(signs: str) -> int:
    return -1 if signs.count("-") % 2 else 1


def same_number(gold: Number, answer: Number) -> bool:
    """Compares two numbers by the rules at the top of this file."""
    if gold.value == answer.value:
        return True
    if gold.ulp is not None:
        finer = answer.ulp < gold.ulp if answer.ulp is not None else answer.value.denominator > 1
        return finer and rounds_to(gold, answer.value)
    return not gold.terminates and approximates(answer, gold.value)


def rounds_to(gold: Number, value: Fraction) -> bool:
    """Returns whether `gold` is a decimal that `value` may have been rounded to."""
    return gold.ulp is not None and gold.looks_rounded and abs(value - gold.value) <= gold.ulp / 2


def approximates(answer: Number, value: Fraction) -> bool:
    """Returns whether `answer` is a decimal of enough digits to which `value` was rounded or cut off."""
    if answer.ulp is None or answer.digits < MIN_APPROXIMATION_DIGITS:
        return False
    error = abs(value) - abs(answer.value)
    same_side = (value >= 0) == (answer.value >= 0)
    return same_side and (abs(error) <= answer.ulp / 2 or 0 <= error < answer.ulp)
