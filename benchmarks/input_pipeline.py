"""Records per second that one core reads, decodes, crops and tokenises: `python
benchmarks/input_pipeline.py`.

Photograph-like JPEGs of 640 x 480 are generated and written in every format. The process is pinned
to one core and the stream has one thread; the CPU time of the whole process counts. All rows are
measured in turn, `--rounds` times, and the fastest is kept, since other work on the machine can
only slow a row down. Our pipeline crops, and tokenises captions to 30 tokens; the device does
RandAugment and normalisation. If torch and torchvision are installed, ALBEF's pipeline is measured
too (benchmarks/pytorch_pipeline.py), which does those two on the CPU and passes captions on as
text.

The last rows are for larger pictures, as files and packed; and for threads and worker processes on
all cores, in wall-clock time (two batches are prepared at once, so two cores are busy even with one
thread per batch).
"""

from __future__ import annotations

import argparse
import importlib.metadata
import io
import itertools
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from pictures import WRITERS, Pictures, written
from PIL import Image

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from codebook_jax.data.pipeline import BatchSpec, BatchStream
from codebook_jax.data.sources import Source, open_source
from codebook_jax.data.text import Tokenizer, open_tokenizer
from codebook_jax.errors import UserError

SIZE_PX, MAX_TOKENS, BATCH = 256, 30, 64
VIEWS = (2, 1)  # the teacher has its own, or not
PACKAGES = (
    "grain",
    "numpy",
    "opencv-python-headless",
    "pillow",
    "simplejpeg",
    "tokenizers",
    "torch",
    "torchvision",
)
COLUMNS = {"records_per_s": ".0f", "of_decoding": ".0%", "times_pytorch": ".2f"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--sources", nargs="*", default=list(WRITERS), help=f"of: {' '.join(WRITERS)}"
    )
    parser.add_argument("--records", type=int, default=2048)
    parser.add_argument("--distinct", type=int, default=128, help="pictures; records repeat them")
    parser.add_argument("--batches", type=int, default=6, help=f"of {BATCH}, per measurement")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--core", type=int, default=max(os.sched_getaffinity(0)))
    parser.add_argument("--out", help="a JSON file for the figures")
    options = parser.parse_args()
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {options.core})
    with TemporaryDirectory() as folder:
        figures = measured(Path(folder), options, cores)
    if options.out:
        Path(options.out).parent.mkdir(parents=True, exist_ok=True)
        Path(options.out).write_text(json.dumps(figures, indent=1) + "\n")


def measured(folder: Path, options: argparse.Namespace, cores: set[int]) -> dict[str, Any]:
    """All figures, printed as they are measured."""
    pictures = written(folder / "files", 640, 480, options.records, options.distinct)
    large = written(folder / "large", 1600, 1200, options.records // 8, options.distinct // 8)
    kilobytes = statistics.mean(path.stat().st_size for path in pictures.paths) / 1e3
    figures: dict[str, Any] = {"machine": machine(), "kilobytes a picture": round(kilobytes, 1)}
    print(json.dumps(figures), flush=True)
    sources, skipped = opened(pictures, options.sources)
    tokenizer, _ = open_tokenizer("", folder / "run", pictures.captions, 8192)
    rows = decoders([path.read_bytes() for path in pictures.paths])
    for (name, source), views in itertools.product(sources.items(), VIEWS):
        rows[f"{name}, {views} views"] = ours(source, tokenizer, views, options.batches)
    rows |= of_pytorch(pictures, options.batches, skipped)
    large_sources, _ = opened(
        large, [name for name in options.sources if name in ("files", "records")]
    )
    for name, source in large_sources.items():
        rows[f"{name} of 1600 x 1200, 2 views"] = ours(source, tokenizer, 2, options.batches)
    figures["records a second and core"] = table(rows, options.rounds)
    for sentence in skipped:
        print(sentence, flush=True)
    os.sched_setaffinity(0, cores)
    figures["records a second on all cores, by the clock"] = by_the_clock(
        sources["files"], tokenizer, options, len(cores)
    )
    return figures | {"skipped": skipped, "cores": len(cores)}


def table(rows: dict[str, Callable[[], float]], rounds: int) -> dict[str, dict[str, float]]:
    """Prints and returns each row's records per second: the best of `rounds`, measured in turn."""
    seconds: dict[str, list[float]] = {name: [] for name in rows}
    for _ in range(rounds):
        for name, measure in rows.items():
            seconds[name].append(measure())
    rates = {name: 1 / min(times) for name, times in seconds.items()}
    figures = {}
    print(f"{'':36} {'records/s':>9} {'of decoding':>11} {'x PyTorch':>9}")
    for name, rate in rates.items():
        row = {"records_per_s": rate}
        if "1600" not in name:
            row["of_decoding"] = rate / rates["simplejpeg alone"]
        against = rates.get(f"PyTorch, {name.rsplit(', ', 1)[-1]}")
        if "1600" not in name and against:
            row["times_pytorch"] = rate / against
        cells = [f"{row[key]:{form}}" if key in row else "" for key, form in COLUMNS.items()]
        print(f"{name:36} {cells[0]:>9} {cells[1]:>11} {cells[2]:>9}", flush=True)
        figures[name] = {key: round(value, 3) for key, value in row.items()}
    return figures


def ours(source: Source, tokenizer: Tokenizer, views: int, batches: int) -> Callable[[], float]:
    """Measures the stream of training batches, in CPU seconds per record."""

    def seconds() -> float:
        stream = open_stream(source, tokenizer, views, workers=0, threads=1, prefetch=1)
        for _ in range(2):
            next(stream)
        began = time.process_time()
        for _ in range(batches):
            next(stream)
        taken = time.process_time() - began
        stream.close()
        return taken / (batches * BATCH)

    return seconds


def open_stream(source: Source, tokenizer: Tokenizer, views: int, **making: int) -> BatchStream:
    """The stream of training batches with ALBEF's crops."""
    spec = BatchSpec(
        seed=0,
        global_batch=BATCH,
        rows=slice(None),
        size_px=SIZE_PX,
        max_tokens=MAX_TOKENS,
        crop_scale=(0.2, 1.0),
        crop_ratio=(0.75, 4 / 3),
        flip=True,
        views=views,
    )
    return BatchStream(source, tokenizer, spec, **making)


def decoders(files: Sequence[bytes]) -> dict[str, Callable[[], float]]:
    """Measurements of decoding alone, of whole pictures from memory."""
    import simplejpeg

    def by(decode: Callable[[bytes], object]) -> Callable[[], float]:
        def seconds() -> float:
            began = time.process_time()
            for file in files[:512]:
                decode(file)
            return (time.process_time() - began) / min(512, len(files))

        return seconds

    return {
        "simplejpeg alone": by(simplejpeg.decode_jpeg),
        "Pillow alone": by(lambda file: Image.open(io.BytesIO(file)).convert("RGB")),
    }


def of_pytorch(
    pictures: Pictures, batches: int, skipped: list[str]
) -> dict[str, Callable[[], float]]:
    """ALBEF's pipeline, if PyTorch is installed."""
    try:
        import pytorch_pipeline
    except ImportError as failure:
        skipped.append(f"PyTorch is left out: {failure}")
        return {}

    def by(views: int) -> Callable[[], float]:
        return lambda: pytorch_pipeline.seconds_a_record(
            pictures.paths, pictures.captions, views, size_px=SIZE_PX, batch=BATCH, batches=batches
        )

    return {f"PyTorch, {views} views": by(views) for views in VIEWS}


def by_the_clock(
    source: Source, tokenizer: Tokenizer, options: argparse.Namespace, cores: int
) -> dict[str, float]:
    """Records per second with threads and with worker processes, not pinned to a core."""
    rows = {
        "1 thread": dict(workers=0, threads=1),
        f"{cores} threads": dict(workers=0, threads=cores),
        f"{2 * cores} threads": dict(workers=0, threads=2 * cores),
        f"{cores} workers": dict(workers=cores, threads=1),
    }
    rates: dict[str, list[float]] = {name: [] for name in rows}
    for _, (name, making) in itertools.product(range(options.rounds), rows.items()):
        stream = open_stream(source, tokenizer, 2, **making, prefetch=4)
        for _ in range(6):  # batches made while the workers started do not count
            next(stream)
        began = time.perf_counter()
        for _ in range(2 * options.batches):
            next(stream)
        rates[name].append(2 * options.batches * BATCH / (time.perf_counter() - began))
        stream.close()
    best = {name: round(max(found), 1) for name, found in rates.items()}
    print(f"{cores} cores, 2 views, by the clock: {json.dumps(best)}", flush=True)
    return best


def opened(pictures: Pictures, names: Sequence[str]) -> tuple[dict[str, Source], list[str]]:
    """The named sources, written next to the pictures; and one sentence per source whose library is
    missing.
    """
    sources, skipped = {}, []
    for name in names:
        try:
            spec = WRITERS[name](
                pictures, pictures.folder.with_name(f"{pictures.folder.name} {name}")
            )
            sources[name] = open_source(
                spec, role="train", size_px=SIZE_PX, scenes_examples=0, seed=0
            )
        except (ImportError, UserError, NotImplementedError) as failure:
            skipped.append(f"{name} is left out: {failure!r}")
    return sources, skipped


def machine() -> dict[str, Any]:
    """The processor and the versions."""
    with open("/proc/cpuinfo") as file:
        model = next(
            (line.split(":")[1].strip() for line in file if line.startswith("model name")), ""
        )
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "processor": model or platform.processor(),
        "python": platform.python_version(),
    } | versions


if __name__ == "__main__":
    main()
