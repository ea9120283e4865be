r"""Bring an answer into a canonical form: without units, markup, words like "about", or a sentence after it."""

import re

# Words that follow a number in a formula, and so are not units.
_MATH_WORDS = frozenset(
    "and arccos arcsin arctan choose cis cos cosh cot csc div exp gcd inf infinity lcm lim ln log max min minus mod or "
    "over pi plus sec sin sinh sqrt tan tanh times to".split()
)
_SHORT_UNITS = frozenset(
    "am cm dl dm ft gm hr hrs in kg km kph lb lbs mg mi min ml mm mph nd oz pm rd sec sq st th yd yrs".split()
)
_LETTER_UNITS = frozenset("gmhsL")  # only after a space: "5 m" is a length, "5m" a product

_CHARACTERS = str.maketrans(
    {"\n": " ", "\N{MINUS SIGN}": "-", "\N{EN DASH}": "-", "π": "\\pi ", "∞": "\\infty ", "×": "\\times ", "≈": "="}
    | {"²": "^2", "³": "^3", "\N{NO-BREAK SPACE}": " "}
)
_EMPHASIS = re.compile(r"(?<![\w)}*])(\*{1,3}|__|`)(?=[^\s*])(.+?)(?<=[^\s*])\1(?![\w({*])")
# Only after a number or formula: "Mrs. Hilt" is a name. The form of a prompt ("... I hope it is correct") is not cut.
_SENTENCE_BEHIND = re.compile(
    r"^((?:[A-Za-z]\s*=\s*)?(?!\\(?:text|mbox))[-+$(.\d\\].*?)"
    r"(?:(?<=\d)[.!?;]\s+(?=[A-Za-z])|[.!?;]\s+(?=[A-Z]))(?!I hope).*"
)
_ABOUT = re.compile(
    r"(?:approximately|approx\.?|about|around|roughly|nearly|almost|exactly|\\approx|~)(?![A-Za-z])\s*", re.IGNORECASE
)
_HALF_DAY = re.compile(r"(?<![A-Za-z])([ap])\.?\s?m\b\.?", re.IGNORECASE)
_BASE = re.compile(r"(?<=\d)\s+(?:in\s+)?base\s+(\d+)$")
_SPACES = re.compile(r"(?<!\\)\\[!,;: ]|~")
_DEGREES = re.compile(
    r"(?:\^\s*(?:\{\s*\\circ\s*\}|\\circ)|\\degree|°)(?:\s*(?:\\(?:text|mathrm)\{\s*[CF]\s*\}|[CF]\b))?"
)
_CURRENCY = re.compile(r"(?:(?<![A-Za-z])US\s*)?\\?[$€£¥]|\\?%")
_WRAP = r"\\(?:text|mbox|mathrm|textbf|textit)\s*"
_WRAPPED = re.compile(_WRAP + r"\{([^{}]*)\}")
_POWER = r"(?:\s*\^\s*\{?\d\}?)?"
_WORDS = r"[A-Za-z](?:[A-Za-z\s/'-]|\.(?!\s+[A-Z]))*?"
_TAIL = re.compile(
    rf"(?:(?<=[\d}})])|(?<=\\pi))(?P<space>[\s-]*)"
    rf"(?:{_WRAP}\{{(?P<wrapped>\s*{_WORDS}){_POWER}\s*\}}|\((?P<bracketed>{_WORDS})\)|(?P<plain>{_WORDS})){_POWER}\s*\.?\s*$"
)
_MIXED = re.compile(r"([-+]?)(\d+)(?:\s+(?:and\s+)?(\d+)\s*/\s*(\d+)|\s*\\frac\s*\{?(\d+)\}?\s*\{?(\d+)\}?)")
_SPACE = re.compile(r"(\\[A-Za-z]+\s(?=\s*[A-Za-z]))|\s+")  # \pi r needs its space
_FRACTION = re.compile(r"\\frac(?:(\\[A-Za-z]+|\w)|\{([^{}]*)\})(?:(\\[A-Za-z]+|\w)|\{([^{}]*)\})")
_GROUPED = re.compile(r"[-+]?\d{1,3}(?:,\d{3})+(?:\.\d+)?")


def normalize(answer: str) -> str:
    r"""An answer in canonical form: no spaces, units, dollar, percent or degree signs, and no \left or \right."""
    text = _EMPHASIS.sub(r"\2", answer.translate(_CHARACTERS)).strip("*` \t")
    if "\\begin" not in text:
        text = text.replace("\\\\", "\\")  # ends a row in a matrix; elsewhere it is a backslash typed twice
    text = _HALF_DAY.sub(lambda half: half[1].lower() + "m", text)
    text = _ABOUT.sub("", text, count=1) if _ABOUT.match(text) else text.replace("\\approx", "=")
    text = _SENTENCE_BEHIND.sub(r"\1", text)
    text = _SPACES.sub("", re.sub(r"\{([:,;])\}", r"\1", text))
    text = text.replace("\\left", "").replace("\\right", "").replace("tfrac", "frac").replace("dfrac", "frac")
    text = _CURRENCY.sub("", _DEGREES.sub("", text)).strip()
    text = _BASE.sub(r"_\1", text)
    text = _without_unit(_without_unit(text))  # "12 stones (approximately)" has two
    text = _without_unit(_WRAPPED.sub(r"\1", text)).strip().rstrip(".")
    text = _improper(text)
    if _GROUPED.fullmatch(text):
        text = text.replace(",", "")
    text = re.sub(r"(?<=\{)\d{1,3}(?:,\d{3})+(?=\})", lambda grouped: grouped[0].replace(",", ""), text)
    text = _SPACE.sub(lambda space: space[1] or "", text)
    text = re.sub(r"(?<![\\A-Za-z])(sqrt|pi)(?![A-Za-z])", r"\\\1", text)
    text = _FRACTION.sub(r"\\frac{\1\2}{\3\4}", text)
    text = re.sub(r"\\sqrt(\w)", r"\\sqrt{\1}", text)
    text = re.sub(r"\\sqrt\(([^()]*)\)", r"\\sqrt{\1}", text)
    text = re.sub(r"(?<!\d)\.(?=\d)", "0.", text)
    return re.sub(r"(\d)\.0+(?!\d)", r"\1", text)


def half_day(answer: str) -> str:
    """ "a" for a time before noon, "p" for one after, "" if the answer names neither."""
    matches = _HALF_DAY.findall(answer)
    return matches[-1].lower() if matches else ""


def is_percentage(answer: str) -> bool:
    """True if the answer has a percent sign or the word."""
    return "%" in answer or re.search(r"\b(?:per\s?cent|pct)", answer, re.IGNORECASE) is not None


def _without_unit(text: str) -> str:
    """The text without the unit after its last number: words, or words in brackets."""
    tail = _TAIL.search(text)
    if tail is None:
        return text
    words = (tail["wrapped"] or tail["bracketed"] or tail["plain"]).strip()
    spaced = bool(tail["space"]) or (tail["wrapped"] or "")[:1].isspace() or tail["bracketed"] is not None
    return text[: tail.start()] if _is_unit(words, spaced) else text


def _is_unit(words: str, spaced: bool) -> bool:
    """True if words after a number are a unit. Without a space, short words are variables, except for known units."""
    word = re.split(r"[^A-Za-z]", words)[0]
    if word.lower() in _MATH_WORDS:
        return word.lower() in _SHORT_UNITS and not words[len(word) :].strip()
    if len(word) == 1:
        return spaced and word in _LETTER_UNITS
    return word.lower() in _SHORT_UNITS or len(word) >= (3 if spaced else 4)


def _improper(text: str) -> str:
    """A mixed number such as 2 1/2 as a fraction; any other text as it is."""
    mixed = _MIXED.fullmatch(text.strip())
    if not mixed:
        return text
    sign, whole, *fractions = mixed.groups()
    above, below = (int(part) for part in fractions if part is not None)
    return f"{sign}{int(whole) * below + above}/{below}" if above < below else text
