"""What trained towers are used for: encoding, matching, and retrieval with both."""

from __future__ import annotations

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jaxtyping import Array, Float, Int, PyTree, UInt8

from codebook_jax.data import augment
from codebook_jax.data.sources import Source
from codebook_jax.data.text import Tokenizer
from codebook_jax.evaluation import retrieval
from codebook_jax.evaluation.encoding import Progress
from codebook_jax.method.numerics import own_settings
from codebook_jax.models.codis import Model
from codebook_jax.models.heads import MATCH
from codebook_jax.tasks.task import Evaluation


class TowerPrograms:
    """The jitted encoders and the matching of a model; parameters are arguments."""

    def __init__(
        self, model: Model, config: ml_collections.ConfigDict, mesh: jax.sharding.Mesh
    ) -> None:
        self.model, self.config, self.mesh = model, config, mesh
        self.encode_images = jax.jit(own_settings(self._encode_images))
        self.encode_texts = jax.jit(own_settings(self._encode_texts))
        self.match = jax.jit(own_settings(self._match))

    def evaluate(
        self,
        towers: Mapping[str, PyTree],
        student: PyTree | None,
        source: Source,
        tokenizer: Tokenizer,
        *,
        images: int,
        progress: Progress | None = None,
    ) -> Evaluation:
        """Retrieval of the first `images` (0: all) by each of the `towers`.

        With `student`, the parameters that match, it is re-ranked too if the config asks for it.
        """
        rerank = student is not None and self.config.evaluation.rerank_top_k > 0
        results = retrieval.evaluate(
            self,
            towers,
            source,
            tokenizer,
            self.config,
            images=images,
            match=functools.partial(self.match, student) if rerank else None,
            progress=progress,
        )
        dual = results["student/dual"]
        found = f"R@1 image to text {dual['txt_r1']:.1f} %, text to image {dual['img_r1']:.1f} %"
        return Evaluation(
            results,
            retrieval.flat(results),
            score=float(np.mean(list(retrieval.recalls_of(dual).values()))),
            metric="mean of the recalls of student/dual in validation",
            summary=f"{found} (chance {dual['chance_r1']:.1f} %) on {retrieval.counted(dual)}",
            table=retrieval.format_table(results),
        )

    def pixels(
        self, images: UInt8[Array, "images side side 3"]
    ) -> Float[Array, "images side side 3"]:
        """Images as the encoders expect them, in the model's type."""
        return augment.normalise(images, jnp.dtype(self.config.model.dtype))

    def _encode_images(
        self, towers: PyTree, images: UInt8[Array, "rows side side 3"]
    ) -> tuple[Float[Array, "rows dim"], Float[Array, "rows patches width"]]:
        return self.model.towers(towers).embed_images(self.pixels(images))

    def _encode_texts(
        self, towers: PyTree, tokens: Int[Array, "rows tokens"], lengths: Int[Array, "rows"]
    ) -> tuple[Float[Array, "rows dim"], Float[Array, "rows tokens width"]]:
        return self.model.towers(towers).embed_texts(tokens, lengths)

    def _match(
        self, student: PyTree, image_tokens: Array, states: Array, lengths: Array
    ) -> Float[Array, "rows texts"]:
        fused = self.model.towers(student["towers"]).fusion(states, lengths, image_tokens)
        return self.model.match_logits(student["matching"], fused[:, :, 0])[..., MATCH]
