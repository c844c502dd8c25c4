"""Time and memory that a source of a million pairs takes before and during training: `python
benchmarks/data_scale.py`.

Each row is a separate process, so that its memory is its own: it opens the source, draws its order,
takes the first batch, and then `--batches` more, with the resident memory after every tenth of
them. The records are pictures of 16 x 16. Memory excludes pages that only map the files, which the
system drops when it needs them.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

DISTINCT = 256
BATCH = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--sources", nargs="*", default=list(WRITERS), help=f"of: {' '.join(WRITERS)}"
    )
    parser.add_argument("--records", type=int, default=1_000_000)
    parser.add_argument("--batches", type=int, default=10_000, help=f"of {BATCH}")
    parser.add_argument("--folder", help="the folder to keep the data in; default: a temporary one")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--out", help="write the figures to this JSON file")
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measured(options.one, options.records, options.batches)))
        return
    figures: dict[str, object] = {"pairs": options.records, "batch": BATCH}
    print(
        f"{'':10} {'open, s':>8} {'order, s':>8} {'batch, s':>8} {'index, MB':>9}  MB in use along "
        "the way"
    )
    with TemporaryDirectory() as temporary:
        folder = Path(options.folder or temporary)
        for name in options.sources:
            spec = WRITERS[name](folder / name, options.records)
            sizes = ["--records", str(options.records), "--batches", str(options.batches)]
            row = run_alone(["--one", spec, *sizes])
            figures[name] = row
            print(
                f"{name:10} {row['open_s']:8.3f} {row['order_s']:8.3f} "
                f"{row['first_batch_s']:8.3f} {row['index_mb']:9.1f}  "
                f"{' '.join(f'{megabytes:.0f}' for megabytes in row['mb'])}",
                flush=True,
            )
    if options.out:
        Path(options.out).parent.mkdir(parents=True, exist_ok=True)
        Path(options.out).write_text(json.dumps(figures, indent=1) + "\n")


def run_alone(arguments: list[str]) -> dict[str, object]:
    """The figures of one process of this script."""
    command = [sys.executable, __file__, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        sys.exit(done.stderr[-3000:])
    return json.loads(done.stdout.splitlines()[-1])


def measured(spec: str, records: int, batches: int) -> dict[str, object]:
    """Seconds and megabytes that this process needs with the source."""
    from codebook_jax.data.pipeline import BatchSpec, BatchStream
    from codebook_jax.data.sources import open_source
    from codebook_jax.data.sources.mixture import training_order
    from codebook_jax.data.text import open_tokenizer

    def opened(spec: str, examples: int) -> object:
        return open_source(spec, role="train", size_px=16, scenes_examples=examples, seed=0)

    with TemporaryDirectory() as run:  # load first what every source loads
        tokenizer, _ = open_tokenizer("", run, ["a red ring left of a star"], 400)
    training_order(opened("scenes", 100), 0)[0]
    before, began = resident_mb(), time.perf_counter()
    source = opened(spec, records)
    open_s, began = time.perf_counter() - began, time.perf_counter()
    order = training_order(source, 0)
    order[0], order[len(source) - 1]
    order_s, index_mb = time.perf_counter() - began, resident_mb() - before
    began = time.perf_counter()
    spec = BatchSpec(
        seed=0,
        global_batch=BATCH,
        rows=slice(None),
        size_px=16,
        max_tokens=16,
        crop_scale=(0.7, 1.0),
        crop_ratio=(0.75, 4 / 3),
        flip=False,
        views=2,
    )
    stream = BatchStream(source, tokenizer, spec, threads=2, prefetch=4)
    next(stream)
    first_batch_s = time.perf_counter() - began
    every = max(1, batches // 10)
    in_use = [resident_mb()]
    for step in range(1, batches + 1):
        next(stream)
        if step % every == 0:
            in_use.append(resident_mb())
    stream.close()
    assert len(source) == records
    return {
        "open_s": round(open_s, 3),
        "order_s": round(order_s, 3),
        "first_batch_s": round(first_batch_s, 3),
        "index_mb": round(index_mb, 1),
        "mb": [round(megabytes, 1) for megabytes in in_use],
        "batches_a_row": every,
    }


def resident_mb() -> float:
    """This process's own memory."""
    with open("/proc/self/status") as file:
        fields = dict(line.split(":", 1) for line in file)
    return sum(int(fields[name].split()[0]) for name in ("RssAnon", "RssShmem")) / 1e3


def as_scenes(folder: Path, records: int) -> str:
    return "scenes"


def as_json_lines(folder: Path, records: int) -> str:
    """One entry per line, with paths as long as real ones; images repeat."""
    import numpy as np
    from PIL import Image

    path = folder / "pairs.jsonl"
    if path.exists():
        return f"json:{path}"
    images = [f"images/part-{number:05}/{number:012}.jpg" for number in range(DISTINCT)]
    draw = np.random.default_rng(0)
    for image in images:
        (folder / image).parent.mkdir(parents=True, exist_ok=True)
        pixels = draw.integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / image, "JPEG")
    words = ["red", "green", "small", "large", "circle", "square", "left", "above", "beside", "two"]
    with open(path, "w") as lines:
        for number in range(records):
            caption = " ".join(words[number // 10**place % 10] for place in range(6))
            entry = {"image": images[number % DISTINCT], "caption": caption, "image_id": number}
            lines.write(json.dumps(entry) + "\n")
    return f"json:{path}"


def as_records(folder: Path, records: int) -> str:
    """The list packed by --mode=prepare."""
    from codebook_jax.tools.prepare import prepare
    from configs import base

    if not (folder / "manifest.json").exists():
        config = base.get_config("tiny")
        config.prepare.source = as_json_lines(folder.with_name("json"), records)
        prepare(config, folder)
    return f"records:{folder}"


WRITERS: dict[str, Callable[[Path, int], str]] = {
    "scenes": as_scenes,
    "json": as_json_lines,
    "records": as_records,
}


if __name__ == "__main__":
    main()
