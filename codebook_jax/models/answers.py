"""Answers to questions about a picture: a decoder that learns, ranks and writes them.

Source: Li et al. 2021, 4.3.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int
from ml_collections import ConfigDict

from codebook_jax.data.text import Vocabulary
from codebook_jax.models.bert import DropoutKey, Embeddings, FusionBlock, Seen, States
from codebook_jax.models.codis import MaskedWordHead
from codebook_jax.models.encoders import Encoders, Pixels
from codebook_jax.models.layers import Compute, scan, stack

AnswerTokens = Int[Array, "rows answers tokens"]
# Numbers of candidates, the likeliest first, and their probabilities.
Scores = tuple[Int[Array, "rows shortlist"], Float[Array, "rows shortlist"]]


class Question(NamedTuple):
    """What an answer is decoded from."""

    states: States
    lengths: Int[Array, " rows"]


class AnswerDecoder(Embeddings):
    """A causal BERT that attends to the states of a question, with an output layer tied to its
    word embeddings.
    """

    def __init__(
        self, spec: ConfigDict, depth: int, vocabulary_size: int, compute: Compute, rngs: nnx.Rngs
    ) -> None:
        super().__init__(spec, vocabulary_size, compute, rngs)
        self.blocks = stack(lambda r: FusionBlock(spec, spec.width, compute, r), depth, rngs)
        self.output = MaskedWordHead(spec, vocabulary_size, compute, rngs)
        self.depth = depth

    @jax.named_scope("answers")
    def __call__(
        self, tokens: AnswerTokens, question: Question, key: DropoutKey = None
    ) -> Float[Array, "rows answers tokens vocab"]:
        """Logits of the word after each token of each answer to a row's question."""
        block_keys = embedding_key = None
        if key is not None:
            keys = jax.random.split(key, self.depth + 1)
            block_keys, embedding_key = keys[: self.depth], keys[self.depth]

        def apply(block: FusionBlock, x: Array, key: DropoutKey) -> Array:
            keys_values = block.cross.key_value.parts(question.states)
            return block(x, None, Seen(keys_values, question.lengths), key)

        x = scan(self.blocks, apply, self.embed(tokens, embedding_key), block_keys, self.compute)
        return self.output(x, self.words[...])


class Answerer(nnx.Module):
    """Answers to questions about a picture."""

    def __init__(
        self, config: ConfigDict, vocabulary_size: int, compute: Compute, rngs: nnx.Rngs
    ) -> None:
        model, depth = config.model, config.vqa.decoder_depth
        self.towers = Encoders(model, vocabulary_size, compute, rngs, pictures=1)
        self.decoder = AnswerDecoder(model.text, depth, vocabulary_size, compute, rngs)

    def ask(
        self,
        pixels: Pixels,
        tokens: Int[Array, "rows tokens"],
        lengths: Int[Array, " rows"],
        key: DropoutKey = None,
    ) -> Question:
        """What the decoder reads of each row's question and picture."""
        return Question(self.towers(pixels, tokens, lengths, key), lengths)


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


def write_answers(
    decoder: AnswerDecoder, question: Question, vocabulary: Vocabulary, *, tokens: int
) -> Int[Array, "rows tokens"]:
    """The likeliest word after word, from [CLS] to [SEP], padded."""
    rows = len(question.states)
    answers = jnp.full((rows, tokens), vocabulary.pad_id, jnp.int32).at[:, 0].set(vocabulary.cls_id)

    def longer(place: Int[Array, ""], answers: Int[Array, "rows tokens"]) -> Array:
        logits = decoder(answers[:, None, :-1], question)[:, 0, place - 1]
        word = logits.argmax(axis=-1).astype(jnp.int32)
        before = answers[:, place - 1]
        ended = (before == vocabulary.sep_id) | (before == vocabulary.pad_id)
        return answers.at[:, place].set(jnp.where(ended, vocabulary.pad_id, word))

    return jax.lax.fori_loop(1, tokens, longer, answers)
