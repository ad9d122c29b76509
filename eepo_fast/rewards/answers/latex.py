"""Reads LaTeX by math-verify's grammar, without what that gets wrong: it adds neighbouring numbers (3(4) is 7), taking
them for mixed numbers (which `normalise` has written out before), and drops what it does not expect, such as primes.

Worker processes alone call it.
"""

import re

import sympy
from latex2sympy2_extended.latex2sympy2 import ConversionConfig, _Latex2Sympy

CONFIG = ConversionConfig(lowercase_symbols=False, interpret_as_mixed_fractions=False)
ARGUMENTS = {"frac": 2, "binom": 2}
DIGITS = frozenset("0123456789.")
TOKEN = re.compile(r"\\[A-Za-z]+|\\.|.", re.DOTALL)
BROKEN = re.compile(
    r"[0-9.] +[0-9.]|"  # two numbers and nothing between them
    r"(?<![_A-Za-z0-9.])[0-9.]+_|"  # a subscript on a number
    r"(?:^|[^_A-Za-z0-9.])[0-9.]*(?:'|\^\{?\\prime)|"  # a prime that is on no name
    r"[)\]}] *_"
)  # fmt: skip
ACCENTED = re.compile(r"\\(?:bar|overline|text)\{ *[A-Za-z0-9]+ *\}(?= *_)")


class _Converter(_Latex2Sympy):
    def convert_postfix_list(self, factors: list, i: int = 0) -> object:
        """Returns the product of the factors from the i-th on."""
        first = self.convert_postfix(factors[i])
        if i == len(factors) - 1 or isinstance(first, list):  # a factor alone, or a derivative
            return super().convert_postfix_list(factors, i)
        if not isinstance(first, (sympy.Expr, sympy.MatrixBase)):
            return first
        rest = self.convert_postfix_list(factors, i + 1)
        if isinstance(first, sympy.MatrixBase) or isinstance(rest, sympy.MatrixBase):
            return self.mat_mul_flat(first, rest)
        return self.mul_flat(first, rest)


def convert(text: str) -> object:
    """Returns the expression; an exception of any kind means that there is none."""
    return _Converter(config=CONFIG).parse(text)


def is_broken(text: str) -> bool:
    """Returns whether there is a prime or subscript on a number, two numbers side by side, or a brace group glued to a
    number: the grammar would make something of them that is not there."""
    return BROKEN.search(ACCENTED.sub("x", text)) is not None or _glued_group(text)


def _glued_group(text: str) -> bool:
    """Returns whether a {group} that no command asked for is next to a number or another group."""
    tokens = TOKEN.findall(text)
    expected: list[tuple[bool, int]] = []  # for each open brace: is it an argument, and how many more follow
    before, following, glued = "", 0, False  # `glued`: the token before ended such a group
    for i, token in enumerate(tokens):
        if glued and (token == "{" or token.isdigit()):
            return True
        glued = False
        if token == "{":
            argument = before[:1] == "\\" or before in ("^", "_", "]") or (before == "}" and following > 0)
            inner = tokens[i + 1] if i + 1 < len(tokens) else ""
            if not argument and (before == "}" or (before in DIGITS and inner in DIGITS)):
                return True
            left = ARGUMENTS.get(before[1:], 1) if before[:1] == "\\" else following
            expected.append((argument, left - 1 if argument else 0))
            following = 0
        elif token == "}":
            argument, following = expected.pop() if expected else (False, 0)
            glued = not argument
        elif token != " ":
            following = 0
        before = token if token != " " else before
    return False
