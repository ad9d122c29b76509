r"""Compares as text what no grammar reads: \vec{v}\cdot\nabla, \mathcal{O}(n^2), P(A \mid B), words in other scripts.

Two texts are the same if they differ in nothing but spaces, braces that LaTeX does not need, the font, and how a
function's name is written: \operatorname{Re}(z), \Re z. Order counts, and so do capitals, except where there is nothing
but words. What is not whole (a brace left open, a command without its argument, nothing to read) is no text: with such
a gold nothing can be compared.
"""

import re

TOKEN = re.compile(r"\\[A-Za-z]+|\\.|.", re.DOTALL)
ENVIRONMENT = re.compile(r"\\(begin|end)\{([A-Za-z]{1,12}\*?)\}")
OPEN_END = re.compile(
    r"(?:(?<![_^{])(?:[-+*/=<>]|\\cdot)|[_^\\]|\\(?:le|ge|ne|in|cup|cap|setminus"
    r"|pm|frac|binom|sqrt|vec|hat|tilde|overline|text)"
    r"|\\(?:frac|binom)\{[^{}]*\})$"
)
FONT = re.compile(r"\\(?:math(?:cal|scr|frak)|operatorname\*?)(?![A-Za-z])")
WORD = re.compile(r"\\text\{([^{}\\]*)\}")
NEEDLESS = re.compile(r"(?<!\\)\{ *(\\?[A-Za-z]+|[^{}\\]) *\}")
LONE_ARGUMENT = re.compile(r"(?<=[A-Za-z]{2})\(([0-9A-Za-z])\)")
SIGNS = {
    "→": "to", "rightarrow": "to", "⇒": "Rightarrow", "implies": "Rightarrow", "⇔": "iff", "Leftrightarrow": "iff",
    "∀": "forall", "∃": "exists", "⊂": "subset", "⊆": "subseteq", "∧": "wedge", "∨": "vee", "¬": "neg", "lnot": "neg",
    "∂": "partial", "∇": "nabla", "∥": "‖", "\\|": "‖", "parallel": "‖", "⊥": "perp", "∫": "int", "∑": "sum",
    "∏": "prod", "∤": "nmid",
}  # fmt: skip


def is_whole(text: str) -> bool:
    """Returns whether a normalised text could be somebody's answer, whatever it means."""
    if "\ufffd" in text or not re.search(r"[^\W_]", text) or OPEN_END.search(text):
        return False
    environments: list[str] = []
    for kind, name in ENVIRONMENT.findall(text):
        if kind == "begin":
            environments.append(name)
        elif not environments or environments.pop() != name:
            return False
    tokens = TOKEN.findall(ENVIRONMENT.sub("", text))
    braces = brackets = 0
    for token in tokens:
        braces += (token == "{") - (token == "}")
        brackets += (token in ("(", "[", "\\{")) - (token in (")", "]", "\\}"))
        if braces < 0:
            return False
    return not environments and braces == brackets == 0


def same_text(gold: str, answer: str) -> bool:
    gold, answer = _key(gold), _key(answer)
    if not re.search(r"[A-Za-z0-9\\]", gold):  # words of other scripts
        return gold.casefold() == answer.casefold()
    return gold == answer


def _key(text: str) -> str:
    text = WORD.sub(r"\1", FONT.sub("", re.sub(r"(?<=[0-9]) +(?=[0-9])", "\0", text)))
    for _ in range(3):  # as deep as anybody nests them
        text = NEEDLESS.sub(r"\1", text)
    tokens = (token[1:] if token[:1] == "\\" and token[1:].isalpha() else token for token in TOKEN.findall(text))
    return LONE_ARGUMENT.sub(r"\1", "".join(SIGNS.get(token, token) for token in tokens if not token.isspace()))
