"""Visual question answering: a decoder reads the fused question, and ranks answers or writes one.

Answers are learned in proportion to how many people gave them, and ranked as ALBEF ranks them: the
most probable first words are short-listed, and of those answers the likeliest is taken.
Source: Li et al. 2021, 4.3.
"""

from __future__ import annotations

import functools
import re
from collections import Counter

import jax
import jax.numpy as jnp
import ml_collections
from jaxtyping import Array, Float, Int, Key, PyTree, UInt8

from codebook_jax.config import COMMON, FINETUNING, VQA, check_fields, with_fields
from codebook_jax.console import say
from codebook_jax.data.examples import ExampleSpec
from codebook_jax.data.sources import Source
from codebook_jax.data.sources.json_files import read_json
from codebook_jax.data.text import Tokenizer, Vocabulary
from codebook_jax.errors import UserError
from codebook_jax.evaluation import vqa
from codebook_jax.evaluation.predicting import Predicted, Program
from codebook_jax.evaluation.submissions import write_vqa
from codebook_jax.method.numerics import own_settings
from codebook_jax.models.answers import (
    Answerer,
    Question,
    Scores,
    chosen,
    rank_answers,
    write_answers,
)
from codebook_jax.models.layers import keys_of
from codebook_jax.tasks import limits
from codebook_jax.tasks.finetune import (
    FITTING,
    FinetuneState,
    Finetuning,
    Rows,
    check_ids,
    scalars_of,
    submission,
    without_answers,
)
from codebook_jax.tasks.task import Evaluation

SUBMISSION = "vqa_result.json"
LEAST_COVERED = 0.5  # share of the training answers that a list must have


class Answering(Finetuning):
    """The jitted programs of a run; holds no parameters."""

    reads = "questions"

    def __init__(
        self, config: ml_collections.ConfigDict, vocabulary: Vocabulary, mesh: jax.sharding.Mesh
    ) -> None:
        super().__init__(config, vocabulary, mesh)
        self.rank = jax.jit(own_settings(self._rank))

    @staticmethod
    def check(config: ml_collections.ConfigDict) -> None:
        """Raises UserError, naming the fields, if no run of the task can start with this config."""
        check_fields(config, COMMON | FINETUNING | VQA)
        limits.check_fitting(config, FITTING)

    @staticmethod
    def pretrained(name: str) -> str | None:
        """The decoder starts as the fusion encoder, with the text encoder's embeddings and the head
        for masked words.
        """
        found = re.match(r"(student|teacher)/decoder/(blocks/|output/)?(.*)", name)
        if found is None:
            return Finetuning.pretrained(name)
        towers = "student/towers" if found[1] == "student" else "teacher"
        part = {"blocks/": "fusion/blocks", "output/": "masked_words", None: "text"}[found[2]]
        return f"{towers}/{part}/{found[3]}"

    def batch_spec(self) -> ExampleSpec:
        """What this process's rows of a batch hold."""
        of = self.config.vqa
        return super().batch_spec()._replace(answers=of.answers, answer_tokens=of.answer_tokens)

    def teach(self, network: Answerer, rows: Rows) -> Question:
        """What the teacher's decoder reads; it runs with the student's, a pass at a time."""
        return network.ask(self.pixels(rows.images), rows.tokens, rows.text_length)

    def losses(
        self,
        state: FinetuneState,
        network: Answerer,
        rows: Rows,
        taught: Question | None,
        key: Key[Array, ""],
    ) -> tuple[Float[Array, " batch"], dict[str, Float[Array, " batch"]]]:
        """The cross-entropy of each answer's words, summed, by the answers' weights; with alpha,
        the teacher's distribution over the words instead of the word.
        """
        ask_key, answer_key = keys_of(key, 2)
        question = network.ask(self.pixels(rows.images), rows.tokens, rows.text_length, ask_key)
        answers, weight = rows.target
        logits = network.decoder(answers[..., :-1], question, answer_key)
        log_p, words = jax.nn.log_softmax(logits), answers[..., 1:]
        loss = -chosen(log_p, words)
        if taught is not None:
            teacher, alpha = self.network(state.teacher).decoder, self.alpha(state)
            soft = jax.lax.stop_gradient(jax.nn.softmax(teacher(answers[..., :-1], taught)))
            loss = (1 - alpha) * loss - alpha * jnp.sum(soft * log_p, axis=-1)
        here = words != self.vocabulary.pad_id
        right = jnp.where(here, logits.argmax(axis=-1) == words, True).all(axis=-1)
        losses = jnp.sum(jnp.where(here, loss, 0), axis=-1)
        return jnp.sum(weight * losses, axis=1), {"accuracy": jnp.sum(weight * right, axis=1)}

    def program(self, student: PyTree, tokenizer: Tokenizer) -> Program:
        """Ranks the candidates, or writes answers."""
        if self.config.vqa.method == "generate":
            return functools.partial(self.predict, student)
        candidates, most = self.config.vqa.candidates, self.config.vqa.answer_tokens
        tokens, _, cut = tokenizer.encode(candidates, most)
        if cut:
            say(
                f"warning: {cut:,} of {len(candidates):,} answers are longer than "
                f"config.vqa.answer_tokens={most}: their ends are cut off"
            )
        return functools.partial(self.rank, student, tokens)

    def predicted(
        self,
        network: Answerer,
        pixels: Float[Array, "rows images side side 3"],
        tokens: Int[Array, "rows tokens"],
        lengths: Int[Array, " rows"],
    ) -> Int[Array, "rows answer_tokens"]:
        """The tokens of the likeliest answer, word by word."""
        question = network.ask(pixels, tokens, lengths)
        return write_answers(
            network.decoder, question, self.vocabulary, tokens=self.config.vqa.answer_tokens
        )

    def _rank(
        self,
        student: PyTree,
        candidates: Int[Array, "candidates answer_tokens"],
        images: UInt8[Array, "rows images side side 3"],
        tokens: Int[Array, "rows tokens"],
        lengths: Int[Array, " rows"],
    ) -> Scores:
        network = self.network(student)
        return rank_answers(
            network.decoder,
            network.ask(self.pixels(images), tokens, lengths),
            candidates,
            shortlist=self.config.vqa.shortlist,
            pad_id=self.vocabulary.pad_id,
        )

    def judged(self, found: Predicted, tokenizer: Tokenizer) -> Evaluation:
        """VQA accuracy, in its variants."""
        if self.config.vqa.method == "generate":
            given = [tokenizer.decode(row) for row in found.outputs]
        else:
            given = [self.config.vqa.candidates[best] for best in found.outputs[0][:, 0]]
        check_ids(found, "questions")
        answers = {each.key: text for each, text in zip(found.examples, given, strict=True)}
        write = functools.partial(write_vqa, answers=list(answers.items()), known=list(answers))
        options = {"files": ((SUBMISSION, submission(found, write)),)}
        references = {each.key: each.answers for each in found.examples if each.answers}
        if not references:
            return without_answers(found, "questions", **options)
        known = {key: answers[key] for key in references}
        report = vqa.report(known, references)
        figures = {
            "accuracy": report.accuracy["overall"]["a"],
            "chance": vqa.best_constant(references),
            "questions": float(len(references)),
        }
        figures |= {f"accuracy_{name}": value for name, value in report.accuracy["overall"].items()}
        return Evaluation(
            {"student": figures},
            scalars_of(figures),
            score=figures["accuracy"],
            metric="VQA accuracy in validation",
            summary=f"VQA accuracy {figures['accuracy']:.2f} % (always the best same answer "
            f"{figures['chance']:.2f} %) of {len(references):,} questions",
            table="\n".join(
                (
                    vqa.format_table(report, known, references),
                    f"always the best same answer: {figures['chance']:.2f}",
                    *self._reachable(references),
                )
            ),
            **options,
        )

    def _reachable(self, references: dict[int | str, tuple[str, ...]]) -> list[str]:
        """A line on the questions with an answer among those to choose from."""
        if self.config.vqa.method == "generate":
            return []
        known = set(self.config.vqa.candidates)
        reached = sum(not known.isdisjoint(given) for given in references.values())
        of = f"{reached:,} of {len(references):,} questions ({reached / len(references):.1%})"
        return [f"{of} have an answer among the {len(known):,} to choose from"]

    @staticmethod
    def from_data(
        config: ml_collections.ConfigDict, before: ml_collections.ConfigDict | None, source: Source
    ) -> ml_collections.ConfigDict:
        """The answers to rank: those of the run, of the file, or the most frequent in training."""
        of = config.vqa
        if of.candidates:
            return config
        same = ("candidates_file", "candidates_most")
        if before is not None and all(before.vqa[name] == of[name] for name in same):
            return with_fields(config, {"vqa.candidates": before.vqa.candidates})
        counts = Counter(answer for at in range(len(source)) for answer in source.captions(at)[1:])
        if not counts:
            raise UserError(f"{source!r} has no answers to learn: give questions with answers")
        answers = tuple(answer for answer, _ in counts.most_common(of.candidates_most))
        if of.candidates_file:
            answers = _answers_in(of.candidates_file)
        covered = sum(counts[answer] for answer in answers) / counts.total()
        said = f"{len(answers):,} answers to choose from, {covered:.1%} of those in training"
        if covered < LEAST_COVERED:
            raise UserError(
                f"config.vqa.candidates_file={of.candidates_file!r} has {said}: give a list that "
                "was made for these questions, or none"
            )
        say(said)
        return with_fields(config, {"vqa.candidates": answers})

    @staticmethod
    def as_used(
        config: ml_collections.ConfigDict, before: ml_collections.ConfigDict
    ) -> ml_collections.ConfigDict:
        """The answers to rank: those of another file, or so many of the run's as are asked for."""
        of, own = config.vqa, before.vqa
        if of.candidates != own.candidates:  # named one by one
            return config
        if of.candidates_file not in ("", own.candidates_file):
            answers = _answers_in(of.candidates_file)
        elif of.candidates_most != own.candidates_most:
            answers = own.candidates[: of.candidates_most]
        else:
            return config
        common, has = len(set(answers) & set(own.candidates)), len(own.candidates)
        say(f"{len(answers):,} answers to choose from, {common:,} of them among the run's {has:,}")
        return with_fields(config, {"vqa.candidates": answers})


def _answers_in(path: str) -> tuple[str, ...]:
    """The answers of a JSON list, each once."""
    listed = [answer for _, answer in read_json(path)]
    if not all(isinstance(answer, str) for answer in listed) or not listed:
        raise UserError(f'{path} is not a JSON list of answers: give one, as in ["yes", "no"]')
    return tuple(dict.fromkeys(listed))
