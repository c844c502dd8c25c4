"""The caption of a mirrored picture: left and right swapped where they are certainly places.

`_PLACES` and `_IDIOMS` list what is certain. A left or right in neither, or in both, leaves the
picture unmirrored, and so does what `_SIGN`, `_OTHER_WORDS` and `_UNCLEAR` hold.
"""

from __future__ import annotations

import re
import unicodedata

_SIGN = re.compile(r"[←→↔⬅➡👈👉]|\([lr]\)|\bl ?(?:-|/|to) ?r\b|(?<![\w'])[LR](?![\w'])")
_OTHER_WORDS = frozenset(  # other words for a side: English first, then other languages
    """southpaw southpaws starboard clockwise counterclockwise anticlockwise
    izquierda izquierdo izquierdas izquierdos derecha derecho derechas derechos esquerda esquerdo
    direita direito esquerra dreta gauche droite droit sinistra sinistro destra destro rechts linke
    linken linker linkes linkem rechte rechten rechter rechtes rechtem venstre vanster stanga
    dreapta lewa lewy lewej lewo prawa prawy prawej prawo levo vlevo pravo vpravo lijevo desno sleva
    sprava solda solunda sagda saginda vasen vasemman vasemmalla vasemmalle vasempaan oikea oikean
    oikealla oikealle oikeaan bal balra jobb jobbra kiri kanan kaliwa kushoto kulia""".split()
)
_BESIDE_LINKS = frozenset(  # with one of these, links is German or Dutch, not sausages
    "und der die das dem ein eine einem einen im auf mit von neben ist van de een het op en".split()
)
_WORD = re.compile(r"(?<![a-z])(left|right)", re.IGNORECASE)
_WHERE = r"top|bottom|upper|lower|front|back|rear|middle|center|centre|far"
_TURNS = (
    r"\b(?:turn(?:s|ed|ing)?|fac(?:es?|ed|ing)|looking|lean(?:s|ed|ing)|tilt(?:s|ed|ing)"
    r"|keep(?:s|ing)?|veer(?:s|ed|ing)|point(?:s|ed|ing)|head(?:s|ed|ing))"
)
_UNCLEAR = re.compile(
    rf"(?:{_WHERE}|mid)(?:left|right)|\bstage[\s-]+(?:left|right)"
    r"|\b(?:left|right)[\s-]*(?:wing|bank|coast|part(?:y|ies)\b|luggage|field|foot(?:ed|er)|hook|lean"
    r"|side\s+of\s+(?:the\s+)?(?:law|history))"
    r"|\bright\s+of\s+(?:way|passage)\b|\bright[\s-]hand\s+(?:man|woman)\b"
    r"|\b(?:politic|protest|rally|rallies|activis|extremis|radical|populis|conservative|liberal"
    r"|socialis|communis|fascis|nazi|nationalis|democrat|republican|parliament|election|voter)"
    # What is left of the cake; the man in the middle left the room; facing right next to a cat.
    r"|\b(?:what|all|only|little|nothing|much|lot|some|any|few|last|half|remain\w*|slices?|pieces?"
    r"|bites?)\b.*(?<!the )\bleft\s+of\b"
    rf"|(?:\b(?:at|on|to|from|rows?|picture|pictured|shown|{_WHERE})|{_TURNS})[\s-]+"
    r"(?:left\s+(?:the|an?|his|her|their|alone|open|unattended)"
    r"|right\s+(?:now|away|next))\b|\bthe\s+right\s+(?:now|away)\b",
    re.IGNORECASE | re.DOTALL,
)
_IN_SENTENCE = re.compile(r"[\w,&'-]\s*\b(?:Left|Right)\b")
_NO_TITLE = re.compile(r"^\W*[a-z]|\b(?!(?:the|and|for|with|from|near)\b)(?<!')[a-z]{3,}")

_SIDE = r"\b(?:left|right)"
_IS = r"(?=\s*(?:$|[.,;:!?)\]\"])|\s+(?:of|is|are|was|were)\b)"
_NOUN = (  # after it, "the right" is a noun
    rf"(?:{_IS}|(?=\s+(?:and|or|but|with|has|have|who|which|that|while|wearing|holding|an?|the|in"
    r"|next|near|behind|beside|by|at|under)\b))"
)
_OWNER = r"(?:\b(?:the|its|his|her|their|my|your|our)|'s)\s+"
_TO_THE = rf"\b(?:on|to|at|from|towards?|in)\s+{_OWNER}(?:(?:very|far|extreme)\s+)?"
_AREA = r"(?:side|corner|edge|lane|turn)s?\b(?![\s-]+(?:up|out)\b)"
_PART = (
    r"(?:(?:front|rear|hind|upper|lower)\s+)?(?:hand|half|border|margin|panel|column|arm|leg|foot"
    r"|eye|ear|knee|elbow|shoulder|cheek|wrist|thumb|paw|hip|breast|wheel|quadrant|third|legs"
    r"|paws|wheels)\b"
)
_ADJECTIVE = (  # before "left", which is then no verb, unlike in "someone left hand soap"
    rf"(?:^|[^\w\s]\s*|{_OWNER}|\b(?:a|no|with|on|in|at|from|by|of|to|using|front|rear|hind|upper"
    rf"|lower)\s+|\bright\s+{_PART}\s+(?:and|or)\s+)"
)
_PLACES = (
    rf"{_SIDE}(?:-?(?:most|wards?)|[\s-]?handed|-?hand|-?side)\b(?![\s-](?:up|out)\b)",
    rf"{_SIDE}[\s-]+{_AREA}",
    rf"\bright[\s-]+{_PART}",
    rf"{_ADJECTIVE}left[\s-]+{_PART}",
    rf"(?<!the ){_SIDE}\s+of\b",
    rf"{_SIDE}(?:\s+(?:and|or)\s+(?:the\s+)?|/)(?:left|right)(?:{_IS}|\s+{_AREA}|\s+{_PART})",
    rf"{_SIDE}(?:\s+to\s+|-to-)(?:left|right)\b(?!\s+(?:now|away|next|there|the|an?)\b)",
    rf"[(,]\s*{_SIDE}\s*[,;.)]|(?:^|[.;,(])\s*{_SIDE}\s*:",
    rf"\b(?:top|bottom|upper|lower)[\s-]+(?:left|right)(?:{_IS}|[\s-]+(?:{_AREA}|{_PART}))",
    rf"\b(?:rows?,?|seated|pictured|shown|(?:on|to|at|from)(?:\s+far)?)\s+(?:left|right){_IS}",
    rf"\bat\s+{_SIDE}\s+(?:and|with|behind)\b",
    rf"{_TO_THE}left\b|(?!in\b){_TO_THE}right{_NOUN}",
    rf"\b(?:in|at)\s+(?:the\s+)?{_SIDE}\s+(?:foreground|background)\b",
    rf"{_TURNS}\s+(?:(?:left|right)(?:{_IS}|(?=\s+(?:and|or)\b))|left(?=\s+(?:at|on|in|into)\b))",
    r"\bthe\s+left\s+(?!(?:over|behind|alone)\b)(?=\w)",
    # The left dog chases the right dog.
    r"\bthe\s+(left|right)\s+(\w+)\b(?:(?!\b(?:left|right)).)*\bthe\s+(?!\1)(?:left|right)\s+\2\b",
)
_IDIOMS = (
    rf"\ball[\s-]+right{_IS}|\b(?:human|civil|equal|animal)\s+rights\b|\brights\s+reserved\b",
    r"\bright\s+(?:now|away(?!\s+from)|angles?|answers?)\b|(?<!the )\bright\s+next\s+to\b",
    r"\bright[\s-]side[\s-]up\b|\bleft-?overs?\b",
    r"\bleft\s+over(?:s\b|\s+(?:from|food|pizza|cake|meat|rice|bread)\b)",
    r"\b(?:i|we|he|she|they)\s+left\b|\bleft\s+(?:the|his|her|their|its|my|your|our)\b",
    r"\bleft\s+(?:alone|open|unattended)\b",
    r"\b(?:is|are|was|were|been|being)\s+left\s+behind\b(?!\s+(?:the|an?|his|her)\b)",
)


def mirrored(caption: str) -> str | None:
    """The caption of the mirrored picture, each swapped word in its case; None: do not mirror."""
    letters = unicodedata.normalize("NFC", caption)  # a letter and its accent become one
    if any(letter.isalpha() and not letter.isascii() for letter in letters):
        return None
    text = caption.replace("\u2019", "'")
    words = set(re.findall("[a-z]+", text.lower()))
    other = words & _OTHER_WORDS or ("links" in words and words & _BESIDE_LINKS)
    if other or _SIGN.search(text):
        return None
    if not re.search("left|right", text, re.IGNORECASE):
        return caption
    if _UNCLEAR.search(text) or (_IN_SENTENCE.search(text) and _NO_TITLE.search(text)):
        return None
    places, idioms = _covered(_PLACES, text), _covered(_IDIOMS, text)
    if any((m.start() in places) == (m.start() in idioms) for m in _WORD.finditer(caption)):
        return None
    return _WORD.sub(lambda m: _opposite(m[1]) if m.start() in places else m[1], caption)


def _covered(patterns: tuple[str, ...], caption: str) -> set[int]:
    """The positions that some pattern matches."""
    found = (m for p in patterns for m in re.finditer(p, caption, re.IGNORECASE | re.DOTALL))
    return {position for match in found for position in range(*match.span())}


def _opposite(word: str) -> str:
    case = str.upper if word.isupper() else str.capitalize if word[0].isupper() else str
    return case("right" if word.lower() == "left" else "left")
