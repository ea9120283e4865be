"""Extract the answer from a generation: its final-answer phrase, its last box, its last number, or a letter.

An answer that does not follow the format of the prompt is kept as it stands, up to the end of its line. Rho-1's
published evaluation does the same; a lenient parser would add more than a point to its 15.8 % on MATH.
"""

import re

_NUMBER = r"-?\d*\.?\d+"
# The two ends of an answer in Minerva's prompt (Lewkowycz et al. 2022, appendix D).
_FINAL, _FINAL_END = "final answer is $", "$. I hope"
_PHRASE = "answer is"
_CHOICE_PHRASE = re.compile(r"\bans(?:wer)?\b[\s*]*(?:is\b|:)", re.IGNORECASE)  # MathQA's solutions end in "answer : a"
# A letter that stands alone, unlike the article in "a man".
_ALONE = re.compile(r"[\s:*(]*(?:(?:option|choice)[\s(]+)?([A-E])(?:[)*.,;\"'\n]|\s*$)", re.IGNORECASE)
_LETTER = re.compile(r"\b([A-E])\b|\(([a-e])\)")


def extract(text: str, kind: str) -> str | None:
    """The answer in a generation, as written; None if there is none.

    Args:
      text: the generation.
      kind: "choice" looks for a letter from A to E, anything else for a formula or number.
    """
    if kind == "choice":
        return _choice(text)
    start = text.find(_FINAL)
    end = text.find(_FINAL_END, start + len(_FINAL)) if start >= 0 else -1
    if end >= 0:
        final = text[start + len(_FINAL) : end]
        return None if "\n" in final else final.strip()  # a line break: the match spans two answers
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
    """The first letter after the last "answer is" or "answer:", or else the last letter before it."""
    phrases = list(_CHOICE_PHRASE.finditer(text))
    before, after = (text[: phrases[-1].start()], text[phrases[-1].end() :]) if phrases else (text, "")
    alone = _ALONE.match(after if phrases else text)
    letters = _LETTER.findall(after)[:1] or _LETTER.findall(before)[-1:]
    if alone:
        return alone[1].upper()
    return "".join(letters[0]).upper() if letters else None
