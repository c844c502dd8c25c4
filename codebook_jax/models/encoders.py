"""The pre-trained encoders without their heads, as the downstream tasks use them."""

from __future__ import annotations

from flax import nnx
from jaxtyping import Array, Float, Int
from ml_collections import ConfigDict

from codebook_jax.models.bert import DropoutKey, FusionEncoder, States, TextEncoder, TwoImageFusion
from codebook_jax.models.layers import Compute, keys_of
from codebook_jax.models.vit import VisionTransformer

Pixels = Float[Array, "rows pictures side side 3"]


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
