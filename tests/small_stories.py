"""Small stories for tests: what the built-in ones tell, streams of them, and a source of any."""

import re

import numpy as np
from list_files import open_it

from codebook_jax.data.pipeline import BatchStream
from codebook_jax.data.scenes.world import COLOURS, SHAPES
from codebook_jax.data.sources import Story
from codebook_jax.data.stories import StorySpec

BATCH = 8
_KIND = re.compile(rf"({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})\b")


def kinds_of(scene):
    return frozenset(thing[:2] for thing in scene.objects)


def told_frames(story):
    """(number of its frame, its frame, sentence) of each sentence, found by the kinds it names."""
    frames = {kinds_of(scene): (number, scene) for number, scene in enumerate(story.frames)}
    return [(*frames[frozenset(_KIND.findall(words))], words) for words in story.captions]


def stories_source(role="train", **changes):
    return open_it("scenes:stories", role, **changes)


class Numbered:
    """Story n has 1 + n % 7 frames and 1 + n % 4 sentences; frame f is red n, green and blue say
    where a pixel is and which frame it is; the stories in `bad` have an unreadable last frame.
    """

    def __init__(self, count, bad=()):
        self.count, self.bad = count, frozenset(bad)

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        frames = [np.full((40, 40, 3), index, np.uint8) for _ in range(1 + index % 7)]
        for number, frame in enumerate(frames):
            frame[:, :, 1] = np.arange(40) * 4 + np.arange(40)[:, None] * 2
            frame[:, :, 2] = number + 1
        if index in self.bad:
            frames[-1] = f"/data/{index}.jpg"
        words = ("one", "two", "three", "four")[: 1 + index % 4]
        return Story(tuple(frames), words, index)

    def __repr__(self):
        return f"numbered({self.count})"


def stream_of_stories(source, tokenizer, **changes):
    making = {"workers": 0, "threads": 2, "prefetch": 3, "start_step": 0}
    making |= {name: changes.pop(name) for name in making if name in changes}
    spec = dict(seed=0, global_batch=BATCH, rows=slice(None), size_px=24, max_tokens=24)
    spec |= dict(max_frames=6, max_sentences=6, crop_scale=(0.5, 1.0), crop_ratio=(0.75, 4 / 3))
    return BatchStream(source, tokenizer, StorySpec(**spec, views=2)._replace(**changes), **making)
