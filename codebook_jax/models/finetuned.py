"""Networks of the downstream tasks: the pre-trained encoders with a head, or a decoder of answers.

Their parameters are nested dicts of float32 arrays, {"towers", "head"} or {"towers", "decoder"},
with the names of pre-training below "towers", so that its weights fit. Source: Li et al. 2021, 4.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
from flax import nnx
from jaxtyping import Array, Float, Int, Key, PyTree
from ml_collections import ConfigDict

from codebook_jax.method.numerics import key_of, own_settings
from codebook_jax.models.bert import (
    DropoutKey,
    Embeddings,
    FusionBlock,
    FusionEncoder,
    Seen,
    States,
    TextEncoder,
    TwoImageFusion,
)
from codebook_jax.models.codis import MaskedWordHead, compute_of
from codebook_jax.models.layers import Compute, Dense, keys_of, scan, stack
from codebook_jax.models.vit import VisionTransformer
from codebook_jax.parallel import sharding

Pixels = Float[Array, "rows pictures side side 3"]
AnswerTokens = Int[Array, "rows answers tokens"]


class Encoders(nnx.Module):
    """The image, text and fusion encoders of pre-training, for texts about one or two pictures."""

    def __init__(
        self,
        model: ConfigDict,
        vocabulary_size: int,
        compute: Compute,
        rngs: nnx.Rngs,
        *,
        pictures: int,
    ) -> None:
        fusion = TwoImageFusion if pictures == 2 else FusionEncoder
        self.image = VisionTransformer(model.image, compute, rngs)
        self.text = TextEncoder(model.text, vocabulary_size, compute, rngs)
        self.fusion = fusion(model.text, model.image.width, compute, rngs)
        self.pictures = pictures

    def __call__(
        self,
        pixels: Pixels,
        tokens: Int[Array, "rows tokens"],
        lengths: Int[Array, " rows"],
        key: DropoutKey = None,
    ) -> States:
        """The states of each row's text with its pictures; with a `key`, dropped out."""
        text_key, fusion_key = keys_of(key, 2)
        seen = self.image(pixels.reshape(-1, *pixels.shape[2:]))
        if self.pictures == 2:
            seen = seen.reshape(-1, 2, *seen.shape[1:])
        states = self.text(tokens, lengths, text_key)
        return self.fusion(states[:, None], lengths[:, None], seen, key=fusion_key)[:, 0]


class ClassHead(nnx.Module):
    """Two dense layers around a ReLU, in at least float32: a logit for each class."""

    def __init__(self, width: int, classes: int, *, std: float, rngs: nnx.Rngs) -> None:
        self.hidden = Dense(width, width, std=std, dtype=None, rngs=rngs)
        self.classes = Dense(width, classes, std=std, dtype=None, rngs=rngs)

    def __call__(self, cls: Float[Array, "*some width"]) -> Float[Array, "*some classes"]:
        return self.classes(jax.nn.relu(self.hidden(cls)))


class Classifier(nnx.Module):
    """Which class a text and its pictures belong to, from the state of their first token."""

    def __init__(
        self,
        config: ConfigDict,
        vocabulary_size: int,
        compute: Compute,
        rngs: nnx.Rngs,
        *,
        pictures: int,
        classes: int,
    ) -> None:
        model = config.model
        self.towers = Encoders(model, vocabulary_size, compute, rngs, pictures=pictures)
        self.head = ClassHead(model.text.width, classes, std=model.text.init_std, rngs=rngs)

    def __call__(
        self,
        pixels: Pixels,
        tokens: Int[Array, "rows tokens"],
        lengths: Int[Array, " rows"],
        key: DropoutKey = None,
    ) -> Float[Array, "rows classes"]:
        return self.head(self.towers(pixels, tokens, lengths, key)[:, 0])


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


class Network:
    """The graph of a task's network; parameters are arguments."""

    def __init__(
        self,
        make: Callable[[Compute, nnx.Rngs], nnx.Module],
        config: ConfigDict,
        mesh: jax.sharding.Mesh | None = None,
    ) -> None:
        compute = compute_of(config.model, mesh)
        self._make = lambda key: make(compute, nnx.Rngs(params=key))
        self._graph = nnx.graphdef(nnx.eval_shape(own_settings(self._make), key_of(0)))
        self.dtype, self.mesh = compute.dtype, mesh

    def init(self, key: Key[Array, ""]) -> dict[str, PyTree]:
        """Fresh parameters, float32."""
        return nnx.to_pure_dict(nnx.state(self._make(key)))

    def __call__(self, parameters: PyTree) -> nnx.Module:
        """The network with these parameters."""
        return nnx.merge(self._graph, nnx.State(sharding.gathered(parameters, self.mesh)))
