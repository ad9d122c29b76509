r"""Reads a number's unit: where it begins, what it is made of, and which other spelling is the same one.

`mark_unit` reads a number and a unit expression to the end of the text in one step (9.8 \frac{m}{s^2}) and leaves
9.8\text{m^1.s^-2}. What it does not know (18 apples) keeps its words. Nothing is converted.
"""

import re

from eepo_fast.rewards.answers.foreign import makes_another_number


def word_set(words: str) -> frozenset[str]:
    return frozenset(words.split())


UNIT = re.compile(r"(?:(?:\\text\{[^{}]*\}(?:\^\{?-?[0-9]\}?)?|/|\\cdot)+)$")
HEDGES = re.compile(r"^\\text\{(?:about|approximately|approx|roughly|is|usd|rs|exactly)\}", re.IGNORECASE)
TRIGONOMETRY = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc)(?![a-z])")
DEGREES = re.compile(r"([0-9.]+)\\text\{deg(?:ree|rees)?\}")
UNIT_NAMES = {
    "deg": "degree", "degrees": "degree", "inches": "inch", "in": "inch", "feet": "foot", "ft": "foot", "cents": "cent",
    "meters": "m", "meter": "m", "metres": "m", "metre": "m", "centimeters": "cm", "centimeter": "cm", "am": "a.m.",
    "kilometers": "km", "kilometer": "km", "grams": "g", "gram": "g", "kilograms": "kg", "kilogram": "kg", "sec": "s",
    "seconds": "s", "second": "s", "secs": "s", "hours": "h", "hour": "h", "hr": "h", "hrs": "h", "mins": "min",
    "minutes": "min", "minute": "min", "pm": "p.m.", "a.m": "a.m.", "p.m": "p.m.", "sq": "square", "liters": "l",
    "liter": "l", "litres": "l", "litre": "l", "yards": "yard", "miles": "mile", "mi": "mile", "percentage": "percent",
    "gm": "g", "gms": "g", "usd": "dollar",
}  # fmt: skip
LONG_NAMES = {
    **{name: short for name, short in UNIT_NAMES.items() if len(name) > 3 and short not in ("percent", "degree")},
    "inch": "inch", "foot": "foot", "yard": "yard", "mile": "mile", "joule": "J", "joules": "J", "watt": "W",
    "watts": "W", "newton": "N", "newtons": "N", "volt": "V", "volts": "V", "kelvin": "K", "hertz": "Hz",
    "pascal": "Pa", "pascals": "Pa", "ohm": "Ω", "ohms": "Ω", "coulomb": "C", "coulombs": "C", "ampere": "A",
    "amperes": "A", "tesla": "T", "ergs": "erg", "parsec": "pc", "parsecs": "pc", "angstrom": "Å", "angstroms": "Å",
    "radian": "rad", "radians": "rad", "moles": "mol", "mole": "mol", "years": "yr", "year": "yr", "days": "day",
    "micron": "μm", "microns": "μm", "millimeters": "mm", "millimeter": "mm", "nanometers": "nm",
    "nanometer": "nm", "cent": "cent",
}  # fmt: skip
SHORT_NAMES = {
    "in": "inch", "ft": "foot", "yd": "yard", "mi": "mile", "min": "min", "hr": "h", "hrs": "h", "sec": "s", "lb": "lb",
    "lbs": "lb", "oz": "oz", "erg": "erg", "dyn": "dyn", "dyne": "dyn", "AU": "AU", "au": "AU", "ly": "ly",
    "day": "day", "mph": "mph", "kph": "kph", "arcsec": "arcsec", "ppm": "ppm", "cd": "cd", "rad": "rad", "sr": "sr",
    "rpm": "rpm", "cc": "cc", "kmh": "kmh", "atm": "atm", "Å": "Å", "h": "h", "amu": "amu", "dB": "dB",
    "gm": "g", "gms": "g",
}  # fmt: skip
QUOTIENTS = {"mph": {"mile": 1, "h": -1}, "kph": {"km": 1, "h": -1}, "kmh": {"km": 1, "h": -1}}
SCALED = word_set("m g s A K mol Hz N Pa J W C V F T Wb H L l eV pc Ω bar yr cal Wh G Bq Sv lm")
PREFIXES = frozenset("fpnμumcdkMGTP")
SUNS = re.compile(r"([MLR])_(?:\\odot|\{\\odot\s*\}|⊙|\{⊙\}|\{?\\text\{sun\}\}?)")
CELSIUS = re.compile(r"\^\s*(?:\\circ|\{\s*\\circ\s*\})\s*(?:\\text\s*)?(?:\{\s*([CF])\s*\}|([CF])(?![A-Za-z]))")
TOKEN = re.compile(
    r"\\frac|\\text|\\cdot|\^\s*(?:\{\s*[-+]?[0-9]\s*\}|[-+]?[0-9])|[A-Za-zμΩÅ]+|°[CF]|☉[MLR]|.", re.DOTALL
)
NUMBER = re.compile(
    r"(?<![A-Za-z0-9.^_{}\\)])(?:[0-9]+(?:,[0-9]{3})*(?: [0-9]{3})*(?:\.[0-9]+)?|\.[0-9]+"
    r"|\\frac\s*\{[0-9]+\}\s*\{[0-9]+\})"
    r"(?:[eE][-+]?[0-9]{1,4}(?![0-9A-Za-z])|\s*\\cdot\s*10\s*\^\s*(?:\{\s*[-+]?[0-9]{1,4}\s*\}|[-+]?[0-9]{1,4})"
    r"|(?<=10)\^\s*(?:\{\s*[-+]?[0-9]{1,4}\s*\}|[0-9]{1,4}))?"
)
BEFORE = re.compile(r"(?:.*(?:=|\\approx))?[\s+-]*", re.DOTALL)
NO_UNIT = word_set(
    "! dozen dozens score scores pair pairs half halves third thirds quarter quarters not or and wrong minus plus less "
    "fewer more times over under twice double doubled triple hundred thousand million billion trillion hundredth "
    "hundredths tenth tenths except but negative false no none incorrect divided multiplied factorial gross "
    "tens ones lakh crore"
)
ORDINAL = re.compile(
    r"(?:four|fif|six|seven|eigh|nin|ten|eleven|twelf|[a-z]*(?:teen|tie|dred|sand|illion))ths?|[a-z]*illions?"
)
IDLE = word_set("is of to be the a an than at")
BARE_LETTERS = frozenset("msghJNWVKLAC")
MAX_UNIT, MAX_NUMBER = 200, 100
MICRO = (
    (re.compile(r"\\mu\s*\\text\s*\{\s*"), r"\\text{μ"), (re.compile(r"\\mu\s*(?:\\text\s+)?"), "μ"),
    (re.compile(r"\\text\s*\{\s*([kMGm])\s*\}\s*\\Omega"), r"\1Ω"), (re.compile(r"\\Omega"), "Ω"),
    (re.compile(r"\\AA|\\mathring\{A\}"), "Å"),
)  # fmt: skip
OLD_WORDS = word_set("cm mm km ft kg mg lb lbs oz ml sec min hr mph kph hz pa ev in ly pc")


def mark_unit(text: str) -> str:
    r"""Returns the text with its last number's unit, if only that follows, as one \text{} of names and powers."""
    for match in NUMBER.finditer(text, max(0, len(text) - MAX_UNIT - MAX_NUMBER)):
        if BEFORE.fullmatch(text[: match.start()]):
            rest = text[match.end() :].strip() if "frac" in match.group() else text[match.end() :]
            if unit := read_unit(rest, bare=True):  # \\frac{37}{4} m may well be a product
                return f"{text[: match.end()]}\\text{{{unit}}}"
    return text


def read_unit(text: str, bare: bool = False) -> str | None:
    """Returns `m^1.s^-2` for a unit expression, None for anything else. `bare`: letters may also be variables, so a
    lone letter counts only after a space, and several only with a power or a quotient."""
    for pattern, replacement in MICRO:
        text = pattern.sub(replacement, text)
    spaced = text[:1] in (" ", "\t") or text.startswith("\\cdot")
    worded = "\\text" in text or "\\frac" in text or (spaced and re.search(r"[/^]", text) is not None)
    text = SUNS.sub(r" ☉\1 ", CELSIUS.sub(lambda m: f" °{m.group(1) or m.group(2)} ", text))
    reader = _Reader([token for token in TOKEN.findall(text) if not token.isspace()])
    if not (powers := reader.read()):
        return None
    words = [token for token in reader.tokens if token[0].isalpha()]
    special = any(token[0] in "°☉μΩÅ" or token[-1] == "Ω" for token in reader.tokens) and len(words) <= 1
    if bare and not worded and not special:
        long = any(len(word) > 1 and (spaced or word in OLD_WORDS or len(word) > 3) for word in words)
        if not long and not (spaced and len(words) == 1 and words[0] in BARE_LETTERS):
            return None
    return ".".join(f"{name}^{power}" for name, power in sorted(powers.items()) if power) or None


class _Reader:
    """Descends recursively over a unit's tokens; in a/b c all that follows the slash is below it."""

    def __init__(self, tokens: list[str]):
        self.tokens, self.position = tokens, 0

    def read(self) -> dict[str, int] | None:
        try:
            powers = self._quotient(0)
        except (ValueError, IndexError):
            return None
        return powers if self.position == len(self.tokens) else None

    def _peek(self) -> str:
        return self.tokens[self.position] if self.position < len(self.tokens) else ""

    def _quotient(self, depth: int) -> dict[str, int]:
        if depth > 6:
            raise ValueError
        powers: dict[str, int] = {}
        sign, num_factors = 1, 0
        while self._peek() not in ("", "}", ")"):
            token = self._peek()
            if token in ("/", "per"):
                sign, num_factors = -1, 0
                self.position += 1
            elif token in ("\\cdot", "·", "*", ".", "~"):
                self.position += 1
            else:
                for name, power in self._factor(depth).items():
                    powers[name] = powers.get(name, 0) + sign * power
                num_factors += 1
        if not num_factors:
            raise ValueError  # nothing, or nothing below a slash
        return powers

    def _factor(self, depth: int) -> dict[str, int]:
        token = self.tokens[self.position]
        self.position += 1
        before = {"square": 2, "sq": 2, "cubic": 3, "cu": 3}.get(token, 1)
        if before > 1:
            self.position += self._peek() == "."  # sq. cm
            token = self.tokens[self.position]
            self.position += 1
        if token == "\\text":
            return self._factor(depth + 1)
        if token in ("{", "("):
            powers = self._group("}" if token == "{" else ")", depth)
        elif token == "\\frac":
            above, below = self._braced(depth), self._braced(depth)
            powers = {name: above.get(name, 0) - below.get(name, 0) for name in above | below}
        else:
            powers = QUOTIENTS.get(token) or {_name(token): 1}
        power = before * self._power()
        return {name: power * times for name, times in powers.items()}

    def _braced(self, depth: int) -> dict[str, int]:
        if self._peek() != "{":
            return self._factor(depth + 1)
        self.position += 1
        return self._group("}", depth)

    def _group(self, closing: str, depth: int) -> dict[str, int]:
        powers = self._quotient(depth + 1)
        if self._peek() != closing:
            raise ValueError
        self.position += 1
        return powers

    def _power(self) -> int:
        token = self._peek()
        if token[:1] == "^":
            self.position += 1
            return int(token.strip("^{} \t\n"))
        if token in ("squared", "cubed"):
            self.position += 1
            return 2 if token == "squared" else 3
        return 1


def _name(word: str) -> str:
    """Returns a unit's one name, by which it is compared with others; ValueError for what is none."""
    if word[:1] in ("°", "☉"):
        return word
    if word in SHORT_NAMES:
        return SHORT_NAMES[word]
    if word.lower() in LONG_NAMES:
        return LONG_NAMES[word.lower()]
    if word in SCALED:
        return word.replace("l", "L") if word == "l" else word
    if word[:1] in PREFIXES and word[1:] in SCALED:
        return word.replace("u", "μ", 1).replace("l", "L") if word[0] == "u" or word[1:] == "l" else word
    raise ValueError


def without_unit(text: str) -> tuple[str, str]:
    if TRIGONOMETRY.search(text):
        text = DEGREES.sub(r"(\\frac{\1\\pi}{180})", text)
    text = HEDGES.sub("", text)
    match = UNIT.search(text)
    if not match or not match.group().startswith("\\text"):
        return text, ""
    return text[: match.start()], match.group()


MARKED = re.compile(r"\\text\{([^{}\s^.]+\^-?[0-9]+(?:\.[^{}\s^.]+\^-?[0-9]+)*)\}")


def same_unit(gold: str, answer: str) -> bool:
    """Returns whether both have the same unit, or one has none; words of another number (18 dozen) are no unit."""
    if not gold or not answer:
        words = set(re.findall(r"[a-z]+|!", (gold + answer).lower())) - {"text"}
        squared = words & {"squared", "cubed"} and not (words - {"squared", "cubed"})
        power = words & {"root", "roots"} and words & {"square", "cube", "cubic"}
        other_number = words & NO_UNIT or power or any(map(ORDINAL.fullmatch, words))
        other_number = other_number or makes_another_number((gold + answer).replace("\\text", " "))
        return not (squared or other_number or (words and not words - IDLE))
    return unit_words(gold) == unit_words(answer)


def unit_words(text: str) -> list[str]:
    """Returns a unit's words and exponents under common names; `sq units`, `square units` and `units^2` are one."""
    marked = MARKED.fullmatch(text)
    if known := marked.group(1) if marked else read_unit(text):
        return known.split(".")
    words = []
    for word in re.findall(r"[a-z.]+|[0-9]", re.sub(r"\\text|\\cdot", " ", text.lower())):
        name = UNIT_NAMES.get(word) or UNIT_NAMES.get(word.rstrip("."), word)
        words.append(name if name in ("a.m.", "p.m.") or len(name) < 3 else name.rstrip("s."))
    swapped = [w for w in words if w not in ("square", "cubic", "2", "3", "of", "unit")]
    powers = [{"square": "2", "cubic": "3"}.get(w, w) for w in words if w in ("square", "cubic", "2", "3")]
    return sorted(swapped) + sorted(powers)
