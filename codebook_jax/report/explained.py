"""Which parts of test pictures speak for the words of their captions: small heat maps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

from codebook_jax.build import Parts
from codebook_jax.data.images import decode, resize_square
from codebook_jax.data.sources import Record
from codebook_jax.evaluation.encoding import rows_over_shards
from codebook_jax.method.numerics import own_settings
from codebook_jax.models.codis import MATCH
from codebook_jax.models.explaining import explain_pairs, layer_of
from codebook_jax.parallel import sharding
from codebook_jax.report.page import THUMBNAIL_PX, Pictures
from codebook_jax.weights.explained import heated

SHOWN, WORDS = 3, 12  # pairs, and words of each


def can_explain(parts: Parts) -> bool:
    """Whether the model has maps for words: of a single fusion layer, [CLS] alone has one."""
    return parts.config.model.text.fusion_depth > 1


def explained_pairs(
    parts: Parts, student: PyTree, pairs: Sequence[tuple[Record, str]], pictures: Pictures
) -> dict[str, Any]:
    """The `layer`, from 1, and of each of the `pairs` its `picture`, `caption`, `probability` of
    matching and `words`, [word, name of its heat map]; adds these pictures.
    """
    model, tokenizer, config = parts.task.model, parts.tokenizer, parts.config
    side, most = config.model.image.size_px, config.model.text.max_tokens
    originals = [decode(record.image) for record, _ in pairs]
    seen = np.stack([resize_square(pixels, side) for pixels in originals])
    tokens, lengths, _ = tokenizer.encode([caption for _, caption in pairs], most)
    rows = np.arange(rows_over_shards(len(pairs), parts.mesh)).clip(max=len(pairs) - 1)
    inputs = (sharding.to_device(each[rows], parts.mesh) for each in (seen, tokens, lengths))
    program = jax.jit(own_settings(lambda *given: explain_pairs(model, *given)))
    found = jax.tree.map(sharding.to_host, program(student, *inputs))
    grid, shown = round(found.maps.shape[-1] ** 0.5), []
    for number, ((_, caption), pixels) in enumerate(zip(pairs, originals, strict=True)):
        name, words = f"explained {number}", []
        pictures.add(name, pixels, caption)
        small = resize_square(pixels, THUMBNAIL_PX)
        for word, places in tokenizer.words(caption, most)[:WORDS]:
            heat = found.maps[number, places].sum(axis=0).reshape(grid, grid)
            words.append([word, f"{name} {len(words)}"])
            pictures.add(words[-1][1], heated(small, heat), f"heat map of {word}")
        odds = found.logits[number, MATCH] - found.logits[number, 1 - MATCH]
        probability = float(1 / (1 + np.exp(-odds)))
        shown.append({"picture": name, "caption": caption, "probability": probability})
        shown[-1]["words"] = words
    return {"layer": layer_of(config.model.text.fusion_depth) + 1, "pairs": shown}
