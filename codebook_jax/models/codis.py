"""CODIS assembled: the parts that have a teacher (`Towers`), and those that only the student has.

The student's parameters are {"towers", "matching", "codebook", "temperature"}, a nested dict of
float32 arrays; the teacher's are a second tree like "towers", run through the same graph.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Key, PyTree, UInt8
from ml_collections import ConfigDict

from codebook_jax.data import augment
from codebook_jax.method.numerics import key_of, own_settings, wide_enough
from codebook_jax.models.bert import FusionEncoder, TextEncoder
from codebook_jax.models.heads import MaskedWordHead, MatchingHead
from codebook_jax.models.layers import Compute, Dense
from codebook_jax.models.vit import VisionTransformer
from codebook_jax.parallel import sharding

Parameters = PyTree[Float[Array, "..."]]


class Towers(nnx.Module):
    """The three encoders, the projections to the joint space, and the masked-word head."""

    def __init__(
        self, model: ConfigDict, vocabulary_size: int, compute: Compute, rngs: nnx.Rngs
    ) -> None:
        image, text, common = model.image, model.text, dict(dtype=compute.dtype, rngs=rngs)
        self.image = VisionTransformer(image, compute, rngs)
        self.text = TextEncoder(text, vocabulary_size, compute, rngs)
        self.fusion = FusionEncoder(text, image.width, compute, rngs)
        self.image_projection = Dense(image.width, model.dim, std=image.init_std, **common)
        self.text_projection = Dense(text.width, model.dim, std=text.init_std, **common)
        self.masked_words = MaskedWordHead(text, vocabulary_size, compute, rngs)

    def embed_images(
        self, images: Float[Array, "images side side 3"]
    ) -> tuple[Float[Array, "images dim"], Float[Array, "images patches width"]]:
        """Unit features of normalised images in at least float32, and their tokens."""
        tokens = self.image(images)
        return unit(self.image_projection(tokens[:, 0])), tokens

    def embed_texts(
        self,
        tokens: Int[Array, "texts tokens"],
        lengths: Int[Array, "texts"],
        key: Key[Array, ""] | None = None,
    ) -> tuple[Float[Array, "texts dim"], Float[Array, "texts tokens width"]]:
        """Unit features of texts in at least float32, and the states of their tokens."""
        states = self.text(tokens, lengths, key)
        return unit(self.text_projection(states[:, 0])), states

    def word_logits(self, states: Float[Array, "*some width"]) -> Float[Array, "*some vocab"]:
        """Float32 logits of the word at each fused state."""
        return self.masked_words(states, self.text.words[...])


class Model(NamedTuple):
    """The graphs of one size and vocabulary; parameters are arguments."""

    towers_graph: nnx.GraphDef[Towers]
    matching_graph: nnx.GraphDef[MatchingHead]
    dtype: jnp.dtype
    mesh: jax.sharding.Mesh | None

    def towers(self, parameters: Parameters) -> Towers:
        """The towers with these parameters, the student's or the teacher's."""
        return nnx.merge(self.towers_graph, nnx.State(sharding.gathered(parameters, self.mesh)))

    def match_logits(
        self, parameters: Parameters, cls: Float[Array, "*some width"]
    ) -> Float[Array, "*some 2"]:
        """Logits of the student's matching head."""
        return nnx.merge(self.matching_graph, nnx.State(parameters))(cls)


class Programs:
    """A model's encoders, compiled, and its matching; parameters are arguments."""

    def __init__(self, model: Model) -> None:
        self.model, self.mesh = model, model.mesh
        self.encode_images = jax.jit(own_settings(self._encode_images))
        self.encode_texts = jax.jit(own_settings(self._encode_texts))

    def pixels(
        self, images: UInt8[Array, "images side side 3"]
    ) -> Float[Array, "images side side 3"]:
        """Images as the encoders expect them, in the model's type."""
        return augment.normalise(images, self.model.dtype)

    def pair_logits(
        self,
        student: Parameters,
        image_tokens: Float[Array, "rows patches width"],
        states: Float[Array, "rows texts tokens width"],
        lengths: Int[Array, "rows texts"],
    ) -> Float[Array, "rows texts 2"]:
        """Logits of the matching of each image with each text of its row."""
        fused = self.model.towers(student["towers"]).fusion(states, lengths, image_tokens)
        return self.model.match_logits(student["matching"], fused[:, :, 0])

    def _encode_images(
        self, towers: Parameters, images: UInt8[Array, "rows side side 3"]
    ) -> tuple[Float[Array, "rows dim"], Float[Array, "rows patches width"]]:
        return self.model.towers(towers).embed_images(self.pixels(images))

    def _encode_texts(
        self, towers: Parameters, tokens: Int[Array, "rows tokens"], lengths: Int[Array, "rows"]
    ) -> tuple[Float[Array, "rows dim"], Float[Array, "rows tokens width"]]:
        return self.model.towers(towers).embed_texts(tokens, lengths)


def build_model(
    config: ConfigDict, vocabulary_size: int, mesh: jax.sharding.Mesh | None = None
) -> Model:
    """The graphs of the model that `config` describes; allocates nothing."""
    make = own_settings(functools.partial(_modules, config, vocabulary_size, mesh))
    towers, matching = nnx.eval_shape(make, key_of(0))
    return Model(nnx.graphdef(towers), nnx.graphdef(matching), jnp.dtype(config.model.dtype), mesh)


def init_student(
    config: ConfigDict, vocabulary_size: int, key: Key[Array, ""]
) -> dict[str, Parameters]:
    """Fresh parameters of the student, float32. Codewords are unit vectors in random directions."""
    tower_key, code_key = jax.random.split(key)
    towers, matching = _modules(config, vocabulary_size, None, tower_key)
    codes = jax.random.normal(code_key, (config.codebook.size, config.model.dim), jnp.float32)
    return {
        "towers": nnx.to_pure_dict(nnx.state(towers)),
        "matching": nnx.to_pure_dict(nnx.state(matching)),
        "codebook": {"codes": unit(codes)},
        "temperature": jnp.float32(config.alignment.temperature),
    }


def unit(x: Float[Array, "*some dim"]) -> Float[Array, "*some dim"]:
    """Rows scaled to length one, in at least float32; zeros stay, with a finite gradient."""
    x = x.astype(wide_enough(x.dtype))
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x * x, axis=-1, keepdims=True), 1e-24))


def _modules(
    config: ConfigDict, vocabulary_size: int, mesh: jax.sharding.Mesh | None, key: Key[Array, ""]
) -> tuple[Towers, MatchingHead]:
    model, rngs, dtype = config.model, nnx.Rngs(params=key), jnp.dtype(config.model.dtype)
    attention = model.attention
    if attention == "auto":
        attention = "cudnn" if jax.default_backend() == "gpu" and dtype.itemsize == 2 else "xla"
    compute = Compute(dtype, model.remat, model.scan_unroll, attention, mesh)
    towers = Towers(model, vocabulary_size, compute, rngs)
    return towers, MatchingHead(model.text.width, std=model.text.init_std, rngs=rngs)
