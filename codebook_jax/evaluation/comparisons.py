"""Accuracy and consistency of statements about two images (NLVR2)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

from codebook_jax.evaluation import classes
from codebook_jax.evaluation.keys import Key, check_keys

LABELS = ("True", "False")
_IDENTIFIER = re.compile(r"([^-]+-\d+)-\d+-(\d+)")  # split-set, pair, sentence


class Compared(NamedTuple):
    """How statements were judged."""

    judged: classes.Classified
    # Percent of the sentences that are judged right with every pair of images they are shown with.
    consistency: float | None  # None: not every key is split-set-pair-sentence
    sentences: int

    def figures(self) -> dict[str, float]:
        """Those of `Classified`, with `consistency` and `sentences` if they are known."""
        known = {"consistency": self.consistency, "sentences": self.sentences}
        return self.judged.figures() | (known if self.consistency is not None else {})


def compare(answers: Mapping[Key, str], references: Mapping[Key, str]) -> Compared:
    """Judges "True" or "False" in any case. Sentences are what identifiers without their third part
    name, as in NLVR2's own evaluation (lil-lab/nlvr, nlvr2/eval/metrics.py).

    Raises UserError if an answer is missing or unknown, or a label is neither true nor false.
    """
    check_keys(answers, references, "the answers")
    labels = {key: label.capitalize() for key, label in references.items()}
    given = {key: answers[key].capitalize() for key in labels}
    judged = classes.classify(list(given.values()), list(labels.values()), LABELS)
    right: dict[str | None, bool] = {}
    for key, label in labels.items():
        sentence = sentence_of(key)
        right[sentence] = right.get(sentence, True) and given[key] == label
    consistency = None if None in right else 100 * sum(right.values()) / len(right)
    return Compared(judged, consistency, len(right))


def sentence_of(identifier: Key) -> str | None:
    """The sentence, whatever its pair of images: "dev-12-0" of "dev-12-3-0"."""
    found = _IDENTIFIER.fullmatch(str(identifier))
    return "-".join(found.groups()) if found else None


def format_table(result: Compared) -> str:
    """A table for a terminal."""
    line = "consistency is not known: not every identifier is split-set-pair-sentence"
    if result.consistency is not None:
        line = f"consistency {result.consistency:.2f} % of {result.sentences:,} sentences"
    return f"{classes.format_table(result.judged)}\n{line}"
