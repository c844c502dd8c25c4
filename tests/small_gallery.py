"""A source, a tokenizer and a model that are known by heart, for evaluations of retrieval."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from codebook_jax.data.images import UnreadableImage
from codebook_jax.data.sources import Example, Record
from codebook_jax.evaluation import retrieval
from codebook_jax.evaluation.predicting import predict
from codebook_jax.evaluation.rerank import Scoring
from codebook_jax.evaluation.stage import IN_MEMORY
from codebook_jax.parallel import sharding
from configs import base

SIDE, TOKENS = 6, 5


class Numbers:
    """Images of one value each, with one or two captions that spell a number; some images cannot be
    read.
    """

    def __init__(self, count: int, broken: tuple[int, ...] = ()) -> None:
        self.count, self.listed, self.broken = count, count, broken
        self.read: list[int] = []

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Record:
        self.read.append(index)
        if index in self.broken:
            raise UnreadableImage(f"{index}.png: truncated")
        image = np.full((SIDE, SIDE, 3), index, np.uint8)
        return Record(image, (str(index),) * (1 + index % 2), 100 + index)


class Digits:
    def encode(self, captions, max_tokens):
        tokens = np.zeros((len(captions), max_tokens), np.int32)
        tokens[:, 0] = [int(caption or 0) for caption in captions]
        return tokens, np.full(len(captions), 1, np.int32), 0


class Oracle:
    """Towers whose features are noise around the truth, and a matching head that knows it."""

    def __init__(self, mesh, noise: float = 0.0) -> None:
        self.mesh, self.noise = mesh, noise
        self.encode_images = jax.jit(self._encode_images)
        self.encode_texts = jax.jit(self._encode_texts)
        self.match = jax.jit(self._match)

    def _feature(self, number, salt):
        angle = 2 * jnp.pi * number / 64 + self.noise * jnp.sin(97.0 * number + salt)
        return jnp.stack([jnp.cos(angle), jnp.sin(angle)], axis=-1)

    def _encode_images(self, towers, images):
        number = images[:, 0, 0, 0].astype(jnp.float32)
        return self._feature(number, towers), jnp.broadcast_to(
            number[:, None, None], (len(images), 3, 1)
        )

    def _encode_texts(self, towers, tokens, lengths):
        number = tokens[:, 0].astype(jnp.float32)
        return self._feature(number, towers + 1), jnp.broadcast_to(
            number[:, None, None], (*tokens.shape, 1)
        )

    def _match(self, image_tokens, states, lengths):
        return -jnp.abs(image_tokens[:, :1, 0] - states[:, :, 0, 0])


def config_of(**changes):
    config = base.paper("tiny")
    config.update_from_flattened_dict(
        {
            "model.image.size_px": SIDE,
            "model.text.max_tokens": TOKENS,
            "evaluation.batch": 8,
            "evaluation.rerank_top_k": 7,
        }
        | changes
    )
    return config


def evaluate(
    source,
    *,
    noise=0.3,
    rerank=True,
    images=0,
    cosine_weight=0.0,
    books=IN_MEMORY,
    tensor=1,
    **changes,
):
    oracle = Oracle(sharding.make_mesh(-1, 1, tensor), noise)
    return retrieval.evaluate(
        oracle,
        {"student": 0.0, "teacher": 2.0},
        source,
        Digits(),
        config_of(**changes),
        images=images,
        scoring=Scoring(oracle.match, cosine_weight) if rerank else None,
        books=books,
    )


class Pairs(Numbers):
    """Examples of two such images, with the second one's number as their text."""

    evaluated = "examples"

    def __getitem__(self, index: int) -> Example:
        first, second = (super(Pairs, self).__getitem__(at) for at in (index, index + 1))
        return Example((first.image, second.image), str(index + 1), (), index, index)


def predicted(broken, tensor=1):
    """The outputs for 11 examples, of which some cannot be read, as lists; and what was read."""
    source, mesh = Pairs(11, broken), sharding.make_mesh(-1, 1, tensor)

    @jax.jit
    def program(images, tokens, lengths):
        return {"first": images[:, 0, 0, 0, 0], "second": images[:, 1, 0, 0, 0], "text": tokens}

    config = config_of(**{"evaluation.batch": 8, "model.text.max_tokens": 1})
    found = predict(program, source, Digits(), config, mesh, images=0, pictures=2)
    rows = zip(*(found.outputs[name].ravel().tolist() for name in found.outputs), strict=True)
    keys = [
        [example.key, example.text, *size]
        for example, size in zip(found.examples, found.sizes, strict=True)
    ]
    return [keys, list(map(list, rows)), found.left_out], sorted(set(source.read))
