"""Accuracy of visual question answering, in the four ways in which it is published.

The variants differ in how an answer and the annotators' answers are brought to one form before they
are compared, and in the tenths of the results:

- `a` (default): answers always; annotators' answers have their punctuation changed, and only if
  they differ. The first official code (GT-Vision-Lab/VQA), ALBEF and LAVIS.
- `b`: both in full, if the annotators differ; otherwise neither, so that text read from pictures
  is compared as it stands. The later official code (GT-Vision-Lab/VQA#14).
- `c`: as `a`, with other rules for punctuation. The public script of the challenge server
  (Cloud-CV/VQA-Challenge, 2017); whether the server still runs it is not known.
- `d`: both in full, always. lmms-eval since its #794.
"""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from codebook_jax.errors import UserError, first_few
from codebook_jax.evaluation.keys import Key, check_keys

VARIANTS = {
    "a": "the first official code, ALBEF, LAVIS",
    "b": "the later official code",
    "c": "the challenge server's public script",
    "d": "lmms-eval: everything normalised",
}
PARTED_SHOWN = 5  # questions in a table

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_PERIOD = re.compile(r"\.(?!\d)")
_MOST_PERIODS = 32  # the official code passes re.UNICODE, which is 32, as the count of `sub`
_DIGITS = "zero one two three four five six seven eight nine ten".split()
_NUMBERS = {word: str(number) for number, word in enumerate(_DIGITS)} | {"none": "0"}
_ARTICLES = ("a", "an", "the")
_CONTRACTED = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't
haven't he'd he'd've he's how'd how'll how's I'd've I'm I've isn't it'd it'd've it'll ma'am mightn't
mightn't've might've mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't she'd've
should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've
someone'll someone's something'd something'd've something'll that's there'd there'd've there're
there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're
what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're
why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're
you've
""".split()
# The official table: each of these without one of its apostrophes becomes the whole word. It has a
# pair the wrong way round, two that change nothing, and capitals that no lower-cased word meets.
CONTRACTIONS = {
    word[: mark.start()] + word[mark.end() :]: word
    for word in _CONTRACTED
    for mark in re.finditer("'", word)
} | {"somebody'd": "somebodyd", "let's": "let's", "she's": "she's"}

_MARK = f"[{re.escape(_PUNCTUATION)}]"
_MARK_OR_BLANK = f"[ {re.escape(_PUNCTUATION)}]"
_SERVER_RULES = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (rf"\A{_MARK_OR_BLANK}+(?=[a-zA-Z0-9 ])", ""),
        (rf"(?<=[a-zA-Z0-9 ]){_MARK_OR_BLANK}+\Z", ""),
        (r"(?<=\d),+(?=\d)", ""),
        (rf"(?<={_MARK_OR_BLANK}){_MARK}|{_MARK}(?={_MARK_OR_BLANK})", " "),
        (r" +", " "),
        (rf"(?<=[a-zA-Z]){_MARK}(?=[a-zA-Z])", " "),
    )
)


class Report(NamedTuple):
    """Accuracies of a set of questions by variant."""

    accuracy: dict[str, dict[str, float]]  # percent by variant, of "overall" and each answer type
    parted: dict[Key, dict[str, float]]  # of questions whose accuracy (0 to 1) the variants part on
    questions: int


def vqa_accuracy(
    answers: Mapping[Key, str], references: Mapping[Key, Sequence[str]], variant: str = "a"
) -> dict[Key, float]:
    """The accuracy of each answer, from 0 to 1: the mean over its annotators of min(1, n / 3), with
    n the other annotators who agree (Antol et al. 2015); with a single annotator, 1 if they agree.
    The official sets have ten annotators; with two or three, no answer can score more than 1/3 or
    2/3. Raises UserError if an answer is missing or unknown, or a question has no annotator.
    """
    if variant not in VARIANTS:
        raise ValueError(f"variant={variant!r} is not one of {', '.join(VARIANTS)}")
    check_keys(answers, references, "the answers")
    if bare := [repr(key) for key, given in references.items() if not given]:
        raise UserError(
            f"{len(bare):,} of {len(references):,} questions have no reference answers "
            f"({first_few(bare, 3)}), so that no accuracy is known: leave them out, or write a "
            "submission"
        )
    accuracies = {}
    for key, given in references.items():
        answer, compared = _comparable(answers[key], given, variant)
        accuracies[key] = _leave_one_out(compared.count(answer), len(compared))
    return accuracies


def best_constant(references: Mapping[Key, Sequence[str]]) -> float:
    """The accuracy in percent of one of the commonest answers to every question."""
    counts = Counter(answer for given in references.values() for answer in set(given))
    return max(
        100
        * float(np.mean(list(vqa_accuracy(dict.fromkeys(references, each), references).values())))
        for each, _ in counts.most_common(3)
    )


def highest_possible(references: Mapping[Key, Sequence[str]]) -> float:
    """The accuracy in percent of every question's commonest answer, as the annotators wrote it."""
    most = [(Counter(given).most_common(1)[0][1], len(given)) for given in references.values()]
    return 100 * float(np.mean([_leave_one_out(*counts) for counts in most]))


def report(
    answers: Mapping[Key, str],
    references: Mapping[Key, Sequence[str]],
    types: Mapping[Key, str] | None = None,
) -> Report:
    """The accuracy by variant, of all questions and of each answer type in `types`, and the
    questions on which the variants part. Raises as `vqa_accuracy`.
    """
    found = {variant: vqa_accuracy(answers, references, variant) for variant in VARIANTS}
    groups = {"overall": list(references)}
    for key in references if types else ():
        groups.setdefault(types[key], []).append(key)
    accuracy = {
        group: {
            variant: 100 * float(np.mean([each[key] for key in keys]))
            for variant, each in found.items()
        }
        for group, keys in groups.items()
    }
    by_key = {key: {variant: each[key] for variant, each in found.items()} for key in references}
    parted = {key: each for key, each in by_key.items() if len(set(each.values())) > 1}
    return Report(accuracy, parted, len(references))


def format_table(
    result: Report, answers: Mapping[Key, str], references: Mapping[Key, Sequence[str]]
) -> str:
    """A table for a terminal: accuracies by variant, and questions on which the variants part."""
    width = max(map(len, result.accuracy))
    lines = [f"VQA accuracy of {result.questions:,} questions, %"]
    lines.append(f"{'':{width}}" + "".join(f"{f'({variant})':>9}" for variant in VARIANTS))
    for group, accuracy in result.accuracy.items():
        lines.append(f"{group:{width}}" + "".join(f"{accuracy[each]:9.2f}" for each in VARIANTS))
    lines += [f"({variant}) {used_by}" for variant, used_by in VARIANTS.items()]
    if few := sum(2 <= len(given) <= 3 for given in references.values()):
        most = highest_possible(references)
        few_have = f"{few:,} questions have only two or three annotators"
        lines.append(f"{few_have}, who count at most 1/3 and 2/3: {most:.2f} is the most possible")
    if result.parted:
        lines.append(f"the variants part on {len(result.parted):,} of them:")
    for key in list(result.parted)[:PARTED_SHOWN]:
        scores = ", ".join(f"({name}) {value:.2f}" for name, value in result.parted[key].items())
        given = ", ".join(f"{each!r} x{n}" for each, n in Counter(references[key]).most_common())
        lines.append(f"  {key}: {answers[key]!r}, annotators {given}: {scores}")
    return "\n".join(lines)


@functools.lru_cache(2**18)
def strip_punctuation(text: str) -> str:
    """The text by the official rules for punctuation: a mark is removed if one of its kind stands
    beside a blank, or if the text has a comma between digits, and is a blank otherwise; a period
    goes unless a digit follows.
    """
    digits = re.search(r"\d,\d", text)
    changed = text
    for mark in _PUNCTUATION:
        beside_blank = f"{mark} " in text or f" {mark}" in text
        changed = changed.replace(mark, "" if beside_blank or digits else " ")
    return _PERIOD.sub("", changed, count=_MOST_PERIODS)


@functools.lru_cache(2**18)
def strip_server_punctuation(text: str) -> str:
    """The text by the challenge server's rules for punctuation: marks at both ends and commas
    between digits go; marks beside marks or blanks, or between letters, are blanks; a period goes
    unless a digit follows. Other marks stay, as in 1/2.
    """
    for pattern, replacement in _SERVER_RULES:
        text = pattern.sub(replacement, text)
    return _PERIOD.sub("", text, count=_MOST_PERIODS)


@functools.lru_cache(2**18)
def normalise(answer: str, punctuation: Callable[[str], str] = strip_punctuation) -> str:
    """An answer in the form in which it is compared: one line, punctuation, lower case, numbers up
    to ten as digits, no articles, contractions with their apostrophe, one blank between words.
    """
    words = punctuation(_one_line(answer)).lower().split()
    words = [_NUMBERS.get(word, word) for word in words if word not in _ARTICLES]
    return " ".join(CONTRACTIONS.get(word, word) for word in words)


def _one_line(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def _comparable(answer: str, references: Sequence[str], variant: str) -> tuple[str, Sequence[str]]:
    """The answer and the references in the forms in which the variant compares them."""
    if variant in ("a", "c"):
        punctuation = strip_punctuation if variant == "a" else strip_server_punctuation
        differ = len(set(references)) > 1
        return normalise(answer, punctuation), [
            punctuation(each) if differ else each for each in references
        ]
    lines = [_one_line(each) for each in references]
    if variant == "d" or len(set(lines)) > 1:
        return normalise(answer), [normalise(each) for each in lines]
    return _one_line(answer), lines


def _leave_one_out(agreeing: int, annotators: int) -> float:
    """The mean over the annotators: each who agrees sees one fewer who does."""
    if annotators == 1:
        return float(agreeing)
    seen = agreeing * min(1, (agreeing - 1) / 3) + (annotators - agreeing) * min(1, agreeing / 3)
    return seen / annotators
