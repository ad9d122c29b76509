r"""Writes tuples, intervals and sets of other school books as ours: ]0,1[ as (0,1), [0;1] and (0,5;1) as [0,1] and
(0.5,1), (1|2) and <1,2> as (1,2), {x | x>0} as \{x|x>0\}.

A comma is a decimal one only where a semicolon or a bar separates, which is what people who write decimal commas do;
3 digits after it could be thousands, and stay as they are.
"""

import re

from eepo_fast.rewards.answers.forms import split

PIECE = re.compile(r"(\\(?:cup|cap|setminus|in)(?![A-Za-z])|=|\\text\s*\{\s*(?:and|or)\s*\}|\b(?:and|or)\b)")
GROUP = re.compile(
    r"([(\[]|\\langle(?![A-Za-z]))([^()\[\]{}]{0,40}(?:\{[^{}]*\}[^()\[\]{}]{0,40}){0,8})([)\]]|\\rangle(?![A-Za-z]))"
)
DECIMAL_COMMA = re.compile(r"\s*[-+]?[0-9]+,(?:[0-9]{1,2}|[0-9]{4,})\s*")
COORDINATE = re.compile(r"\s*[-+]?(?:[0-9]+(?:[.,/][0-9]+)?|\\frac\s*\{[0-9]+\}\s*\{[0-9]+\})\s*")
ANGLED = re.compile(r"(^|=)\s*<([^<>=]{1,200}[,;][^<>=]{1,200})>$")
BUILDER = re.compile(
    r"(?<![\\A-Za-z0-9}_^])\{(\s*[A-Za-z]\s*(?:\\in\s*(?:\\mathbb\s*(?:\{[A-Z]\}|[A-Z])|[A-Z])\s*)?"
    r"(?:\||:|\\mid(?![a-z]))(?:[^{}]|\{[^{}]*\}){1,200})\}"
)
ASSIGNED = re.compile(r"((?:=|\\in(?![A-Za-z]))\s*)\{([^{}]{1,200}[,;][^{}]{1,200})\}(?=\s*\$?$)")


def set_builder(text: str) -> str:
    r"""Returns {x | x>0} as \{x | x>0\}, and S={1,2} as S=\{1,2\}, on a text that still has its outer braces."""
    if "{" not in text:
        return text
    text = ASSIGNED.sub(r"\1\\{\2\\}", text)
    return BUILDER.sub(r"\\{\1\\}", text) if any(sign in text for sign in ("|", ":", "\\mid")) else text


def common_brackets(text: str) -> str:
    if "<" in text:
        text = ANGLED.sub(r"\1\\langle \2\\rangle ", text.strip())
    if "[" in text or "]" in text:
        text = "".join(map(_straight, PIECE.split(text)))
    return GROUP.sub(_separated, text) if ";" in text or "|" in text else text


def _straight(piece: str) -> str:
    """Returns ]0,1[ as (0,1), [0,1[ as [0,1)."""
    stripped = piece.strip()
    opening, inner, closing = stripped[:1], stripped[1:-1], stripped[-1:]
    if opening not in tuple("[](") or closing not in tuple("[])") or (opening != "]" and closing != "["):
        return piece
    if inner.count("[") != inner.count("]") or len(split(inner, ";")) != 2 != len(split(inner, ",")):
        return piece
    return ("(" if opening == "]" else opening) + inner + (")" if closing == "[" else closing)


def _separated(match: re.Match) -> str:
    opening, inner, closing = match.groups()
    parts = inner.split(";")
    if len(parts) == 1 and all(map(COORDINATE.fullmatch, inner.split("|"))):
        parts = inner.split("|")
    if len(parts) == 1 or not all(part.strip() for part in parts) or re.search(r"[=<>]|\\(?:le|ge|ne|in)\b", inner):
        return match.group()
    if any("," in part and not DECIMAL_COMMA.fullmatch(part) for part in parts):
        return match.group()
    return opening + ",".join(part.replace(",", ".") for part in parts) + closing
