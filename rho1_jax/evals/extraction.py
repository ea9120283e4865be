"""Extract the answer from a generation: its final-answer phrase, its last box, its last number, or a letter.

An answer that does not follow the format of the prompt is kept as it stands, up to the end of its line. Rho-1's
published evaluation does the same; a lenient parser would add more than a point to its 15.8 % on MATH.
"""

import re

_NUMBER = r"-?\d*\.?\d+"
# The end of an answer in Minerva's prompt (Lewkowycz et al. 2022, appendix D).
_FINAL = re.compile(r"final answer is \$(.*?)\$\. I hope", re.DOTALL)
_PHRASE = "answer is"
_LETTER = re.compile(r"\(?\b([A-E])\b\)?")


def extract(text: str, kind: str) -> str | None:
    """The answer in a generation, as written; None if there is none.

    Args:
      text: the generation.
      kind: "choice" looks for a letter from A to E, anything else for a formula or number.
    """
    if kind == "choice":
        return _choice(text)
    final = _FINAL.search(text)
    if final:
        return None if "\n" in final[1] else final[1].strip()  # a line break: the match spans two answers
    boxed = last_boxed(text)
    if boxed is not None:
        return _plain(boxed)
    if _PHRASE in text:
        return _plain(text.rsplit(_PHRASE, 1)[1].strip().lstrip(":").strip().split("\n")[0])
    return last_number(text)


def last_boxed(text: str) -> str | None:
    r"""The content of the last \boxed{...}, \fbox{...} or "\boxed x"; None if there is none. Braces may be nested."""
    starts = [match.end() for match in re.finditer(r"\\(?:boxed|fbox)\s*", text)]
    if not starts:
        return None
    rest = text[starts[-1] :]
    if not rest.startswith("{"):
        word = re.match(r"[^\s$]+", rest)
        return word[0] if word else None
    depth = 0
    for at, letter in enumerate(rest):
        depth += (letter == "{") - (letter == "}")
        if depth == 0:
            return rest[1:at]
    return rest[1:]  # the generation ends inside the braces


def last_number(text: str) -> str | None:
    """The last number in a text, without commas between thousands; None if there is none."""
    numbers = re.findall(_NUMBER, re.sub(r"(?<=\d),(?=\d{3})", "", text))
    return numbers[-1] if numbers else None


def _plain(text: str) -> str:
    """The text without surrounding spaces and full stops. If it starts with a $...$ formula, that formula alone."""
    text = text.strip()
    formula = re.match(r"\$(.*?)(?<!\\)\$", text)
    return (formula[1] if formula else text).strip().rstrip(".").rstrip("/").strip()


def _choice(text: str) -> str | None:
    """The first letter after the last "answer is", or else the last letter in the text."""
    parts = text.rsplit(_PHRASE, 1)
    for part in reversed(parts):
        letters = _LETTER.findall(part.upper() if len(part) < 8 else part)
        if letters:
            return letters[0] if part is parts[-1] and len(parts) > 1 else letters[-1]
    return None
