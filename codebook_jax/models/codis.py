"""CODIS assembled: the parts that have a teacher (`Towers`), and those that only the student has.

The student's parameters are {"towers", "matching", "codebook", "temperature"}, a nested dict of
float32 arrays; the teacher's are a second tree like "towers". Both run through one graph
definition, so nothing here holds state.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from codebook_jax.method.numerics import key_of, own_settings, wide_enough
from codebook_jax.models.bert import FusionEncoder, TextEncoder
from codebook_jax.models.heads import MaskedWordHead, MatchingHead
from codebook_jax.models.layers import Compute, Dense
from codebook_jax.models.vit import VisionTransformer
from codebook_jax.parallel import sharding

_TEXT_ONLY = (
    "depth",
    "max_positions",
    "value_std",
    "embedding_std",
)  # fields of the text encoder that fusion does not use


class Towers(nnx.Module):
    """Image, text and fusion encoder, the projections to the joint space and the masked-word
    head.
    """

    def __init__(
        self,
        *,
        image: dict[str, Any],
        text: dict[str, Any],
        dim: int,
        vocabulary_size: int,
        compute: Compute,
        rngs: nnx.Rngs,
    ) -> None:
        of = dict(compute=compute, rngs=rngs)
        fusion = {name: value for name, value in text.items() if name not in _TEXT_ONLY}
        fusion["depth"] = fusion.pop("fusion_depth")
        text = {name: value for name, value in text.items() if name != "fusion_depth"}
        self.image = VisionTransformer(**image, **of)
        self.text = TextEncoder(vocabulary_size=vocabulary_size, **text, **of)
        self.fusion = FusionEncoder(image_width=image["width"], **fusion, **of)
        of = dict(dtype=compute.dtype, rngs=rngs)
        self.image_projection = Dense(image["width"], dim, std=image["init_std"], **of)
        self.text_projection = Dense(text["width"], dim, std=text["init_std"], **of)
        self.masked_words = MaskedWordHead(
            text["width"], vocabulary_size, eps=text["layer_norm_eps"], std=text["init_std"], **of
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

    towers_graph: Any
    matching_graph: Any
    mesh: jax.sharding.Mesh | None

    def towers(self, parameters: Any) -> Towers:
        """The towers with these parameters, the student's or the teacher's."""
        return nnx.merge(self.towers_graph, nnx.State(sharding.gathered(parameters, self.mesh)))

    def match_logits(
        self, parameters: Any, cls: Float[Array, "*some width"]
    ) -> Float[Array, "*some 2"]:
        """Logits of the student's matching head."""
        return nnx.merge(self.matching_graph, nnx.State(parameters))(cls)


def build_model(
    config: ml_collections.ConfigDict, vocabulary_size: int, mesh: jax.sharding.Mesh | None = None
) -> Model:
    """The graphs of the model that `config` describes, for parameters split over `mesh`; allocates
    nothing.
    """

    def modules() -> tuple[nnx.Module, ...]:
        return _modules(config, vocabulary_size, nnx.Rngs(params=key_of(0)), mesh)

    abstract = nnx.eval_shape(own_settings(modules))
    return Model(*(nnx.split(module)[0] for module in abstract), mesh)


def init_student(
    config: ml_collections.ConfigDict, vocabulary_size: int, key: Key[Array, ""]
) -> dict[str, Any]:
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
    """Rows scaled to length one, in at least float32; a row of zeros stays zero, with a finite
    gradient.
    """
    x = x.astype(wide_enough(x.dtype))
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x * x, axis=-1, keepdims=True), 1e-24))


def compute_of(config: ml_collections.ConfigDict, mesh: jax.sharding.Mesh | None) -> Compute:
    """How `config.model` asks the towers to compute; "auto" attention is cuDNN's on a GPU in
    bfloat16.
    """
    dtype = jnp.dtype(config.model.dtype)
    attention = config.model.attention
    if attention == "auto":
        attention = "cudnn" if jax.default_backend() == "gpu" and dtype.itemsize == 2 else "xla"
    return Compute(dtype, config.model.remat, config.model.scan_unroll, attention, mesh)


def _modules(
    config: ml_collections.ConfigDict,
    vocabulary_size: int,
    rngs: nnx.Rngs,
    mesh: jax.sharding.Mesh | None = None,
) -> tuple[Towers, MatchingHead]:
    model = config.model
    text = model.text.to_dict()
    del text["max_tokens"]  # a length, not a parameter
    towers = Towers(
        image=model.image.to_dict(),
        text=text,
        dim=model.dim,
        vocabulary_size=vocabulary_size,
        compute=compute_of(config, mesh),
        rngs=rngs,
    )
    return towers, MatchingHead(model.text.width, std=model.text.init_std, rngs=rngs)
