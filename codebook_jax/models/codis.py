"""CODIS assembled: the parts that have a teacher (`Towers`), and those that only the student has.

The student's parameters are {"towers", "matching", "codebook", "temperature"}, a nested dict of
float32 arrays; the teacher's are a second tree like "towers", run through the same graph. Without
fusion layers there are no heads for matching and masked words, without codewords no codebook.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Key, PyTree, UInt8
from ml_collections import ConfigDict

from codebook_jax.data import augment
from codebook_jax.method.modules import init_codes
from codebook_jax.method.numerics import key_of, own_settings, unit, wide_enough
from codebook_jax.models.bert import DropoutKey, FusionEncoder, TextEncoder
from codebook_jax.models.layers import Compute, Dense, LayerNorm, gelu
from codebook_jax.models.vit import VisionTransformer
from codebook_jax.parallel import sharding
from codebook_jax.parallel.memory import remats_of

# Unit features in at least float32, and the states of all tokens.
Encoded = tuple[Float[Array, "rows dim"], Float[Array, "rows tokens width"]]
MATCH = 1  # the class of a matching pair (ALBEF)
Parameters = PyTree[Float[Array, "..."]]


class MaskedWordHead(nnx.Module):
    """A transform, then the word embeddings as output layer, and a bias (Devlin et al., 2019)."""

    def __init__(
        self, spec: ConfigDict, vocabulary_size: int, compute: Compute, rngs: nnx.Rngs
    ) -> None:
        width, self.dtype = spec.width, compute.dtype
        self.transform = Dense(width, width, std=spec.init_std, dtype=compute.dtype, rngs=rngs)
        self.norm = LayerNorm(spec, compute, rngs)
        self.bias = nnx.Param(jnp.zeros((vocabulary_size,), jnp.float32))

    @jax.named_scope("words")
    def __call__(
        self, states: Float[Array, "*some width"], words: Float[Array, "vocab width"]
    ) -> Float[Array, "*some vocab"]:
        """Logits over the vocabulary, in at least float32."""
        x, words = self.norm(gelu(self.transform(states))), words.astype(self.dtype)
        wide = wide_enough(self.dtype)
        return jnp.einsum("...w,vw->...v", x, words, preferred_element_type=wide) + self.bias[...]


class MatchingHead(nnx.Module):
    """Two logits of a pair from its [CLS] state, in at least float32 (Li et al. 2021, 3.2)."""

    def __init__(self, width: int, *, std: float, rngs: nnx.Rngs) -> None:
        self.classes = Dense(width, 2, std=std, dtype=None, rngs=rngs)

    @jax.named_scope("matching")
    def __call__(self, cls: Float[Array, "*some width"]) -> Float[Array, "*some 2"]:
        return self.classes(cls)


class Towers(nnx.Module):
    """The encoders, the projections to the joint space, and the masked-word head, which reads the
    fusion encoder: with `fusion_depth` 0 both are None.
    """

    def __init__(
        self, model: ConfigDict, vocabulary_size: int, compute: Compute, rngs: nnx.Rngs
    ) -> None:
        image, text, common = model.image, model.text, dict(dtype=compute.dtype, rngs=rngs)
        self.pool = model.pool
        self.image = VisionTransformer(image, compute, rngs)
        self.text = TextEncoder(text, vocabulary_size, compute, rngs)
        fused = text.fusion_depth > 0
        self.fusion = FusionEncoder(text, image.width, compute, rngs) if fused else None
        self.image_projection = Dense(image.width, model.dim, std=image.init_std, **common)
        self.text_projection = Dense(text.width, model.dim, std=text.init_std, **common)
        head = MaskedWordHead(text, vocabulary_size, compute, rngs) if fused else None
        self.masked_words = head

    def embed_images(self, images: Float[Array, "rows side side 3"]) -> Encoded:
        """Normalised images through their encoder and projection."""
        tokens = self.image(images)
        pooled = tokens[:, 1:].mean(axis=1) if self.pool == "mean" else tokens[:, 0]
        return unit(self.image_projection(pooled)), tokens

    def embed_texts(
        self,
        tokens: Int[Array, "rows tokens"],
        lengths: Int[Array, " rows"],
        key: DropoutKey = None,
    ) -> Encoded:
        """Texts through their encoder and projection; with a `key`, hidden states are dropped."""
        states = self.text(tokens, lengths, key)
        pooled = states[:, 0]
        if self.pool == "mean":
            here = jnp.arange(states.shape[1], dtype=lengths.dtype) < lengths[:, None]
            pooled = jnp.mean(states, axis=1, where=here[:, :, None])
        return unit(self.text_projection(pooled)), states

    def word_logits(self, states: Float[Array, "*some width"]) -> Float[Array, "*some vocab"]:
        """Float32 logits of the word at each fused state."""
        return self.masked_words(states, self.text.words[...])


class Model:
    """The graphs and programs of one size and vocabulary; parameters are arguments.

    `encode_images` and `encode_texts` are compiled, and so are `match`, `pair_logits` of `MATCH`,
    and `match_odds`, by how much it is above the other.
    """

    def __init__(
        self, config: ConfigDict, vocabulary_size: int, mesh: jax.sharding.Mesh | None = None
    ) -> None:
        make = own_settings(functools.partial(_modules, config, vocabulary_size, mesh))
        towers, matching = nnx.eval_shape(make, key_of(0))
        self._towers, self._matching = nnx.graphdef(towers), matching and nnx.graphdef(matching)
        self._dtype, self.mesh = jnp.dtype(config.model.dtype), mesh
        self.encode_images = jax.jit(own_settings(self._encode_images))
        self.encode_texts = jax.jit(own_settings(self._encode_texts))
        self.match = jax.jit(own_settings(lambda *given: self.pair_logits(*given)[..., MATCH]))
        self.match_odds = jax.jit(own_settings(self._match_odds))

    def towers(self, parameters: Parameters) -> Towers:
        """The towers with these parameters, the student's or the teacher's."""
        return nnx.merge(self._towers, nnx.State(sharding.gathered(parameters, self.mesh)))

    def match_logits(
        self, parameters: Parameters, cls: Float[Array, "*some width"]
    ) -> Float[Array, "*some 2"]:
        """Logits of the student's matching head."""
        return nnx.merge(self._matching, nnx.State(parameters))(cls)

    def pair_logits(
        self,
        student: Parameters,
        image_tokens: Float[Array, "rows patches width"],
        states: Float[Array, "rows texts tokens width"],
        lengths: Int[Array, "rows texts"],
    ) -> Float[Array, "rows texts 2"]:
        """Matching logits of each image with each text of its row."""
        fused = self.towers(student["towers"]).fusion(states, lengths, image_tokens)
        return self.match_logits(student["matching"], fused[:, :, 0])

    def _match_odds(self, *given: PyTree) -> Float[Array, "rows texts"]:
        logits = self.pair_logits(*given)
        return logits[..., MATCH] - logits[..., 1 - MATCH]

    def pixels(self, images: UInt8[Array, "rows side side 3"]) -> Float[Array, "rows side side 3"]:
        """Images as the encoders expect them, in the model's type."""
        return augment.normalise(images, self._dtype)

    def _encode_images(
        self, towers: Parameters, images: UInt8[Array, "rows side side 3"]
    ) -> Encoded:
        return self.towers(towers).embed_images(self.pixels(images))

    def _encode_texts(
        self, towers: Parameters, tokens: Int[Array, "rows tokens"], lengths: Int[Array, " rows"]
    ) -> Encoded:
        return self.towers(towers).embed_texts(tokens, lengths)


def init_student(
    config: ConfigDict, vocabulary_size: int, key: Key[Array, ""]
) -> dict[str, Parameters]:
    """Fresh parameters of the student, float32. Codewords are unit vectors in random directions."""
    tower_key, code_key = jax.random.split(key)
    towers, matching = _modules(config, vocabulary_size, None, tower_key)
    student = {
        "towers": nnx.to_pure_dict(nnx.state(towers)),
        "temperature": jnp.float32(config.alignment.temperature),
    }
    if matching is not None:
        student["matching"] = nnx.to_pure_dict(nnx.state(matching))
    if size := config.codebook.size:
        student["codebook"] = {"codes": init_codes(code_key, size, config.model.dim)}
    return student


def compute_of(model: ConfigDict, mesh: jax.sharding.Mesh | None) -> Compute:
    """How `config.model` computes."""
    dtype, attention = jnp.dtype(model.dtype), model.attention
    if attention == "auto":
        attention = "cudnn" if jax.default_backend() == "gpu" and dtype.itemsize == 2 else "xla"
    return Compute(dtype, remats_of(model.remat)[-1], model.scan_unroll, attention, mesh)


def _modules(
    config: ConfigDict, vocabulary_size: int, mesh: jax.sharding.Mesh | None, key: Key[Array, ""]
) -> tuple[Towers, MatchingHead | None]:
    model, rngs = config.model, nnx.Rngs(params=key)
    towers = Towers(model, vocabulary_size, compute_of(model, mesh), rngs)
    if towers.fusion is None:
        return towers, None
    return towers, MatchingHead(model.text.width, std=model.text.init_std, rngs=rngs)
