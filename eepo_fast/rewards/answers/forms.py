"""Reads the form of a normalised text: its parts between separators, its brackets, its relation signs."""

import re

OPENING, CLOSING = ("(", "[", "\\{", "\\langle", "{"), (")", "]", "\\}", "\\rangle", "}")
TOKEN = re.compile(r"\\(?:begin|end)\{[A-Za-z]{1,12}\*?\}|\\[A-Za-z]+|\\.|.", re.DOTALL)
RELATIONS = ("=", "<", ">", "\\le", "\\ge", "\\ne", "\\in", "\\approx", "\\equiv")
FLIPPED = {"<": ">", ">": "<", "\\le": "\\ge", "\\ge": "\\le"}
NAME = re.compile(
    r"(?:\\text\{[^{}]*\}|(?:\\angle |\\triangle |m\\angle )?(?:\\[A-Za-z]+|[A-Za-z]{1,4}))"
    r"(?:_(?:\{[^{}]*\}|[0-9A-Za-z]))?(?:'|\^\{?\\prime\}?)*(?:\([A-Za-z0-9,]*\))?"
)


def _step(token: str) -> int:
    """Returns 1 for what opens, -1 for what closes; an environment is a bracket, too."""
    opens = token in OPENING or token.startswith("\\begin{")
    return opens - (token in CLOSING or token.startswith("\\end{"))


def closes_at_end(text: str) -> bool:
    """Returns whether the bracket that opens the text is closed by its last character."""
    depth = 0
    tokens = TOKEN.findall(text)
    for i, token in enumerate(tokens):
        depth += _step(token)
        if depth == 0:
            return i == len(tokens) - 1
    return False


def split(text: str, *separators: str) -> list[str]:
    """Splits at separators outside of all brackets; the kinds of a pair may differ, as they do in intervals."""
    if not any(separator in text for separator in separators):
        return [text]
    parts, current, depth = [], "", 0
    for token in TOKEN.findall(text):
        depth += _step(token)
        if depth == 0 and token in separators:
            parts.append(current)
            current = ""
        else:
            current += token
    parts.append(current)
    return [part.strip() for part in parts]


def group(text: str) -> tuple[tuple[str, str], list[str]] | None:
    """Returns (brackets, parts) of a tuple or an interval; None for other texts."""
    for opening in ("(", "[", "\\langle"):
        for closing in (")", "]", "\\rangle"):
            if text.startswith(opening) and text.endswith(closing) and len(text) > len(opening) + len(closing):
                if not closes_at_end(text):
                    return None
                parts = split(text[len(opening) : len(text) - len(closing)], ",")
                kinds = ("(" if opening == "\\langle" else opening, ")" if closing == "\\rangle" else closing)
                return (kinds, parts) if len(parts) > 1 else None
    return None


def relation(text: str) -> tuple[list[str], list[str]] | None:
    """Returns (sides, relation signs) of an equation, an inequality or a chain of them; None for other texts."""
    if not any(sign in text for sign in RELATIONS):
        return None
    signs, depth = [], 0
    for token in TOKEN.findall(text):
        depth += _step(token)
        if depth == 0 and token in RELATIONS:
            signs.append(token)
    return (split(text, *RELATIONS), signs) if signs else None


def oriented(sides: list[str], signs: list[str]) -> tuple[list[str], list[str]]:
    """Returns the sides and signs with the smaller side first."""
    if signs and all(sign in (">", "\\ge") for sign in signs):
        return sides[::-1], [FLIPPED[sign] for sign in signs[::-1]]
    return sides, signs
