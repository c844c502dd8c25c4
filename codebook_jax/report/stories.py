"""What a model of sequences makes of stories: which frame each sentence is aligned with."""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import PyTree

from codebook_jax.build import Parts
from codebook_jax.data.images import decode
from codebook_jax.data.sources import Source
from codebook_jax.data.stories import evenly_spaced
from codebook_jax.evaluation.stories import encode_stories
from codebook_jax.report.page import Pictures

SHOWN = 6  # of the first stories, which come in pairs of one content in scenes:stories


def aligned_stories(
    parts: Parts, towers: PyTree, source: Source, pictures: Pictures
) -> list[dict[str, Any]]:
    """Of the first stories: the names of their `frames`, whose pictures it adds, their `sentences`,
    and `shares` [sentences][frames] of each sentence's mass in the alignment.
    """
    task, config = parts.task, parts.config
    encoded = encode_stories(
        task.model, {"student": towers}, source, parts.tokenizer, config, stories=SHOWN
    )["student"]
    found = []
    for position, plan in zip(encoded.positions, encoded.alignments(task.order), strict=True):
        story = source[int(position)]
        frames = evenly_spaced(len(story.frames), config.sequences.max_frames)
        told = evenly_spaced(len(story.captions), config.sequences.max_sentences)
        names = [f"story {position} frame {number}" for number in frames]
        for name, number in zip(names, frames, strict=True):
            pictures.add(name, decode(story.frames[number]), f"frame {number + 1}")
        of_sentences = plan[: len(frames), : len(told)].T
        shares = of_sentences / np.maximum(of_sentences.sum(axis=1, keepdims=True), 1e-12)
        sentences = [story.captions[number] for number in told]
        found.append({"frames": names, "sentences": sentences, "shares": shares.tolist()})
    return found
