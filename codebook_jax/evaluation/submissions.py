"""Files of answers for public evaluations, checked before they are written."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

from codebook_jax.errors import UserError
from codebook_jax.evaluation.comparisons import LABELS
from codebook_jax.evaluation.keys import Key, check_keys
from codebook_jax.files import refused, written_whole

TEST2015_QUESTIONS = 447_793  # of VQA 2.0: test-dev and test-std are parts of them


def write_vqa(path: Path | str, answers: Iterable[tuple[Key, str]], known: Collection[Key]) -> str:
    """Writes answers to the `known` questions for EvalAI: one JSON list of {"question_id",
    "answer"}, in the order and with the ids of `known`. Returns a sentence on what the file covers.
    Raises UserError, and writes nothing, if an id is missing, repeated or unknown, or an answer is
    not a text.
    """
    chosen = _complete(path, answers, known)
    for key, answer in chosen.items():
        if not isinstance(answer, str):
            raise UserError(f"{path}: the answer to {key!r} is {answer!r}: give a text")
    rows = [{"question_id": key, "answer": answer} for key, answer in chosen.items()]
    with written_whole(path) as file:
        file.write(json.dumps(rows) + "\n")
    whole = f"all {TEST2015_QUESTIONS:,} questions of test2015"
    if len(rows) == TEST2015_QUESTIONS:
        return f"{path} answers {whole}: EvalAI scores test-dev and test-std from it"
    return (
        f"{path} answers {len(rows):,} questions: EvalAI scores test-dev and test-std only from a "
        f"file that answers {whole}"
    )


def write_comparisons(
    path: Path | str, answers: Iterable[tuple[Key, str | bool]], known: Collection[Key]
) -> str:
    """Writes True or False for the `known` identifiers, for NLVR2: lines IDENTIFIER,PREDICTION
    without a heading, in the order of `known`. Returns and raises as `write_vqa`.
    """
    chosen = {key: str(answer) for key, answer in _complete(path, answers, known).items()}
    for key, answer in chosen.items():
        if answer not in LABELS:
            raise UserError(f"{path}: the answer to {key!r} is {answer!r}: give True or False")
        # NLVR2's evaluation strips each line and splits it at commas, whatever is quoted
        if any(character in str(key) for character in ',"\r\n') or str(key) != str(key).strip():
            raise UserError(
                f"{path}: the identifier {key!r} has a comma, quote, line break or outer blank, "
                "which NLVR2's evaluation cannot read: rename it"
            )
    with written_whole(path) as file:
        file.writelines(f"{key},{answer}\n" for key, answer in chosen.items())
    return f"{path} answers {len(chosen):,} statements, all that were evaluated"


def write_rows(path: Path | str, rows: Sequence[Mapping[str, object]]) -> str:
    """Writes predictions as JSON lines; returns a sentence on them."""
    with written_whole(path) as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    return f"{path} has the predictions for {len(rows):,} examples"


def set_aside(path: Path, why: str) -> str:
    """Renames what an earlier evaluation wrote, lest it is submitted as a result of this one, and
    returns a sentence on that and on `why` nothing is written.
    """
    aside = path.with_name(f"earlier_{path.name}")
    with refused(aside), contextlib.suppress(FileNotFoundError):
        path.replace(aside)
        why = f"{why}; that of an earlier evaluation is now {aside}"
    return f"{path.name} is not written, since {why}"


def _complete(
    path: Path | str, answers: Iterable[tuple[Key, str | bool]], known: Collection[Key]
) -> dict[Key, str | bool]:
    """The answers by the known ids, in their order."""
    pairs = list(answers)
    check_keys((key for key, _ in pairs), known, str(path))
    given = dict(pairs)
    return {key: given[key] for key in known}
