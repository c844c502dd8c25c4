"""Small sources, tokenizers and streams of batches."""

import hashlib
import itertools

import numpy as np

from codebook_jax.data.pipeline import BatchSpec, BatchStream
from codebook_jax.data.sources import open_source
from codebook_jax.data.sources.record import sample_captions
from codebook_jax.data.text import open_tokenizer

BATCH = 8


def scenes_source(examples=50):
    return open_source(
        "scenes", role="train", size_px=32, scenes_examples=examples, image_root="", seed=0
    )


def tokenizer_for_run(spec, workdir, captions, size, **spelling):
    """The tokenizer that a run with these settings uses, kept in the workdir."""
    tokenizer, save = open_tokenizer(spec, workdir, captions, size, **spelling)
    save()
    return tokenizer


def tokenizer_of(source, workdir, size=400):
    """A tokenizer trained on the captions of a source, kept in the workdir."""
    return tokenizer_for_run("", workdir, sample_captions(source), size)


def stream_of(source, tokenizer, **changes):
    making = {"workers": 0, "threads": 2, "prefetch": 3, "start_step": 0}
    making |= {name: changes.pop(name) for name in making if name in changes}
    spec = dict(seed=0, global_batch=BATCH, rows=slice(None), size_px=24, max_tokens=24)
    spec |= dict(crop_scale=(0.5, 1.0), crop_ratio=(0.75, 4 / 3), flip=False, views=2) | changes
    return BatchStream(source, tokenizer, BatchSpec(**spec), **making)


def streams(make, tokenizer):
    """For a fixture: a function that opens streams, which are closed after the test."""
    opened = []

    def open_stream(source, **changes):
        opened.append(make(source, tokenizer, **changes))
        return opened[-1]

    yield open_stream
    for one in opened:
        one.close()


def taken(stream, count):
    return list(itertools.islice(stream, count))


def digests(batches):
    return [
        hashlib.sha256(b"".join(np.ascontiguousarray(part).tobytes() for part in batch)).hexdigest()
        for batch in batches
    ]
