"""Memory and time of a retrieval evaluation by its size: `python benchmarks/retrieval_size.py`.

1,000 images and then 5,000, as many as in Karpathy's test split of COCO, with five captions each.
The towers answer with noise, as large as that of size `base` at 384 pixels: 577 bfloat16 tokens an
image of width 768. The captions and the fusion encoder that re-ranks are tiny, so that a CPU can
run it. Each row is a process of its own, with the tokens in files, as in `--mode=eval`, or in
memory, as in training. The peaks are those of resident memory, from before the first image on.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import jax
import jax.numpy as jnp
import numpy as np
from memory import of_process
from train_step import run_alone

from codebook_jax.data.sources import Record
from codebook_jax.evaluation import retrieval
from codebook_jax.evaluation.rerank import Scoring
from codebook_jax.evaluation.stage import Bookkeeping, Cache
from codebook_jax.models import codis
from codebook_jax.parallel import sharding
from configs import base

SIDE, WIDTH, CAPTIONS = 16, 768, 5
FIELDS = {
    "model.image.size_px": SIDE,
    "model.image.width": WIDTH,
    "model.image.heads": 12,
    "model.image.depth": 1,
    "model.text.width": 16,
    "model.text.heads": 1,
    "model.text.depth": 1,
    "model.text.fusion_depth": 1,
    "model.text.max_tokens": 6,
    "model.dim": 256,
    "evaluation.batch": 16,  # a call re-ranks as many images as with 64 and longer captions
}


class Numbers:
    """Images that show their number, and captions that tell it."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Record:
        image = np.full((SIDE, SIDE, 3), np.array((*divmod(index, 256), 0)), np.uint8)
        return Record(image, tuple(f"{index} {n}" for n in range(CAPTIONS)), index)

    def encode(self, captions: list[str], max_tokens: int) -> tuple[np.ndarray, np.ndarray, int]:
        """The captions as a tokenizer gives them."""
        tokens = np.zeros((len(captions), max_tokens), np.int32)
        tokens[:, :2] = [caption.split() for caption in captions]
        return tokens, np.full(len(captions), max_tokens, np.int32), 0


class Noise:
    """Towers that answer with noise, the same for the same number."""

    def __init__(self, patches: int) -> None:
        self.mesh = sharding.make_mesh(-1, 1, 1)
        tile = functools.partial(jax.random.normal, jax.random.key(0), dtype=jnp.bfloat16)
        text_shape = FIELDS["model.text.max_tokens"], FIELDS["model.text.width"]
        image, text = tile((patches, WIDTH)), tile(text_shape)

        def outputs(
            tokens: jax.Array, seed: int, numbers: jax.Array
        ) -> tuple[jax.Array, jax.Array]:
            keys = jax.vmap(functools.partial(jax.random.fold_in, jax.random.key(seed)))(numbers)
            features = jax.vmap(lambda key: jax.random.normal(key, (FIELDS["model.dim"],)))(keys)
            features /= jnp.linalg.norm(features, axis=1, keepdims=True)
            return features, tokens * features[:, :1, None].astype(tokens.dtype)

        self.encode_images = jax.jit(
            lambda _, images: outputs(
                image, 1, images[:, 0, 0, :2].astype(int) @ np.array([256, 1])
            )
        )
        self.encode_texts = jax.jit(
            lambda _, tokens, lengths: outputs(text, 2, tokens[:, :2] @ np.array([CAPTIONS, 1]))
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, nargs="*", default=[1000, 5000])
    parser.add_argument("--top-k", type=int, default=16, help="candidates to re-rank; ALBEF: 256")
    parser.add_argument("--patches", type=int, default=577, help="tokens of an image")
    parser.add_argument("--keep", nargs="*", default=["files", "memory"])
    parser.add_argument("--folder", default=".", help="for the files, removed at the end")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        keep, images = options.one
        print(json.dumps(measure(keep, int(images), options)))
        return
    for keep in options.keep:
        rows = [run_alone(__file__, [*sys.argv[1:], "--one", keep, str(n)]) for n in options.images]
        head = f"{options.patches} tokens an image in {keep}, the best {options.top_k} re-ranked"
        table(head, options.images, rows)


def table(head: str, images: list[int], rows: list[dict[str, Any]]) -> None:
    """Prints what every stage took, and how that grows from the first size to the last."""
    sizes = "".join(f"{f'{n:,} x {n * CAPTIONS:,}':>29}" for n in images)
    print(f"{head}\n{'':12}{sizes}{'growth':>24}")
    for name in rows[0]:
        cells = "".join(
            "{s:>8.1f} s{cpu:>7.1f} CPU{mb:>6,.0f} MB".format(**row[name]) for row in rows
        )
        first, last = rows[0][name], rows[-1][name]
        grown = "".join(f"{last[unit] / max(first[unit], 1e-9):>6.1f} x" for unit in first)
        print(f"{name:12}{cells}{grown}", flush=True)


def measure(keep: str, images: int, options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Seconds, those of the CPU, and peak resident megabytes, by stage; `start` is before all."""
    config = base.paper("tiny")
    config.update_from_flattened_dict(FIELDS | {"evaluation.rerank_top_k": options.top_k})
    noise, source = Noise(options.patches), Numbers(images)
    model = codis.Model(config, 8, noise.mesh)
    student = codis.init_student(config, 8, jax.random.key(1))

    @jax.jit
    def match(tokens: jax.Array, states: jax.Array, lengths: jax.Array) -> jax.Array:
        return model.match(student, tokens.astype(jnp.float32), states.astype(jnp.float32), lengths)

    found, stage, began = {}, "start", (time.perf_counter(), time.process_time())

    def begin(name: str) -> None:
        nonlocal stage, began
        now = time.perf_counter(), time.process_time()
        taken = {"s": now[0] - began[0], "cpu": now[1] - began[1]}
        found[stage] = taken | {"mb": of_process("VmHWM") / 1e6}
        stage, began = name, now
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins here

    def progress(name: str, done: int, total: int) -> None:
        if done == 0:
            begin(name)
        elif done == total:
            begin(f"after {name}")

    with tempfile.TemporaryDirectory(dir=options.folder) as place:
        cache = Cache(Path(place), "") if keep == "files" else None
        books = Bookkeeping(progress, cache)
        towers = {"student": (), "teacher": ()}
        retrieval.evaluate(
            noise, towers, source, source, config, images=0, scoring=Scoring(match), books=books
        )
    begin("")
    after = {"after images": None, "after texts": "dual ranks", "after pairs": "new ranks"}
    shown = {after.get(name, name): row for name, row in found.items()}
    shown.pop(None, None)
    rows = found.values()
    whole = {unit: sum(row[unit] for row in rows) for unit in ("s", "cpu")}
    whole["mb"] = max(row["mb"] for row in rows)
    return shown | {"all": whole}


if __name__ == "__main__":
    main()
