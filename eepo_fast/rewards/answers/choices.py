r"""Reads a choice that is given with its text: \textbf{(B) }12, B. 12, Option B: twelve."""

import re
from typing import NamedTuple

from eepo_fast.rewards.answers.normalise import normalise

FONT = r"\\(?:text(?:bf|it|rm|sf|normal)?|math(?:bf|rm|it|sf)|boldsymbol|mbox)\s*"
IN_FONT = re.compile(rf"^{FONT}\{{((?:[^{{}}]|\{{[^{{}}]*\}})*)\}}")
LETTER_IN_FONT = re.compile(rf"^\(\s*{FONT}\{{\s*([A-J])\s*\}}\s*\)")
BOXED = re.compile(r"^\\(?:boxed|fbox)\s*\{(.*)\}$", re.DOTALL)
SAID = re.compile(r"^(?:the )?(?:correct )?(?:answer|option|choice)(?: is)?:?\s+", re.IGNORECASE)
LETTER = re.compile(
    r"^(?:\((?P<round>[A-J])\)[.:]?|(?P<plain>[A-J])\s?[.:)])"
    r"(?P<space>(?:\*\*|\$|\\[,;: ]|~|\\q?quad(?![a-z])|\s){0,9})(?P<text>\S.*)$",
    re.DOTALL,
)
SOLE_LETTER = re.compile(r"\(?[A-J]\)?")
MAYBE = re.compile(r"[A-J][\s}]{0,9}[.:)]")
OPERATOR = re.compile(r"[-+*/^(\[|<]")
# what makes a product, a relation, a list or a sentence of it, and no choice
NO_TEXT = re.compile(
    r"[=_>,;&!'.)\]}]|\\(?:cdot|times|cup|cap|in|le|ge|to|subset|pm|mid|sim)(?![A-Za-z])|(?:and|or|is|are|but|not)\b|"
    r"[A-Z](?:\W*$|\s*[=:])|(?:.*\W)?(?:\([A-J]\)|[A-J][.):]|(?:and|or)\s+\(?[A-J]\W*$)",
    re.DOTALL,
)
NEGATIVE = re.compile(r"-[0-9a-z.\\]|\(\s?-?[0-9]|\[")


class Choice(NamedTuple):
    letter: str
    text: str


def read_choice(answer: str) -> Choice | None:
    """Returns the letter and its text; None for a letter alone, and for what may be a product or a sentence."""
    if not MAYBE.search(answer):
        return None
    start = answer.strip().strip("*$").strip()
    if boxed := BOXED.match(start):
        start = boxed.group(1).strip().strip("$")
    start = LETTER_IN_FONT.sub(r"(\1) ", IN_FONT.sub(r"\1 ", SAID.sub("", start).lstrip("*$")))
    if not (match := LETTER.match(start.strip())):
        return None
    text = match.group("text").strip("*$ ")
    if not text or NO_TEXT.match(text) or (match.group("round") and not match.group("space") and text[0].islower()):
        return None
    if match.group("round") and OPERATOR.match(text) and not (match.group("space") and NEGATIVE.match(text)):
        return None
    return Choice(match.group("round") or match.group("plain"), text)


def chosen(gold: str, answer: str) -> tuple[str, str]:
    r"""Returns the letters of both where the gold is a choice, and else what the answer says without its letter.

    Of a gold such as (B) 12 the letter counts, and an answer without a letter may be its text.
    """
    gold_choice, answer_choice = read_choice(gold), read_choice(answer)
    if not gold_choice and not answer_choice:
        return gold, answer
    if gold_choice and not answer_choice:
        return gold_choice.letter if SOLE_LETTER.fullmatch(normalise(answer)) else gold_choice.text, answer
    assert answer_choice
    if gold_choice or SOLE_LETTER.fullmatch(normalise(gold)):
        return gold_choice.letter if gold_choice else gold, answer_choice.letter
    return gold, answer if answer_choice.letter in gold else answer_choice.text
