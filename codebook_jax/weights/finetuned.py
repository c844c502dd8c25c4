"""Fine-tuned models, each with the verb of its task."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float, Float32, Int, UInt8
from ml_collections import ConfigDict

from codebook_jax.data import augment
from codebook_jax.data.text import Tokenizer
from codebook_jax.errors import UserError
from codebook_jax.method.numerics import own_settings
from codebook_jax.models.answers import rank_answers
from codebook_jax.models.finetuned import LABELS, Network
from codebook_jax.weights.inputs import Picture, Pictures, Texts, picture_list, text_list
from codebook_jax.weights.loaded import Loaded, Tokenised, chunks


class Labelled(NamedTuple):
    """The probability of each label for every input."""

    labels: tuple[str, ...]
    probabilities: Float32[np.ndarray, "inputs labels"]

    @property
    def best(self) -> list[str]:
        """The most probable label of every input."""
        return [self.labels[place] for place in self.probabilities.argmax(axis=1)]


class Answers(NamedTuple):
    """The likeliest answers to each question, likeliest first."""

    texts: list[tuple[str, ...]]
    probabilities: Float32[np.ndarray, "questions top_k"]  # among the short-listed answers


class Finetuned(Loaded):
    """A model of one task, on texts about one or two images."""

    def __init__(
        self, config: ConfigDict, tokenizer: Tokenizer, items: dict[str, Any], step: int
    ) -> None:
        super().__init__(config, tokenizer, items, step)
        self._network = Network(config, tokenizer.vocabulary.size)
        self._program = jax.jit(own_settings(self._outputs))

    def __repr__(self) -> str:
        return f"{type(self).__name__}(size {self.config.size}, step {self.step:,})"

    def _outputs(
        self,
        student: Any,
        images: UInt8[Array, "rows images side side 3"],
        tokens: Int[Array, "rows tokens"],
        lengths: Int[Array, " rows"],
    ) -> Float[Array, "rows labels"]:
        network = self._network(student)
        return jax.nn.softmax(network(self._pixels(images), tokens, lengths))

    def _pixels(self, images: Array) -> Array:
        return augment.normalise(images, self._network.dtype)

    def _run(self, texts: list[str], *sides: list[Picture]) -> Iterator[tuple[np.ndarray, ...]]:
        """The program's outputs for texts and the images of each side, in chunks."""
        texts, *sides = _as_many(texts, *sides)
        return self._run_on(self._tokenised(texts), *sides)

    def _run_on(
        self, tokenised: Tokenised, *sides: list[Picture]
    ) -> Iterator[tuple[np.ndarray, ...]]:
        """The same for texts as tokens, and as many images."""
        tokens, lengths = tokenised
        pictures = zip(*map(self._pixel_chunks, sides), strict=True)
        for (rows, count), each in zip(chunks(len(tokens)), pictures, strict=True):
            images = np.stack([pixels for pixels, _ in each], axis=1)
            found = self._program(self._items["student"], images, tokens[rows], lengths[rows])
            yield jax.tree.map(lambda x: np.asarray(x)[:count], found)  # noqa: B023


class Entailing(Finetuned):
    """Says whether images make sentences true."""

    def entails(self, images: Pictures, texts: Texts) -> Labelled:
        """Whether image i makes text i true (entailment), false (contradiction), or neither.

        A single image is taken for every text, a single text for every image.
        """
        found = self._run(text_list(texts), picture_list(images))
        return Labelled(LABELS["entailment"], np.concatenate(list(found)))


class Comparing(Finetuned):
    """Says whether sentences about two images are true."""

    def compare(
        self, images_a: Pictures, images_b: Pictures, texts: Texts
    ) -> Float32[np.ndarray, " texts"]:
        """The probability that text i is true of images i of both, `images_a` being the left ones.

        A single image or text is taken for every other.
        """
        found = self._run(text_list(texts), picture_list(images_a), picture_list(images_b))
        return np.concatenate(list(found))[:, LABELS["nlvr2"].index("true")]


class Answering(Finetuned):
    """Answers questions about images."""

    def answer(self, images: Pictures, questions: Texts, top_k: int = 1) -> Answers:
        """The `top_k` likeliest of the model's answers to question i about image i, by ranking them
        whatever `vqa.method` is.

        A single image is taken for every question, a single question for every image.
        """
        candidates = self.config.vqa.candidates
        most = min(len(candidates), self.config.vqa.shortlist)
        if not isinstance(top_k, int | np.integer) or not 1 <= top_k <= most:
            raise UserError(
                f"top_k={top_k!r} is not a whole number between 1 and {most:,}, as many answers as "
                "the model compares"
            )
        found = self._run(text_list(questions), picture_list(images))
        numbers, probabilities = map(np.concatenate, zip(*found, strict=True))
        texts = [tuple(candidates[at] for at in row) for row in numbers[:, :top_k]]
        return Answers(texts, probabilities[:, :top_k])

    def _outputs(
        self,
        student: Any,
        images: UInt8[Array, "rows 1 side side 3"],
        tokens: Int[Array, "rows tokens"],
        lengths: Int[Array, " rows"],
    ) -> tuple[Int[Array, "rows shortlist"], Float[Array, "rows shortlist"]]:
        network, of = self._network(student), self.config.vqa
        return rank_answers(
            network.decoder,
            network.ask(self._pixels(images), tokens, lengths),
            self._tokenizer.encode(of.candidates, of.answer_tokens).tokens,
            shortlist=of.shortlist,
            pad_id=self._tokenizer.vocabulary.pad_id,
        )


class Labelling(Finetuned):
    """Tells labels of images."""

    def classify(self, images: Pictures) -> Labelled:
        """The probability of each label that the model has learned."""
        pictures, names = picture_list(images), tuple(self.config.labels.names)
        if not pictures:
            raise UserError("there is nothing to do: give at least one image")
        unread = np.zeros((len(pictures), 1), np.int32)
        found = self._run_on((unread, np.ones(len(pictures), np.int32)), pictures)
        return Labelled(names, np.concatenate(list(found)))


# By config.task.
FINETUNED = {"entailment": Entailing, "nlvr2": Comparing, "vqa": Answering, "labels": Labelling}


def _as_many(texts: list[str], *sides: list[Picture]) -> tuple[list, ...]:
    """Texts and the images of each side, a single one as often as there are others; raises
    UserError if there are other numbers of them.
    """
    given = (texts, *sides)
    if not all(given):
        raise UserError("there is nothing to do: give at least one image and one text")
    most = max(map(len, given))
    if any(len(each) not in (1, most) for each in given):
        images = " and ".join(str(len(side)) for side in sides)
        raise UserError(
            f"{images} images and {len(texts)} texts cannot be paired: give as many images as "
            "texts, or one of either"
        )
    return tuple(each * most if len(each) == 1 else each for each in given)
