"""Visual question answering: a decoder reads the fused question, and ranks answers or writes one.

Answers are learned in proportion to how many people gave them, and ranked as ALBEF ranks them: the
most probable first words are short-listed, and of those answers the likeliest is taken.
Source: Li et al. 2021, 4.3.
"""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from codebook_jax.config import COMMON, FINETUNING, VQA, check_fields
from codebook_jax.data.examples import ExampleSpec
from codebook_jax.evaluation.predicting import Predicted
from codebook_jax.models.finetuned import AnswerDecoder, Answerer, Question
from codebook_jax.models.layers import Compute, keys_of
from codebook_jax.tasks import limits
from codebook_jax.tasks.finetune import FITTING, FinetuneState, Finetuning, Rows
from codebook_jax.tasks.task import Evaluation

Scores = tuple[Int[Array, "rows shortlist"], Float[Array, "rows shortlist"]]


class Answering(Finetuning):
    """The jitted programs of a run; holds no parameters."""

    reads = "questions"

    @staticmethod
    def check(config: ml_collections.ConfigDict) -> None:
        """Raises UserError, naming the fields, if no run of the task can start with this config."""
        check_fields(config, COMMON | FINETUNING | VQA)
        limits.check_fitting(config, FITTING)

    @staticmethod
    def network_of(
        config: ml_collections.ConfigDict, vocabulary_size: int, compute: Compute, rngs: nnx.Rngs
    ) -> Answerer:
        """The encoders and a decoder of answers."""
        return Answerer(config, vocabulary_size, compute, rngs)

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

    def judged(self, found: Predicted) -> Evaluation:
        """Accuracy."""
        raise NotImplementedError

    def predicted(self, network, pixels, tokens, lengths):
        raise NotImplementedError


def chosen(log_p: Float[Array, "*some vocab"], words: Int[Array, "*some"]) -> Float[Array, "*some"]:
    """The entry of each word."""
    return jnp.take_along_axis(log_p, words[..., None], axis=-1)[..., 0]


def rank_answers(
    decoder: AnswerDecoder,
    question: Question,
    candidates: Int[np.ndarray, "candidates tokens"],
    *,
    shortlist: int,
    pad_id: int,
) -> Scores:
    """The candidates with the likeliest first words, likeliest answer first, and the probability of
    each among them.

    An answer's score is the log-likelihood of its words plus, as in ALBEF's code, that of its first
    once more. Tokens are [CLS] words [SEP], padded.
    """
    start = jnp.broadcast_to(candidates[0, :1], (len(question.states), 1, 1))
    first = jax.nn.log_softmax(decoder(start, question)[:, 0, 0])[:, candidates[:, 1]]
    first, numbers = jax.lax.top_k(first, min(shortlist, len(candidates)))

    def likelihoods(row: tuple[Question, Int[Array, " shortlist"]]) -> Float[Array, " shortlist"]:
        """Of one question: the logits of all would not fit."""
        own, numbers = jax.tree.map(lambda x: x[None], row)
        tokens = jnp.asarray(candidates)[numbers]
        words = tokens[..., 1:]
        log_p = jax.nn.log_softmax(decoder(tokens[..., :-1], own))
        return jnp.where(words != pad_id, chosen(log_p, words), 0).sum(axis=-1)[0]

    scores = first + jax.lax.map(likelihoods, (question, numbers))
    scores, order = jax.lax.top_k(scores, scores.shape[1])
    return jnp.take_along_axis(numbers, order, axis=1), jax.nn.softmax(scores)
