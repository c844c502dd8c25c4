"""The caption of a mirrored picture: swaps left and right in English captions where they name a place.

The words around each "left" and "right" decide whether it names a place ("to the left of"), does not ("he left", "right
now"), or may do either: `_RULES`, first match wins. Captions with left or right in another language are not mirrored.
"""

from __future__ import annotations

import re
import unicodedata

_SIDE = re.compile(r"\b(left|right)(?=(?:s|most|wards?|hand(?:ed)?|side)?\b)", re.IGNORECASE)
_ELSEWHERE = re.compile(  # Spanish, Portuguese, French, Italian, German, Russian; Chinese and Japanese, Korean, Thai, ...
    r"\b(?:izquierd|derech[oa]|esquerd|direit[oa]|gauche|droite?\b|sinistr|destr[aoe]\b|links\b|rechts\b)"
    r"|\b(?:linke|rechte)[nmrs]?\b|\b(?:на)?(?:слева|справа|лево|право)|\b(?:лев|прав)(?:ый|ая|ой|ую|ом)\b"
    r"|[左右왼]|오른|ซ้าย|ขวา|\b(?:trái|phải)\b|يسار|يمين|बाए|बाये|बाईं|दाए|दाये|दाईं|दाहिन",
    re.IGNORECASE,
)
_OTHER = r"(?:left|right)"
_PARTS = (  # things that have a left and a right one
    "side|hand|handed|half|part|portion|section|end|edge|corner|border|margin|foreground|background|panel|column|lane|"
    "bank|arm|leg|foot|eye|ear|knee|elbow|shoulder|cheek|wrist|thumb|paw|hip|breast|wheel|shoe|sleeve|glove|page|"
    "quadrant|third|quarter|rear|front|top|bottom|center|centre"
)
_ENDS = r"\s*(?:$|[.,;:!?)\]\"'])"  # no word follows that it could describe
_GOES_ON = r"\s+(?:of|is|are|was|were|and|or|but|with|has|have|who|which|that|while|wearing|holding|side)\b"
_OWNER = r"(?:\b(?:the|a|an|its|his|her|their|my|your|our)|['\u2019]s)\s+"
_ARTICLE = r"\s+(?:the|a|an|his|her|its|their|my|your|our|him|them|us)\b"  # after a verb
_WHERE_ONE = (
    r"\b(?:on|to|at|from|toward|towards|in|into|by|near|along)\s+(?:the|its|his|her|their|my|your|our)\s+"
    r"(?:(?:very|far|extreme|immediate)\s+)?"
)
_WHERE = rf"(?:{_WHERE_ONE}|\b(?:on|to|at|from|towards?)\s+)"
_CORNER = r"\b(?:top|bottom|upper|lower|far|center|centre|middle|mid|front|rear|extreme)[\s-]+"
_MOVES = (
    r"\b(?:turn|fac|look|lean|point|tilt|head|mov|walk|bend|veer|swerv|swing|angl|slid|shift|driv|rid|run|fly|steer)"
    r"(?:e|es|ed|s|ing|ning|ting)?\s+"
)
_THERE = (  # "right" before these means "exactly"; something "left" before these was left there
    "now|away|there|here|then|before|after|beside|besides|behind|next|in|on|at|by|near|under|below|above|over|up|down|"
    "out|off|into|onto|through|past|across|against|around|along|inside|outside|beneath|between|when|where|as|back"
)
_CORRECT = (
    "answer|angle|angles|angled|triangle|time|way|thing|things|choice|decision|size|track|tool|tools|moment|amount|"
    "job|word|words|idea|kind|person|people"
)
# Each rule: what must come before "left" or "right", what after it, and to which of the two it applies.
_NO_PLACE = (
    (r"\b(?:all|human|civil|equal|animal)[\s-]+$", "", "right"),
    (
        "",
        rf"\s+(?:of\s+way|side\s+up|whales?)\b|-(?:side[\s-]up|angled|wing\w*)|[\s-]+(?:{_CORRECT})\b",
        "right",
    ),
    ("", r"s\b|\s+(?:now|away)\b", "right"),
    (r"\b(?:he|she|they|we|i|who)\s+$", "", "left"),
    ("", "-(?:over|wing)", "left"),
)
_UNCLEAR = (
    (
        _CORNER + "$",
        r"[\s-]+(?:wing|politic|part(?:y|ies)\b|group|activist|extremist|candidate|supporter)",
        _OTHER,
    ),
    ("", r"[\s-]+wing|[\s-]+hand\s+(?:man|woman)\b", _OTHER),
    (rf"(?:{_CORNER}|{_MOVES})$", _ARTICLE, "left"),  # the man in front left the room
    (r"\b(?:what|all|little|nothing|much|lot|remains?)\b.*$", r"\s+of\b", "left"),
)
_PLACE = (
    ("", r"(?:most|wards?|[\s-]?handed|[\s-]hand|hand|-?side)\b", _OTHER),
    ("", rf"\s+(?:or|and|to)\s+(?:the\s+)?{_OTHER}\b(?!\s+(?:now|away))|/{_OTHER}\b", _OTHER),
    (rf"\b{_OTHER}(?:\s+(?:or|and|to)\s+(?:the\s+)?|/)$", rf"{_ENDS}|(?!{_ARTICLE})\s", _OTHER),
    (r"\(\s*$", r"\s*\)", _OTHER),
    (_CORNER + "$", "", _OTHER),
    ("", rf"\s+of\b|[\s-]+(?:{_PARTS})s?\b", _OTHER),
    (_WHERE + "$", rf"{_ENDS}|{_GOES_ON}|\s+(?:{_THERE})\b", _OTHER),
    (_WHERE_ONE + "$", "", "left"),
    (_WHERE + "$", rf"(?!{_ARTICLE})\s", "left"),
    (_MOVES + "$", rf"{_ENDS}|{_GOES_ON}", _OTHER),
    (_MOVES + "$", "", "left"),
    (_OWNER + "$", rf"(?!{_ARTICLE}|\s+(?:{_THERE}|alone)\b)\s+\w", "left"),
    (_OWNER + "$", r"\s+turns?\b", "right"),
)
_NO_PLACE_EITHER = (
    ("", r"\s+(?:alone|behind|over|overs|unattended)\b", "left"),
    (r"\b(?:you|it|has|have|had|having|just|be|been|being|gets?|got)\s+$", r"\s+\w", "left"),
    (
        r"\b(?:is|are|was|were)\s+$",
        rf"\s+(?:{_THERE}|to|for|with|without|open|\w+ed|\w+ing)\b",
        "left",
    ),
    (r"\w\s+$", _ARTICLE, "left"),
    ("", rf"\s+(?:{_THERE})\b", "right"),
)
# Turns right at the corner, looks right at us.
_MOVES_RIGHT_THERE = ((_MOVES + "$", rf"\s+(?:{_THERE})\b", "right"),)
_RULES = [  # (before, after, which, whether it is a place; None: unclear)
    (re.compile(before), re.compile(after), re.compile(which), place)
    for rules, place in (
        (_NO_PLACE, False),
        (_UNCLEAR, None),
        (_PLACE, True),
        (_MOVES_RIGHT_THERE, None),
        (_NO_PLACE_EITHER, False),
    )
    for before, after, which in rules
]


def mirrored(caption: str) -> str | None:
    """The caption of the mirrored picture; None (do not mirror) if it is unclear whether a word names a place.

    Swaps left and right, keeping upper and lower case, as separate words and in leftmost, left-hand, leftward and the
    like; not in bright, leftover or copyright. Without any word that shows it to be a place, one is unclear.
    """
    if _ELSEWHERE.search(unicodedata.normalize("NFC", caption)):
        return None
    parts, done = [], 0
    for match in _SIDE.finditer(caption):
        place = _is_place(
            match[1].lower(), caption[: match.start()].lower(), caption[match.end() :].lower()
        )
        if place is None:
            return None
        parts += [caption[done : match.start()], _other(match[1]) if place else match[1]]
        done = match.end()
    return "".join(parts) + caption[done:]


def _is_place(side: str, before: str, after: str) -> bool | None:
    for behind, ahead, which, place in _RULES:
        if which.fullmatch(side) and behind.search(before) and ahead.match(after):
            return place
    return None


def _other(word: str) -> str:
    other = "right" if word.lower() == "left" else "left"
    if word.isupper():
        return other.upper()
    return other.capitalize() if word[0].isupper() else other
