"""Says whether two expressions are the same: parsed by math-verify's LaTeX parser, compared by value. Worker processes
alone call it: hostile input can make this run for ever or out of memory.

Two constants are equal if they agree to 30 digits; two expressions with variables if they agree to 20 digits at points
drawn once and for all, of both signs, wherever both are real (that is: √(x²) is not x, and ln(ab) is ln a + ln b).
`simplify` is never asked. What cannot be evaluated (an integral, a set, a function nobody knows) must be equal as it
stands. Nothing is parsed but the characters and commands listed here, and only by the LaTeX grammar: math-verify's
other parser hands text to Python's `eval`.
"""

import random
import re
from fractions import Fraction
from functools import lru_cache

from sympy import Abs, Basic, Derivative, Float, I, N, Rational, S, Symbol
from sympy.core.function import AppliedUndef
from sympy.core.relational import Relational
from sympy.matrices import MatrixBase
from sympy.sets import Set

from eepo_fast.rewards.answers.latex import convert, is_broken
from eepo_fast.rewards.answers.numbers import Number, approximates, read_number, rounds_to
from eepo_fast.rewards.answers.texts import is_whole, same_text
from eepo_fast.rewards.answers.units import word_set

CHARACTERS = re.compile(r"[A-Za-z0-9 +\-*/^_={}()\[\]|.,!'\\]*")
COMMANDS = word_set(
    "frac sqrt cdot pi text theta alpha beta gamma delta epsilon varepsilon zeta eta lambda mu nu xi rho sigma tau phi "
    "varphi chi psi omega Gamma Delta Theta Lambda Sigma Phi Psi Omega kappa iota hbar ell sin cos tan cot sec csc "
    "arcsin arccos arctan sinh cosh tanh ln log exp binom lfloor rfloor lceil rceil infty overline bar gcd lcm max min "
    "mod bmod pmod angle triangle imath prime dot ddot odot div vec hat tilde"
)
UNFINISHED = word_set("int iint oint sum prod lim det nabla partial limsup liminf")
DECIMAL = re.compile(r"(?<![0-9.])([0-9]*)\.([0-9]+)(?![0-9.])")
COMMAND = re.compile(r"\\([A-Za-z]+)")
DOT = re.compile(r"\\(d?)dot\{?(\\?[A-Za-z]+)\}?(?:_\{?([0-9A-Za-z])\}?)?")
ACCENT = re.compile(
    r"\\(vec|hat|tilde) ?(?:\{(\\?[A-Za-z]{1,9}|0) ?\}|(\\[A-Za-z]+|[A-Za-z0]))(?:_\{?([0-9A-Za-z])\}?)?"
)
DIVISORS = re.compile(r"\\(?:gcd|lcm)(?!\([0-9, ]+\))")
LOGARITHM = r"\\(?:ln|log(?:_(?:\{[^{}]*\}|[0-9A-Za-z]))?)"
RENAMED = (
    (re.compile(r"\\(angle|triangle) ?\{?([A-Z]{1,4})(?![A-Za-z])\}?"), lambda m: _figure(*m.groups())),
    (re.compile(r"\\cdot(?![A-Za-z])"), r"\\cdot "),
    (re.compile(r"np\.|math\."), ""),
    (re.compile(r"(?<![\\A-Za-z])(arcsin|arccos|arctan|sin|cos|tan|sqrt|ln|log|exp)(?=[({])"), r"\\\1"),
    (re.compile(rf"({LOGARITHM} ?)([0-9]{{1,9}}|[A-Za-z])(?=/{LOGARITHM})"), r"\1(\2)"),  # \ln 3/\ln 2 is a quotient
    (re.compile(r"(\\text\{[A-Za-z]{2,9}\})\(([0-9A-Za-z])\)"), r"\1 \2"),  # \text{rank}(A)
    (re.compile(r"\\exp\{([^{}]*)\}"), r"e^{\1}"),
    (re.compile(r"\\(arc[a-z]{3}|sin|cos|tan|ln|log)\{([^{}]*)\}"), r"\\\1(\2)"),
    (re.compile(r"(?<=[A-Za-z)])(?:\^\{?\\prime\}?|')"), r"_{prime}"),
    (re.compile(r"\\odot"), "0"),
    (re.compile(r"\^(?:T(?!_)|\{T\})"), r"^{1\\cdot T}"),  # the grammar transposes: A^T would be A
    (re.compile(r"(?<![A-Za-z\\])C_(?:\{([0-9]{1,4})\}|([0-9]))\^(?:\{([0-9]{1,4})\}|([0-9]))"), lambda m: _chosen(m)),
    (re.compile(r"\\gamma(?![A-Za-z])"), r"\\xi_{g}"),  # alone it would be Euler's constant
    (re.compile(r"\\pi(?=\()"), r"\\pi \\cdot "),  # a factor, not a function
    (re.compile(r"(?<![A-Z\\])E(?=_)"), r"\\Xi"),
    (re.compile(r"(?<![A-Z\\])E(?![A-Za-z])"), r"\\Xi_{0}"),
    (re.compile(r"_\{?\\(max|min) *\}?"), r"_{\1}"),
    (re.compile(r"\\imath"), "i"),
    (re.compile(r"_\{\\text\{([A-Za-z ]{1,20})\}\}"), lambda m: "_{" + m.group(1).replace(" ", "") + "}"),
    (re.compile(r"\(([0-9]+)\+(\\frac\{[0-9]+\}\{[0-9]+\})\)"), r"(\1+\2)"),
)  # fmt: skip
POINTS = 6
DIGITS = 40
EQUAL, EQUAL_AT_POINT = Float("1e-30", DIGITS), Float("1e-20", DIGITS)
ZERO = Float("1e-110", DIGITS)  # sympy gives up on telling a constant from zero below 1e-120


class NotMathematicsError(Exception):
    """Says that a text is not parsed: it has an unknown command or character, or nothing the grammar takes."""


def ask(question: str, gold: str, answer: str) -> bool:
    """Answers what `compare` asks of a worker. A gold that is no mathematics is compared as text; NotMathematicsError
    for one that is no text either, such as one with a brace left open."""
    try:
        gold_expression = parse_latex(gold)
    except NotMathematicsError:
        if not is_whole(gold):
            raise
        return same_text(gold, answer)
    try:
        answer_expression = parse_latex(answer)
    except NotMathematicsError:
        return False
    if UNFINISHED.intersection(COMMAND.findall(answer)).difference(COMMAND.findall(gold)):
        return False
    if question != "equal":
        return _proportional(gold_expression, answer_expression, question == "positively_proportional")
    return equal(gold_expression, answer_expression, read_number(gold), read_number(answer))


@lru_cache(maxsize=512)
def parse_latex(text: str) -> Basic:
    """Returns math-verify's reading of a normalised text; NotMathematicsError where it has none."""
    if not CHARACTERS.fullmatch(text) or not text or "!!!" in text:
        raise NotMathematicsError
    if not COMMANDS.union(UNFINISHED, ("to", "rightarrow", "mathbb")).issuperset(COMMAND.findall(text)):
        raise NotMathematicsError
    text = ACCENT.sub(_accented, DOT.sub(r"\2_{\1dot\3}", text))
    if is_broken(text) or DIVISORS.search(text):  # of letters gcd would be 1
        raise NotMathematicsError
    for pattern, replacement in RENAMED:
        text = pattern.sub(replacement, text)
    if not re.search(r"\\frac\{d|\\i?int|\\text", text):  # db is a product, no differential
        text = re.sub(r"\\[A-Za-z]+|d(?=[A-Za-z])", lambda m: "{d}" if m.group() == "d" else m.group(), text)
    if "\\angle" in text or "\\triangle" in text:  # an angle or a triangle that names no points
        raise NotMathematicsError
    text = DECIMAL.sub(lambda m: f"(\\frac{{{int(m.group(1) + m.group(2))}}}{{{10 ** len(m.group(2))}}})", text)
    try:
        parsed = convert(text)
    except Exception as error:  # the grammar's errors are plain Exceptions
        raise NotMathematicsError from error
    if not isinstance(parsed, (Basic, MatrixBase)):
        raise NotMathematicsError
    return parsed


def _chosen(match: re.Match) -> str:
    r"""Returns \binom{5}{2} for C_5^2; a power of a constant, such as C_1^2, stays one."""
    above, below = match.group(1) or match.group(2), match.group(3) or match.group(4)
    return f"\\binom{{{above}}}{{{below}}}" if int(above) >= int(below) and int(above) > 2 else match.group()


def _accented(match: re.Match) -> str:
    r"""Returns one symbol for \vec{v} or \hat{x}_1."""
    accent, braced, plain, index = match.groups()
    return f"\\xi_{{{accent}{(braced or plain).lstrip(chr(92))}{index or ''}}}"


def _figure(kind: str, points: str) -> str:
    r"""Returns one symbol for \angle ABC, which is \angle CBA and no product, or for \triangle ABC."""
    return f"\\xi_{{angle{min(points, points[::-1])}}}" if kind == "angle" else f"\\xi_{{figure{points}}}"


def equal(gold: Basic, answer: Basic, gold_number: Number | None = None, answer_number: Number | None = None) -> bool:
    if gold == answer:
        return True
    if any(isinstance(e, (Relational, Set, MatrixBase)) or not hasattr(e, "free_symbols") for e in (gold, answer)):
        return False
    gold, answer = _closed(gold), _closed(answer)
    if gold.free_symbols != answer.free_symbols:
        return False
    symbols = sorted(gold.free_symbols, key=str)
    if not symbols:
        exact = gold.doit() - answer.doit()
        if exact.is_Rational:  # 2^{2008}-2 is not 2^{2008}-3
            error = Fraction(int(exact.p), int(exact.q))
            return error == 0 or (gold_number is not None and rounds_to(gold_number, gold_number.value - error))
        first, second = _value(gold), _value(answer)
        if first is None or second is None:
            return False
        if _close(first, second, EQUAL):
            return True
        if gold_number is not None and _is_real(second):
            return rounds_to(gold_number, _fraction(second))
        if answer_number is not None and _is_real(first):
            return not (gold.is_integer or gold.is_rational) and approximates(answer_number, _fraction(first))
        return False
    pairs = [_values(gold, answer, point) for point in _points(symbols)]
    known = [pair for pair in pairs if pair is not None]
    real = [pair for pair in known if _is_real(pair[0]) and _is_real(pair[1])]
    chosen = real if len(real) >= 3 else known
    return len(chosen) >= 3 and all(_close(a, b, EQUAL_AT_POINT) for a, b in chosen)


def _proportional(gold: Basic, answer: Basic, positive: bool) -> bool:
    """Returns whether answer = c · gold with a constant c ≠ 0, or with c > 0 where it must be positive."""
    if any(isinstance(e, (Relational, Set, MatrixBase)) for e in (gold, answer)):
        return False
    gold, answer = _closed(gold), _closed(answer)
    symbols = sorted(gold.free_symbols | answer.free_symbols, key=str)
    pairs = [_values(gold, answer, point) for point in _points(symbols)] if symbols else []
    ratios = [b / a for a, b in (p for p in pairs if p is not None) if abs(a) > EQUAL and abs(b) > EQUAL]
    if len(ratios) < 3 or not all(_close(ratios[0], ratio, EQUAL_AT_POINT) for ratio in ratios):
        return False
    return not positive or (_is_real(ratios[0]) and ratios[0].as_real_imag()[0] > 0)


def _closed(expression: Basic) -> Basic:
    """Puts i for the imaginary unit, and one new symbol for each derivative and use of an unknown function: x(t)."""
    functions = {use: Symbol(f"use{{{use}}}") for use in expression.atoms(AppliedUndef, Derivative)}
    expression = expression.xreplace(functions) if functions else expression
    return expression.xreplace({s: I for s in expression.free_symbols if s.name == "i"})


def _points(symbols: list[Symbol]) -> list[dict[Symbol, Rational]]:
    generator = random.Random(20251)
    points = []
    for n in range(POINTS):
        point = {}
        for symbol in symbols:
            sign = 1 if n % 2 == 0 else generator.choice((1, -1))
            point[symbol] = sign * Rational(generator.randint(1009, 4999), 1013)
        points.append(point)
    return points


def _values(gold: Basic, answer: Basic, point: dict[Symbol, Rational]) -> tuple[Basic, Basic] | None:
    first, second = _value(gold.xreplace(point)), _value(answer.xreplace(point))
    return None if first is None or second is None else (first, second)


def _value(expression: Basic) -> Basic | None:
    """Returns a number of 40 digits, perhaps complex; None where there is none."""
    try:
        value = N(expression.doit(), DIGITS)
    except (TypeError, ValueError, ArithmeticError, AttributeError, NotImplementedError, RecursionError):
        return None
    return value if value.is_number and value.is_finite and not value.has(S.NaN, S.ComplexInfinity) else None


def _close(first: Basic, second: Basic, tolerance: Float) -> bool:
    scale = max(Abs(first), Abs(second))
    return bool(N(Abs(first - second), DIGITS) <= tolerance * scale) or bool(scale < ZERO)


def _is_real(value: Basic) -> bool:
    real, imaginary = value.as_real_imag()
    return bool(abs(imaginary) <= EQUAL_AT_POINT * max(1, abs(real)))


def _fraction(value: Basic) -> Fraction:
    return Fraction(str(value.as_real_imag()[0]))
