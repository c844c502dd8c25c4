"""CODIS assembled: the parts that have a teacher (`Towers`), and those that only the student has.

The student's parameters are {"towers", "matching", "codebook", "temperature"}, a nested dict of
float32 arrays; the teacher's are a second tree like "towers", run through the same graph.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
from flax import nnx
from jaxtyping import Array, Float, Int, Key, PyTree

from codebook_jax.method.numerics import key_of, own_settings, wide_enough
from codebook_jax.models.bert import FusionEncoder, TextEncoder, TextSpec
from codebook_jax.models.heads import MaskedWordHead, MatchingHead
from codebook_jax.models.layers import Compute, Dense
from codebook_jax.models.vit import ImageSpec, VisionTransformer
from codebook_jax.parallel import sharding

Parameters = PyTree[Float[Array, "..."]]


class Towers(nnx.Module):
    """The three encoders, the projections to the joint space, and the masked-word head."""

    def __init__(
        self,
        image: ImageSpec,
        text: TextSpec,
        *,
        dim: int,
        vocabulary_size: int,
        compute: Compute,
        rngs: nnx.Rngs,
    ) -> None:
        self.image = VisionTransformer(image, compute, rngs)
        self.text = TextEncoder(text, vocabulary_size, compute, rngs)
        self.fusion = FusionEncoder(text, image.width, compute, rngs)
        common = dict(dtype=compute.dtype, rngs=rngs)
        self.image_projection = Dense(image.width, dim, std=image.init_std, **common)
        self.text_projection = Dense(text.width, dim, std=text.init_std, **common)
        self.masked_words = MaskedWordHead(
            text.width, vocabulary_size, eps=text.layer_norm_eps, std=text.init_std, **common
        )

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
    mesh: jax.sharding.Mesh | None

    def towers(self, parameters: Parameters) -> Towers:
        """The towers with these parameters, the student's or the teacher's."""
        return nnx.merge(self.towers_graph, nnx.State(sharding.gathered(parameters, self.mesh)))

    def match_logits(
        self, parameters: Parameters, cls: Float[Array, "*some width"]
    ) -> Float[Array, "*some 2"]:
        """Logits of the student's matching head."""
        return nnx.merge(self.matching_graph, nnx.State(parameters))(cls)


def build_model(
    config: ml_collections.ConfigDict, vocabulary_size: int, mesh: jax.sharding.Mesh | None = None
) -> Model:
    """The graphs of the model that `config` describes; allocates nothing."""

    make = lambda: _modules(config, vocabulary_size, nnx.Rngs(params=key_of(0)), mesh)  # noqa: E731
    abstract = nnx.eval_shape(own_settings(make))
    return Model(*(nnx.split(module)[0] for module in abstract), mesh)


def init_student(
    config: ml_collections.ConfigDict, vocabulary_size: int, key: Key[Array, ""]
) -> dict[str, Parameters]:
    """Fresh parameters of the student, float32. Codewords are unit vectors in random directions."""
    tower_key, code_key = jax.random.split(key)
    towers, matching = _modules(config, vocabulary_size, nnx.Rngs(params=tower_key))
    codes = jax.random.normal(code_key, (config.codebook.size, config.model.dim), jnp.float32)
    return {
        "towers": nnx.to_pure_dict(nnx.split(towers)[1]),
        "matching": nnx.to_pure_dict(nnx.split(matching)[1]),
        "codebook": {"codes": unit(codes)},
        "temperature": jnp.float32(config.alignment.temperature),
    }


def unit(x: Float[Array, "*some dim"]) -> Float[Array, "*some dim"]:
    """Rows scaled to length one, in at least float32; zeros stay, with a finite gradient."""
    x = x.astype(wide_enough(x.dtype))
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x * x, axis=-1, keepdims=True), 1e-24))


def _modules(
    config: ml_collections.ConfigDict,
    vocabulary_size: int,
    rngs: nnx.Rngs,
    mesh: jax.sharding.Mesh | None = None,
) -> tuple[Towers, MatchingHead]:
    model, dtype = config.model, jnp.dtype(config.model.dtype)
    image, text = ImageSpec(**model.image.to_dict()), TextSpec(**model.text.to_dict())
    attention = model.attention
    if attention == "auto":
        attention = "cudnn" if jax.default_backend() == "gpu" and dtype.itemsize == 2 else "xla"
    compute = Compute(dtype, model.remat, model.scan_unroll, attention, mesh)
    sizes = dict(dim=model.dim, vocabulary_size=vocabulary_size)
    towers = Towers(image, text, **sizes, compute=compute, rngs=rngs)
    return towers, MatchingHead(text.width, std=text.init_std, rngs=rngs)
