"""Networks of the downstream tasks: the pre-trained encoders with a head, or a decoder of answers.

Their parameters are nested dicts of float32 arrays, {"towers", "head"} or {"towers", "decoder"},
with the names of pre-training below "towers", so that its weights fit. Source: Li et al. 2021, 4.
"""

from __future__ import annotations

import jax
from flax import nnx
from jaxtyping import Array, Float, Int, Key, PyTree
from ml_collections import ConfigDict

from codebook_jax.method.numerics import key_of, own_settings
from codebook_jax.models.answers import Answerer
from codebook_jax.models.bert import DropoutKey
from codebook_jax.models.codis import compute_of
from codebook_jax.models.encoders import Encoders, Pixels
from codebook_jax.models.layers import Compute, Dense
from codebook_jax.models.vit import VisionTransformer
from codebook_jax.parallel import sharding

# What classifiers choose from, by `config.task`.
LABELS = {
    "entailment": ("contradiction", "neutral", "entailment"),  # SNLI-VE's codes 0, 1, 2
    "nlvr2": ("false", "true"),
    "text_assignment": ("first", "second", "neither"),
}
OF_TWO = ("nlvr2", "text_assignment")  # tasks on two pictures


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
        self, config: ConfigDict, vocabulary_size: int, compute: Compute, rngs: nnx.Rngs
    ) -> None:
        model, labels = config.model, LABELS[config.task]
        pictures = 2 if config.task in OF_TWO else 1
        self.towers = Encoders(model, vocabulary_size, compute, rngs, pictures=pictures)
        self.head = ClassHead(model.text.width, len(labels), std=model.text.init_std, rngs=rngs)

    def __call__(
        self,
        pixels: Pixels,
        tokens: Int[Array, "rows tokens"],
        lengths: Int[Array, " rows"],
        key: DropoutKey = None,
    ) -> Float[Array, "rows classes"]:
        return self.head(self.towers(pixels, tokens, lengths, key)[:, 0])


class Probe(nnx.Module):
    """A linear classifier on the image encoder's pooled tokens, as pre-training pools them."""

    def __init__(
        self, config: ConfigDict, vocabulary_size: int, compute: Compute, rngs: nnx.Rngs
    ) -> None:
        image, classes = config.model.image, len(config.labels.names)
        self.towers = ImageTower(image, compute, rngs)
        self.head = Dense(image.width, classes, std=0.0, dtype=None, rngs=rngs)
        self.pool = config.model.pool

    def __call__(
        self,
        pixels: Pixels,
        tokens: Int[Array, "rows tokens"],
        lengths: Int[Array, " rows"],
        key: DropoutKey = None,
    ) -> Float[Array, "rows classes"]:
        """Logits from the first picture alone; texts are not read."""
        tokens = self.towers.image(pixels[:, 0])
        return self.head(tokens[:, 1:].mean(axis=1) if self.pool == "mean" else tokens[:, 0])


class ImageTower(nnx.Module):
    """The image encoder alone, by its name among the towers."""

    def __init__(self, spec: ConfigDict, compute: Compute, rngs: nnx.Rngs) -> None:
        self.image = VisionTransformer(spec, compute, rngs)


def network_of(
    config: ConfigDict, vocabulary_size: int, compute: Compute, rngs: nnx.Rngs
) -> nnx.Module:
    """The network of `config.task`, with fresh parameters."""
    if config.task == "vqa":
        return Answerer(config, vocabulary_size, compute, rngs)
    if config.task == "labels":
        return Probe(config, vocabulary_size, compute, rngs)
    return Classifier(config, vocabulary_size, compute, rngs)


class Network:
    """The graph of a task's network; parameters are arguments."""

    def __init__(
        self, config: ConfigDict, vocabulary_size: int, mesh: jax.sharding.Mesh | None = None
    ) -> None:
        compute = compute_of(config.model, mesh)
        given = config, vocabulary_size, compute
        self._make = lambda key: network_of(*given, nnx.Rngs(params=key))
        self._graph = nnx.graphdef(nnx.eval_shape(own_settings(self._make), key_of(0)))
        self.dtype, self.mesh = compute.dtype, mesh

    def init(self, key: Key[Array, ""]) -> dict[str, PyTree]:
        """Fresh parameters, float32."""
        return nnx.to_pure_dict(nnx.state(self._make(key)))

    def __call__(self, parameters: PyTree) -> nnx.Module:
        """The network with these parameters."""
        return nnx.merge(self._graph, nnx.State(sharding.gathered(parameters, self.mesh)))
