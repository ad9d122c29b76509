r"""Finds a completion's final answer: the last \boxed{}, else what follows "the answer is", else the last number.

Only the completion is read. An empty last box is no answer, whatever came before it. The text is gone through once:
completions are long, and written by models that are rewarded for what happens here.
"""

import re
from collections import deque

# `Answer: 18` ends its line; `Answer: She sold 18 in May and` begins to reason
NO_SENTENCE = r"(?:(?!\. )[^\n]){0,80}"
SHORT_WORDS = r"(?:so|is|as|we|it|if|by|to|of|the|not|for|but|was)(?![A-Za-z])"
NO_WORDS = rf"(?:(?!\. |(?<![\\A-Za-z{{])(?:[A-Za-z]{{4}}|{SHORT_WORDS}))[^\n]){{0,80}}"
VALUE = r"[-+−–±√π∞∅.$\\0-9]"
FORMULA_LINE = (
    rf"{VALUE}{NO_WORDS}|"
    rf"[(（\[\]{{⟨<]\s?(?:{VALUE}|[(\[{{]|[A-Za-z]\s?(?:[-,;|)}}:∈=<>≤≥^_+*/]|\\)){NO_WORDS}|"
    rf"[A-Za-z]\s?(?:[=∈<>≤≥≠≈^_+*/(]|"
    rf"-(?=[0-9])|\\(?:in|le|ge|ne|leq|geq|neq|approx|cdot|pm|cup)(?![A-Za-z])){NO_WORDS}"
)
CHOICE_LINE = rf"\(?[A-J]\)?|(?-i:\([A-J]\)|[A-J][.):]){NO_SENTENCE}"
ANSWER_WORD = (
    r"(?:answer|antwort|lösung|r[ée]ponse|respuesta|soluci[óo]n|risposta|resposta|odpowiedź|svar|ответ|"
    r"答案|答え|解答|答|정답|답)"
)
SHORT_ANSWER = (
    rf"^answer(?=\s{{0,9}}:[ \t]{{0,9}}[-$\\0-9]{NO_SENTENCE}[ \t]{{0,9}}$)|"
    rf"^[ \t>#*_]{{0,9}}(?P<short>{ANSWER_WORD})(?=[ \t*_]{{0,9}}[:：][\s*_]{{0,9}}(?:{CHOICE_LINE}|{FORMULA_LINE})"
    r"[.。]?[ \t*_]{0,9}$)"
)
ANSWER_IS = re.compile(
    r"(?:(?:final|correct)\s{1,9}answer|the\s{1,9}answer|correct\s{1,9}(?:option|choice)|答案(?=[是为為])|"
    + SHORT_ANSWER
    + r")[\s*_]{0,9}(?:is|[:：是为為])(?:\s{1,9}(?:therefore|thus|hence|then))?\s{0,9}[,:]?[\s*]{0,9}",
    re.IGNORECASE | re.MULTILINE,
)
BRACES = re.compile(r"\\(?:boxed|fbox)\s{0,9}\{|\\[{}]|[{}]")
SENTENCE_END = re.compile(r"\.(?=\s|$)|。")
LINE_END = re.compile(r"(?<!^[A-J])\.(?=\s|$)|\.$|。")  # B. 12 is one answer
FRACTION = r"\\[dtc]?frac\s?(?:\{-?[0-9]{1,40}\}|[0-9])\s?(?:\{-?[0-9]{1,40}\}|[0-9])"
DIGITS = r"[0-9](?:[0-9]|(?:,|\{,\}|\\[,!]|,\\!)(?=[0-9]{3}))*(?:\.[0-9]+)?"
SPACE = r"(?:\s|\\,)?"
MINUS = rf"(?:[-−]{SPACE}|–)"  # a dash with space around it is no sign
FORMULA = re.compile(r"(?<!\\)\$(?!\s)([^$\n]{1,400})(?<![\\\s])\$(?![0-9])")  # $5 and $6 are no formula
LAST_NUMBER = re.compile(
    rf"(?<![0-9.^_])(?<![_^]\{{){MINUS}?\$?(?:(?:[0-9]{{1,9}}\s?)?[¼½¾⅓⅔⅕⅙⅛]|{FRACTION}|"
    rf"[0-9]{{1,9}}\s?{FRACTION}|[0-9]{{1,9}} [0-9]{{1,9}}/[0-9]{{1,9}}|"
    rf"[0-9]{{1,3}}(?::[0-9]{{1,2}}){{1,2}}(?![0-9])|"
    rf"(?:{DIGITS}|\.[0-9]+)(?:\s?(?:\\times|\\cdot|[×x*])\s?(?:10|\{{10\}})\^"
    rf"(?:\{{\s?[-+−]?[0-9]{{1,6}}\s?\}}|[-+−]?[0-9]{{1,6}})|"
    rf"[eE][-+]?[0-9]{{1,6}}(?![0-9A-Za-z])|/[0-9]+|\^(?:\{{-?[0-9]{{1,6}}\}}|-?[0-9]{{1,6}}))?)(?:\s?\\?%)?"
)
MINUS_SIGN = re.compile(MINUS)
MAX_LINE = 2001  # one more than an answer may have, so that a longer one is seen to be too large


def extract_answer(completion: str) -> str | None:
    """Returns the answer's text; None where there is none."""
    if (boxed := _last_boxed(completion)) is not None:
        return boxed.strip() or None
    announced = _last(ANSWER_IS, completion)
    if announced and (rest := _announced(completion[announced.end() :], announced["short"] is not None)):
        return rest
    if (last := _last(LAST_NUMBER, completion)) is None:
        return None
    if formula := _formula_around(completion, last.end() - 1):
        return formula
    number = MINUS_SIGN.sub("-", last.group().replace("$", "").replace("{10}^", "10^"))
    before = completion[max(0, last.start() - 9) : last.start()].rstrip()[-1:]
    minus = number.startswith("-") and (before.isdigit() or before in (")", "}"))  # 5 - 3 ends with 3, not -3
    return number[1:] if minus else number


def _last(pattern: re.Pattern, text: str) -> re.Match | None:
    return next(iter(deque(pattern.finditer(text), maxlen=1)), None)


def _formula_around(text: str, place: int) -> str | None:
    r"""Returns the right side of the $formula$ around a place, if the number there is not all of it: 2\sqrt{3}."""
    begin, end = text.rfind("\n", 0, place) + 1, text.find("\n", place)
    for match in FORMULA.finditer(text, begin, end if end >= 0 else len(text)):
        if match.end() > place:
            whole = match.start() <= place and ("\\" in match[1] or "^" in match[1])
            return match[1].rpartition("=")[2].strip() if whole else None
    return None


def _announced(rest: str, short: bool) -> str:
    """Returns the sentence that announces an answer, or an equation's right side ("9 months * $5 = $45"). `short`: it
    is a line with nothing but an answer."""
    rest = rest.split("\n", 1)[0] if rest[:1] != "\n" else ""
    rest = (LINE_END if short else SENTENCE_END).split(rest[:MAX_LINE], maxsplit=1)[0].strip().strip("*").strip()
    rest = re.split(r"\s(?:because|since)\s", rest, maxsplit=1)[0]
    if rest.count("$") in (2, 4) and "$" not in rest.strip("$") and rest.startswith("$") and rest.endswith("$"):
        rest = rest.strip("$").strip()
    left, equals, right = rest.rpartition("=")
    if equals and re.search(r"(?<![\\A-Za-z])[A-Za-z]{3,}", left) and re.search(r"[0-9]", right):
        return right.strip()
    return rest


def _last_boxed(text: str) -> str | None:
    r"""Returns the content of the last \boxed{...} or \fbox{...} whose braces close, in one pass; None without one."""
    stack: list[int | None] = []  # for each open brace: where the content of its box starts, None for other braces
    last: tuple[int, int] | None = None
    for match in BRACES.finditer(text):
        token = match.group()
        if token == "}":
            start = stack.pop() if stack else None
            if start is not None and (last is None or start > last[0]):
                last = start, match.start()
        elif token not in ("\\{", "\\}"):
            stack.append(match.end() if len(token) > 1 else None)
    return None if last is None else text[last[0] : last[1]]
