"""Accuracy where each example has one label, what chance gives, and which labels are confused."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from codebook_jax.errors import UserError, did_you_mean, first_few
from codebook_jax.evaluation.recall import RANKS, named_recalls, recall_of_queries

WIDEST_TABLE = 100  # characters; if it were wider, the commonest mistakes are listed instead
MISTAKES_SHOWN = 10


class Classified(NamedTuple):
    """How examples were labelled."""

    names: tuple[str, ...]
    confusion: Int[np.ndarray, "labels predictions"]  # examples, in the order of the names

    @property
    def examples(self) -> int:
        return int(self.confusion.sum())

    def figures(self) -> dict[str, float]:
        """In percent: `accuracy`; `chance_frequent`, of always saying the most frequent label;
        `chance_uniform`, of drawing one of the names. The count `examples`.
        """
        return {
            "accuracy": 100 * float(self.confusion.trace() / self.examples),
            "chance_frequent": 100 * float(self.confusion.sum(axis=1).max() / self.examples),
            "chance_uniform": 100 / len(self.names),
            "examples": self.examples,
        }


def classify(predictions: Sequence[str], labels: Sequence[str], names: Sequence[str]) -> Classified:
    """Counts the predictions of each label. Raises UserError for a label that is not one of the
    names, and if there are no examples.
    """
    if not labels:
        raise UserError("there is no example with a label: no accuracy is known")
    place = {name: at for at, name in enumerate(names)}
    for text in Counter((*labels, *predictions)):
        if text not in place:
            raise UserError(
                f"the label {text!r} is not one of {first_few(names, 5)}: correct it, or leave its "
                f"examples out{did_you_mean(text, names)}"
            )
    confusion = np.zeros((len(place), len(place)), int)
    for prediction, label in zip(predictions, labels, strict=True):
        confusion[place[label], place[prediction]] += 1
    return Classified(tuple(names), confusion)


def top_k_accuracy(
    scores: Float[np.ndarray, "examples names"], labels: Int[np.ndarray, " examples"]
) -> dict[str, float]:
    """`top1`, `top5`, ...: percent of examples with their label among the k highest scores, for the
    ranks below the number of names; equal scores count as if shuffled. Raises ValueError for NaN.
    """
    found = named_recalls("top", recall_of_queries(scores, labels, np.arange(scores.shape[1])))
    return {f"top{k}": found[f"top{k}"] for k in RANKS if k < scores.shape[1]}


def surely_above(chance: float, examples: int) -> float:
    """The accuracy in percent that is three standard errors above chance, at most 100."""
    return min(100, chance + 3 * math.sqrt(chance * (100 - chance) / examples))


def format_table(result: Classified) -> str:
    """A table for a terminal: accuracy and chance, then how often each label (a row) was taken for
    each name (a column), or, of many names, the commonest mistakes.
    """
    found = result.figures()
    lines = [
        f"accuracy of {result.examples:,} examples {found['accuracy']:.2f} % (the most frequent "
        f"label {found['chance_frequent']:.2f} %, a random one {found['chance_uniform']:.2f} %)"
    ]
    certain = surely_above(found["chance_frequent"], result.examples)
    if found["accuracy"] <= certain:
        lines.append(
            f"of so few examples, up to {certain:.2f} % is no better than the most frequent label"
        )
    return "\n".join(lines + (_table(result) or _mistakes(result)))


def _table(result: Classified) -> list[str]:
    """The lines of the confusion table; none if it is too wide."""
    rows = {"label \\ taken for": result.names} | {
        name: [f"{count:,}" for count in counts]
        for name, counts in zip(result.names, result.confusion, strict=True)
    }
    first, width = max(map(len, rows)), 2 + max(len(cell) for row in rows.values() for cell in row)
    if first + width * len(result.names) > WIDEST_TABLE:
        return []
    return [f"{name:{first}}" + "".join(f"{cell:>{width}}" for cell in rows[name]) for name in rows]


def _mistakes(result: Classified) -> list[str]:
    wrong = result.confusion * ~np.eye(len(result.names), dtype=bool)
    places = np.argsort(-wrong, axis=None, kind="stable")[:MISTAKES_SHOWN]
    return [
        f"{wrong[label, taken]:8,} {result.names[label]} taken for {result.names[taken]}"
        for label, taken in zip(*np.unravel_index(places, wrong.shape), strict=True)
        if wrong[label, taken]
    ]
