"""Gives one spelling to the many ways in which people write the same answer, text for text; nothing is evaluated.

Every pattern is linear, or quadratic with a small constant on the 2,000 characters that an answer may have. Characters
that cannot be seen (zero width, direction marks, control characters) are left where they are: an answer that holds one
is no mathematics and equals nothing.
"""

import re
import unicodedata

from eepo_fast.rewards.answers.brackets import common_brackets, set_builder
from eepo_fast.rewards.answers.foreign import mark_foreign
from eepo_fast.rewards.answers.spellings import COMMANDS, SUBSCRIPTS, SUPERSCRIPTS, UNICODE
from eepo_fast.rewards.answers.units import mark_unit, word_set

FRACTIONS = re.compile("[¼½¾⅐⅑⅒⅓⅔⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞]")
COMMAND = re.compile(r"\\([A-Za-z]+)(\s*)")
FUNCTIONS = word_set(
    "sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh ln log exp sqrt gcd lcm max min mod det deg "
    "dim lim arg sup inf pi infty infinity theta alpha beta gamma lambda omega"
)
UNITS = word_set(
    "cm mm km nm ft in inch inches foot feet yd yards mi mile miles kg mg lb lbs oz ml sec secs second seconds "
    "min mins minute minutes hr hrs hour hours day days week weeks month months year years mph kph kmh hz khz "
    "kmph sqft sqcm sqm mbps "
    "mhz pa kpa ev kev mev kj kw kwh mol rad radians radian degree degrees meter meters metre metres liter "
    "liters litre litres gram grams cent cents dollar dollars usd square cubic sq cu unit units people ways "
    "way points point apples percent pct per kelvin joule joules watt watts newton newtons volt volts pounds "
    "pound gallons gallon au pc ly and or to of is about approximately roughly no yes odd even true false none "
    "empty rs hundred thousand million billion trillion times more less than the a an be"
) - {"a", "in", "au", "to"}
ENVIRONMENTS = word_set("matrix smallmatrix pmatrix bmatrix vmatrix Bmatrix array cases overline mathbb")
SCALES = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
# non-negative is a word, xy-yz is none
WORDS = re.compile(
    r"(?<![A-Za-z\\])(?:(?=[A-Za-z-]{0,40}[A-Za-z]{4})[A-Za-z]{3,}(?:-[A-Za-z]{3,})+|[A-Za-z]{2,}(?:'[A-Za-z]+)*)"
)
PRODUCT = re.compile("a?[bcdfghj-np-tv-z]{3,5}")  # letters that make no word: abxy, xyzw
PHRASE = re.compile(r"[A-Za-z]+(?:[ .'-]{1,3}[A-Za-z]+)+")
LONG_WORD = re.compile(r"(?<![A-Za-z])[A-Za-z]{4,}")
TEXT = re.compile(r"\\text\s*\{([^{}]*)\}")
WHOLE = re.compile(
    r"\\(?:text(?:bf|it|rm|sf|tt|normal)?|math(?:rm|bf|it|sf|cal)|emph|mbox|boxed|fbox)\s*\{(.*)\}", re.DOTALL
)
# what stays text, because its letters are no product
WORDED = re.compile(
    r"\\text\s*\{(?![^{}]*\b(?:and|or)\b)\s*[A-Za-z]{2,}\s*\}|"
    r"\\text\s*\{(?![^{}]*\b(?:and|or)\b)(?=[^{}]*[A-Za-z]{3})[A-Za-z .'-]*\}"
)
DELIMITERS = (("$$", "$$"), ("$", "$"), ("\\[", "\\]"), ("\\(", "\\)"), ("**", "**"), ("`", "`"),
              ('"', '"'))  # fmt: skip
BETWEEN = re.compile(r",?\s*\\text\{\s*[,;]?\s*(?:and|or|and/or)\s*[,;]?\s*\}\s*,?", re.IGNORECASE)
THOUSANDS = re.compile(r"(?<![0-9,.])[0-9]{1,3}(?:,[0-9]{3})+(?![0-9,])")
MARKED_THOUSANDS = re.compile(r"(?<=[0-9])(?:,\s*\\!\s*|\{,\}\s*|\\,|\\!)(?=[0-9]{3}(?![0-9]))")
SPACED_THOUSANDS = re.compile(r"(?<![0-9.,^_])[0-9]{1,3}(?: [0-9]{3})+(?![0-9])")
MIXED = re.compile(
    r"(?<![0-9.}^_\\A-Za-z)])([0-9]+)\s*(?:\\frac\s*\{\s*([0-9]+)\s*\}\s*\{\s*([0-9]+)\s*\}|\s([0-9]+)\s*/\s*([0-9]+))"
)
AM_PM = re.compile(r"(?<![A-Za-z\\])([apAP])\.\s?[mM](?:\.|(?![A-Za-z]))|"
                   r"(?<=:[0-9]{2})\s{0,3}([apAP])[mM](?![A-Za-z])|(?<=[0-9])\s{0,3}([AP])M(?![A-Za-z])")  # fmt: skip
DOLLARS = re.compile(r"(?:\\\$|\$)\s*([0-9]+(?:\.[0-9]+)?)(?:\s*dollars)?(\s*(?:/|per )\s*[a-z]{3,9})?")
ONES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
        "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"]  # fmt: skip
TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
SPOKEN = {word: str(n) for n, word in enumerate(ONES)} | {word: str(10 * n) for n, word in enumerate(TENS, 2)}
SPOKEN |= {f"{ten}-{ONES[n]}": str(int(SPOKEN[ten]) + n) for ten in TENS for n in range(1, 10)}
SPOKEN |= {f"{ONES[n]} {word}": f"{n}" + "0" * zeros for n in range(1, 20) for word, zeros in SCALES.items()}
ANSWER_IS = re.compile(r"^(?:the )?(?:final |correct )?answer is:? +(?=[-$\\0-9])", re.IGNORECASE)
IN_WORDS = re.compile(r"(?:\\text\s*\{\s*)?([A-Za-z]+(?:[- ][A-Za-z]+)?)\s*\}?")
TWICE = re.compile(r"([0-9]+)\s*\(([A-Za-z]+(?:[- ][A-Za-z]+)?)\)")
LABEL = re.compile(
    r"^(?:\\text\s*\{\s*)?(?:the )?(?:final |correct )?(?:answer|result|total|sum|solution|value|antwort|réponse|"
    r"respuesta|risposta|resposta|ответ|答案|答え|답) ?:\s*\}?\s*(?=[-$\\0-9(\[\]])",
    re.IGNORECASE,
)
OPTION = re.compile(
    r"(?:\\text\s*\{\s*)?(?:the )?(?:correct |final )?(?:option|choice|answer)(?: is)?:?\s{0,3}\(?([A-Za-z])\)?\s*\}?",
    re.IGNORECASE,
)
OVER = re.compile(r"\{([^{}]*)\\(over|choose)(?![A-Za-z])([^{}]*)\}|^([^{}]*)\\(over|choose)(?![A-Za-z])([^{}]*)$")
COLOUR = re.compile(r"\\(?:text)?color\s*\{[A-Za-z]+\}")
DEGREES_ABOVE = re.compile(r"\\frac\s*\{([^{}]*)\^\s*\{?\\circ\s*\}?\s*\}\s*\{([^{}]*)\}")
SCRIPT = r"\s*(?:\{[^{}]*\}|[0-9A-Za-z])"
POWER_BEFORE_INDEX = re.compile(rf"\^({SCRIPT})\s*_({SCRIPT})")
SCRIPTED_FUNCTION = re.compile(
    rf"(\\(?:log|ln|sin|cos|tan|cot)\s*(?:[_^]{SCRIPT}){{1,2}})\s*\{{((?:[^{{}}]|\{{[^{{}}]*\}})*)\}}"
)
SCRIPT_BEFORE_NUMBER = re.compile(r"((?<=log)_|[_^])([0-9A-Za-z]|(?<=log_)[0-9]{2,3})\s+(?=[0-9])")
# \log_28 has the base 2 in LaTeX; where an argument follows, as in \log_10 100, people mean all digits
GLUED_LOGARITHM = re.compile(
    r"\\log_([2-9])([0-9]+)(?=$|[-+*/=,;)}\]<>]|\\(?:cdot|pm|mp|text|cup|le|ge|approx)(?![A-Za-z]))"
)
SET_ARGUMENT = re.compile(r"\\(max|min|gcd|lcm)\s*\\\{([^{}]*)\\\}")
QUOTIENT_BEFORE_FACTOR = re.compile(
    r"(?<![0-9A-Za-z.^_/}\\])([0-9]{1,9}|[a-z])/([0-9]{1,9})\s+(?![msghJNWVKLAC]\s*$)(?=[A-Za-z(]|\\(?:sqrt|sin|cos|pi))"
)
SYSTEM = re.compile(
    r"\\left\s*(?:\\\{|\\lbrace)\s*\\begin\{(array|aligned|matrix)\}(?:\{[lcr| ]*\})?(.*)\\end\{\1\}\s*\\right\s*\.",
    re.DOTALL,
)
# of vectors, which no other product is
CROSS = re.compile(
    r"(\\(?:nabla|(?:vec|hat|mathbf|boldsymbol|overrightarrow)\s*(?:\{\s*[A-Za-z]{1,3}\s*\}|[A-Za-z]))\s*)"
    r"\\(?:times|cross)(?![A-Za-z])"
)
IDLE = re.compile(r"\\(?:begin|end)\{(?:aligned|align|equation|gathered)\*?\}&?|\\phantom\s*(?:\{[^{}]*\}|-)")
LONE_NUMBER = re.compile(r"(\\text\s*\{[^{}]*\}\s*|[,(]\s*|^)\{\s*(-?[0-9.]+)\s*\}")
RATIO = re.compile(r"^([0-9]+) to ([0-9]+)$")
TIMES_TEN = re.compile(r"(?<=[0-9])(\s*)[xX]\s*10\s?\^")
NOT_EQUAL = re.compile(r"(?<![0-9A-Za-z)\]}!])!=")  # 5!=120 and n! = 6 have a factorial
GAP = re.compile(r"(?<=[0-9])\s+(?=[0-9])")
SPACE_AFTER_COMMAND = re.compile(r"(\\[A-Za-z]+)\s+(?=[A-Za-z])")
CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")  # some of them are marks further down
NEW_ROW = "\x03"  # stands for \\ meanwhile
PER_UNIT = re.compile(r"(\\text\{[^{}]*\}\s*(?:\^[0-9]\s*)?/\s*)([A-Za-z]{1,3})(?![A-Za-z])")
UNIT_LETTERS = frozenset("msghJNWVKLACTFH")
UNITS_TO_THE_END = re.compile(r"(?:[\s/.]|\\cdot|\^\{?-?[0-9]\}?|\\text\s*\{[^{}]*\}|per\b|units?\b|[a-z]{1,3}\b)*")
SMALL_WORDS, PRODUCTS = word_set("or is of no be to an"), word_set("no be an")
UNIT_LETTER = re.compile(r"(?<=[0-9])\s+(m|s|g|h|J|N|W|V|K|L|A|C)(\^\{?[23]\}?)?\s*$")


def normalise(answer: str, thousands: bool = True) -> str:
    """Returns an answer's common spelling. `thousands`: read 1,234 as one number where it could be a list of two."""
    text = _plain_characters(COLOUR.sub("", CONTROL.sub("\ufffd", answer)))
    text = set_builder(SYSTEM.sub(r"\\begin{cases}\2\\end{cases}", text) if "\\begin" in text else text)
    text = _phrase(_said(_unwrap(text)))
    text = "\\approx " + text[1:] if text[:1] == "~" else text
    if "\\begin" not in text:
        text = re.sub(r"\\\\(?=[A-Za-z])", r"\\", text)  # backslashes written twice
    text = text.replace("\\\\", NEW_ROW)
    text = MARKED_THOUSANDS.sub("", text)
    thousands = thousands and not any(bracket in text for bracket in ("(", "[", "\\{"))  # (2,100) is a pair
    # but nobody lists 1 and 000
    text = THOUSANDS.sub(lambda m: m.group().replace(",", "") if thousands or ",0" in m.group() else m.group(), text)
    text = text.replace("\\!", "").replace("{,}", ",")
    dollars = DOLLARS.fullmatch(text)
    text = f"{dollars.group(1)} dollars{dollars.group(2) or ''}" if dollars else text
    text = text.replace("\\$", "").replace("$", "")
    for spacing in ("\\,", "\\;", "\\:", "\\ ", "~"):
        text = text.replace(spacing, " ")
    text = COMMAND.sub(_command, CROSS.sub(r"\1\\cross ", text) if "\\times" in text else text)
    text = _small_commands(text)
    text = re.sub(r"\\not(?![A-Za-z])", "\ufffd", re.sub(r"\\not\s*=", r"\\ne ", text))
    text = NOT_EQUAL.sub(r"\\ne ", text)
    text = mark_foreign(QUOTIENT_BEFORE_FACTOR.sub(r"\\frac{\1}{\2} ", common_brackets(text)))
    text = mark_unit(text)
    text = re.sub(r"(?<![\\])\\%|(?<!\\)%", r"\\%", text)
    text = _texts(text)
    text = _unwrap(text)
    text = SPACED_THOUSANDS.sub(lambda m: m.group().replace(" ", ""), text)
    text = _braces(text)
    text = MIXED.sub(_mixed, text)
    text = _spaces(text)
    text = text.replace("**", "^").replace("*", "\\cdot ").replace("<=", "\\le ").replace(">=", "\\ge ")
    text = text.replace("^\\circ", "\\text{degree}").replace("^{\\circ}", "\\text{degree}")
    text = text.replace("\\%", "\\text{percent}").replace("\\emptyset", "\\{\\}")
    text = re.sub(r"([)\]}])U([(\[]|\\\{)", r"\1\\cup \2", text).replace(",\\ldots", ",...").lstrip("+")
    return GLUED_LOGARITHM.sub(r"\\log_{\1}\2", _spaces(text)).replace(NEW_ROW, "\\\\")


def _small_commands(text: str) -> str:
    r"""Rewrites {a \over b}, degrees in a fraction, x 10^3, a base in brackets, braces around nothing or a number."""
    text = TIMES_TEN.sub(r"\1\\cdot 10^", IDLE.sub("", text).replace("\\&", ","))
    for _ in range(2):  # as deep as people nest them
        text = OVER.sub(_over, text)
    text = re.sub(r"\\text\s*\{\s*\^\\circ\s*\}|\{\}\s*\^\s*\{?\\circ\s*\}?", r"^\\circ ", text)
    text = re.sub(r"(?<=[0-9])\s*\\deg\s*$", r"^\\circ ", DEGREES_ABOVE.sub(r"\\frac{\1}{\2}^\\circ ", text))
    text = re.sub(r"^\(([0-9A-F]+)\)\s*_", r"\1_", re.sub(r"_\s*\{\s*\(([0-9]{1,2})\)\s*\}", r"_{\1}", text))
    text = re.sub(r"(?<![\\A-Za-z])log(2|10)(?=\()", r"\\log_{\1}", text)
    text = LONE_NUMBER.sub(r"\1\2", text.replace("{:}", ":"))
    text = re.sub(r"\\mathcal\s*(?:\{\s*([A-Z])\s*\}|([A-Z])(?![A-Za-z]))", r"\1\2", text)
    text = re.sub(r"\(\s*(?:\\[bp]?)?mod\s+([0-9A-Za-z]{1,9})\s*\)", r"\\pmod{\1}", text)
    text = re.sub(r"\\mathbb\s*([A-Z])(?![A-Za-z])", r"\\mathbb{\1}", text)
    return text.replace("\\equiv", "=") if "mod" not in text else text


def _over(match: re.Match) -> str:
    above, name, below = match.groups()[:3] if match.group(2) else match.groups()[3:]
    return f"\\{'frac' if name == 'over' else 'binom'}{{{above.strip()}}}{{{below.strip()}}}"


def _plain_characters(text: str) -> str:
    text = re.sub("[⁰¹²³⁴-⁹⁺⁻]+", lambda m: "^{" + m.group().translate(SUPERSCRIPTS) + "}", text)
    text = re.sub("[₀-₉]+", lambda m: "_{" + m.group().translate(SUBSCRIPTS) + "}", text)
    text = FRACTIONS.sub(lambda m: " \\frac{" + unicodedata.normalize("NFKC", m.group()).replace("⁄", "}{") + "}", text)
    text = re.sub(r"∛\s*(\([^()]*\)|[0-9]+|[A-Za-z])", lambda m: "\\sqrt[3]{" + m.group(1).strip("()") + "}", text)
    text = re.sub(r"√\s*(\([^()]*\)|[0-9]+|[A-Za-z])", lambda m: "\\sqrt{" + m.group(1).strip("()") + "}", text)
    text = "".join(UNICODE.get(c, c) for c in text)
    return unicodedata.normalize("NFKC", text).replace("−", "-")


def _unwrap(text: str) -> str:
    """Strips delimiters, emphasis, outer text commands and braces, and the point at the end of a sentence."""
    for _ in range(8):  # as deep as people nest them
        before = text
        text = _trim(text)
        if text.endswith(".") and not text.endswith("..."):
            text = text[:-1].rstrip()
        for opening, closing in DELIMITERS:
            if text.startswith(opening) and text.endswith(closing) and len(text) >= len(opening) + len(closing):
                text = text[len(opening) : len(text) - len(closing)]
        match = WHOLE.fullmatch(text)
        if match and _balanced(match.group(1)) and not WORDED.fullmatch(text):
            text = match.group(1)
        elif text.startswith("{") and text.endswith("}") and _balanced(text[1:-1]):
            text = text[1:-1]
        if text == before:
            break
    return text


def _phrase(text: str) -> str:
    r"""Puts several words, and nothing but words, into one \text{}."""
    words = text.replace("~", " ")
    if PHRASE.fullmatch(words) and LONG_WORD.search(words) and not FUNCTIONS.union(("and", "or")) & set(words.split()):
        return f"\\text{{{words}}}"
    return text


def _said(text: str) -> str:
    """Drops "the answer is" at the start, and puts into digits a number in words: eighteen, 18 (eighteen), 2 to 1."""
    text = LABEL.sub("", ANSWER_IS.sub("", text))
    if match := OPTION.fullmatch(text):
        return match.group(1)
    match = IN_WORDS.fullmatch(text)
    if match and match.group(1).lower() in SPOKEN:
        return SPOKEN[match.group(1).lower()]
    match = TWICE.fullmatch(text)
    if match and match.group(1) == SPOKEN.get(match.group(2).lower()):
        return match.group(1)
    return RATIO.sub(r"\1:\2", text)


def _trim(text: str) -> str:
    """Strips the space around a text, LaTeX's kinds too, and a comma at its end."""
    while True:
        before = text
        text = text.strip().removesuffix("\\quad").removesuffix("\\qquad")
        for spacing in ("\\,", "\\;", "\\:", "\\!", "\\ "):
            text = text.removeprefix(spacing).removesuffix(spacing)
        text = text.rstrip(",;:~\\")
        if text == before:
            return text


def _balanced(text: str) -> bool:
    """Returns whether the braces close inside the text, never below where it starts."""
    depth = 0
    for i, character in enumerate(text):
        if character in "{}" and (i == 0 or text[i - 1] != "\\"):
            depth += 1 if character == "{" else -1
            if depth < 0:
                return False
    return depth == 0


def _command(match: re.Match) -> str:
    name, space = match.groups()
    if name not in COMMANDS:
        return match.group()
    new = COMMANDS[name]
    return ("\\" + new if new[:1].isalpha() or new in ("{", "}") else new) + space


def _texts(text: str) -> str:
    r"""Puts words into \text{}, takes function names out of it, and makes separators of "and" and "or"."""
    parts, position = [], 0
    for match in TEXT.finditer(text):
        parts.append(_plain(text[position : match.start()]))
        inner = AM_PM.sub(_am_pm, match.group(1)).strip()
        if inner.lower() in ("am", "pm") and _after_number(parts):
            parts.append(f"\\text{{{inner.lower()}}}")
        elif inner in FUNCTIONS:
            parts.append(f"\\{inner} ")
        elif inner in UNIT_LETTERS and UNITS_TO_THE_END.fullmatch(text, match.end()) and _after_number(parts):
            parts.append("\\text{" + inner + "}")  # a unit such as m or s
        elif re.fullmatch(r"\(?[A-Za-z]\)?|[-+0-9.,/ ]*|[A-Za-z](?:\s*,\s*[A-Za-z])+", inner):
            parts.append(inner)  # a choice, or a number
        else:
            parts.append("\\text{" + " ".join(inner.split()) + "}")
        position = match.end()
    parts.append(_plain(text[position:]))
    text = UNIT_LETTER.sub(r"\\text{\1}\2", PER_UNIT.sub(r"\1\\text{\2}", "".join(parts)))
    for _ in range(2):
        text = re.sub(r"\\text\{([^{}]*)\}\s*\\text\{", r"\\text{\1 ", text)
    text = BETWEEN.sub(lambda m: _separator(m) if m.start() > 0 and m.end() < len(m.string) else m.group(), text)
    return re.sub(
        r"\\text\{(hundred|thousand|million|billion|trillion)\b ?([^{}]*)\}",
        lambda m: f"\\cdot 10^{SCALES[m.group(1)]}" + (f"\\text{{{m.group(2)}}}" if m.group(2) else ""), text,
    )  # fmt: skip


def _separator(match: re.Match) -> str:
    """Returns `;` for "or", which makes another set of inequalities than "and" does."""
    words = match.group().lower()
    return ";" if "or" in words and "and" not in words else ","


def _plain(text: str) -> str:
    return WORDS.sub(_word, AM_PM.sub(lambda m: f"\\text{{{_am_pm(m)}}}", text))


def _am_pm(match: re.Match) -> str:
    return next(filter(None, match.groups())).lower() + "m"


def _after_number(parts: list[str]) -> bool:
    return "".join(parts[-3:]).rstrip()[-1:] in tuple("0123456789}/")


def _word(match: re.Match) -> str:
    word = match.group()
    low = word.lower()
    if low in ("infinity", "infty") or word == "inf":
        return "\\infty "
    before = match.string[max(0, match.start() - 9) : match.start()].rstrip()
    at_end = before[-1:].isdigit() and UNITS_TO_THE_END.fullmatch(match.string, match.end())
    if word in FUNCTIONS and not (low in UNITS and at_end):
        return f"\\{word} "
    small = low in SMALL_WORDS and not (low in PRODUCTS and _beside_sign(match))
    if len(word) == 2 and low in UNITS and not small and not at_end:
        return word  # a product of variables
    spaced = before[-1:].isdigit() and match.string[match.start() - 1].isspace()  # 60 kmph, not 2abcd
    if word in ENVIRONMENTS or (low not in UNITS and not spaced and PRODUCT.fullmatch(word)):
        return word
    if low in UNITS or (len(word) >= 4 and not word.isupper()):
        return "\\text{" + ("percent" if low == "pct" else word) + "}"
    return word


def _beside_sign(match: re.Match) -> bool:
    """Returns whether a sign is beside the word: `an+b` has no article."""
    before, after = match.string[: match.start()].rstrip()[-1:], match.string[match.end() :].lstrip()[:1]
    return before in tuple("+-=*/^") or after in tuple("+-=*/^_")


def _braces(text: str) -> str:
    r"""Writes \frac12 and \sqrt3 with braces, ^{2} and _{2} without."""
    text = re.sub(r"\\frac\s*([0-9A-Za-z])\s*([0-9A-Za-z])", r"\\frac{\1}{\2}", text)
    text = re.sub(r"\\frac\s*([0-9A-Za-z])\s*\{", r"\\frac{\1}{", text)
    text = re.sub(r"(\\frac\s*\{[^{}]*\})\s*([0-9A-Za-z])", r"\1{\2}", text)
    text = re.sub(r"(\\frac\s*\{[^{}]*\})\s*(\\pi)(?![A-Za-z])", r"\1{\2}", text)
    text = re.sub(r"\\frac\s*(\\pi)\s*([0-9])", r"\\frac{\1}{\2}", text)
    text = re.sub(r"\\sqrt\s*([0-9A-Za-z])", r"\\sqrt{\1}", text)
    text = re.sub(r"\\(bar|overline)\s+([0-9A-Za-z])", r"\\\1{\2}", text)
    text = re.sub(r"\\sqrt\s*\(([^()]*)\)", r"\\sqrt{\1}", text)
    text = re.sub(r"\\pmod\s*([0-9A-Za-z])", r"\\pmod{\1}", text)
    text = re.sub(
        r"_\s*\{\s*\\text\s*\{\s*([a-z]+)\s*\}\s*\}", lambda m: "_{" + SPOKEN.get(m[1], m[0][2:-1]) + "}", text
    )
    text = re.sub(r"\\binom\s*([0-9A-Za-z])\s*([0-9A-Za-z])", r"\\binom{\1}{\2}", text)
    text = SET_ARGUMENT.sub(r"\\\1(\2)", text) if "\\{" in text else text
    if "_" in text or "^" in text:
        text = SCRIPTED_FUNCTION.sub(r"\1(\2)", POWER_BEFORE_INDEX.sub(r"_\2^\1", text))
        text = re.sub(r"([_^])\s*\{\s*([0-9A-Za-z])\s*\}(?!\s*[0-9])", r"\1\2", text)
        text = SCRIPT_BEFORE_NUMBER.sub(r"\1{\2}", text)
    return re.sub(r"\\log_e(?![A-Za-z])", r"\\ln ", text)


def _mixed(match: re.Match) -> str:
    whole, a, b, c, d = match.groups()
    return f"({whole}+\\frac{{{a or c}}}{{{b or d}}})"


def _spaces(text: str) -> str:
    r"""Drops every space but those inside \text{}, between a command and a letter, and between two numbers."""
    kept: list[str] = []

    def keep(match: re.Match) -> str:
        kept.append(match.group())
        return "\x00"

    text = TEXT.sub(keep, text)
    text = SPACE_AFTER_COMMAND.sub("\\1\x01", GAP.sub("\x02", text))
    text = "".join(text.split()).replace("\x01", " ").replace("\x02", " ")
    return "".join(a + b for a, b in zip(text.split("\x00"), [*kept, ""], strict=True))
