"""Photograph-like JPEGs with captions, generated and written in every format that sources read."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
from PIL import Image


class Pictures(NamedTuple):
    """JPEGs with one caption each, as files below a folder."""

    folder: Path
    paths: list[Path]
    captions: list[str]

    def content(self) -> Iterator[tuple[str, bytes, str]]:
        """(key, file, caption)."""
        for number, (path, caption) in enumerate(zip(self.paths, self.captions, strict=True)):
            yield f"{number:06}", path.read_bytes(), caption


def written(folder: Path, width: int, height: int, records: int, distinct: int) -> Pictures:
    """Pictures as separate files, with captions of eight to fourteen words."""
    folder.mkdir(parents=True)
    draw = np.random.default_rng(0)
    files = [jpeg(photograph(height, width, seed)) for seed in range(distinct)]
    syllables = [first + second for first in "bcdfghklmnprstvw" for second in "aeiou"]
    words = ["".join(draw.choice(syllables, draw.integers(1, 4))) for _ in range(3000)]
    paths, captions = [], []
    for number in range(records):
        paths.append(folder / f"{number:06}.jpg")
        paths[-1].write_bytes(files[number % distinct])
        places = np.minimum(draw.zipf(1.2, draw.integers(8, 15)), len(words)) - 1
        captions.append(" ".join(words[place] for place in places))
    return Pictures(folder, paths, captions)


def photograph(height: int, width: int, seed: int) -> np.ndarray:
    """uint8 RGB: smooth structure of every scale, edges, and fine texture."""
    draw = np.random.default_rng(seed)
    size, total = (width, height), np.zeros((height, width, 3), np.float32)
    for scale in (240, 120, 60, 30, 15, 8, 4, 2):
        coarse = draw.normal(size=(height // scale + 2, width // scale + 2, 3)).astype(np.float32)
        coarse = 0.35 * coarse + 0.8 * coarse.mean(axis=2, keepdims=True)
        total += scale**0.75 * cv2.resize(coarse, size, interpolation=cv2.INTER_CUBIC)
    spread = float(total.std())
    for _ in range(12):
        centre = int(draw.integers(width)), int(draw.integers(height))
        axes = int(draw.integers(10, width // 5)), int(draw.integers(10, height // 5))
        colour = (1.5 * spread * draw.normal(size=3)).tolist()
        cv2.ellipse(total, centre, axes, float(draw.uniform(0, 180)), 0, 360, colour, -1)
    texture = (
        draw.uniform(0.06, 0.14) * 480 / height
    )  # larger photographs are smoother pixel by pixel
    total += texture * spread * draw.normal(size=(height, width, 1)).astype(np.float32)
    return np.clip(118 + 52 * (total - total.mean()) / total.std(), 0, 255).astype(np.uint8)


def jpeg(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def as_files(pictures: Pictures, folder: Path) -> str:
    """A list of the files."""
    folder.mkdir()
    entries = [
        {"image": str(path), "caption": caption}
        for path, caption in zip(pictures.paths, pictures.captions, strict=True)
    ]
    (folder / "pairs.json").write_text(json.dumps(entries))
    return f"json:{folder / 'pairs.json'}?image_root=/"


def as_tar(pictures: Pictures, folder: Path) -> str:
    """webdataset's shards."""
    folder.mkdir()
    rows = pictures.content()
    for shard in range(0, len(pictures.paths), 512):
        with tarfile.open(folder / f"{shard // 512:05}.tar", "w") as tar:
            for key, file, caption in itertools.islice(rows, 512):
                for name, content in ((f"{key}.jpg", file), (f"{key}.txt", caption.encode())):
                    member = tarfile.TarInfo(name)
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    return f"webdataset:{folder}/*.tar"


def as_records(pictures: Pictures, folder: Path) -> str:
    """The files packed by --mode=prepare."""
    from codebook_jax.tools.prepare import prepare
    from configs import base

    config = base.get_config("base")
    config.prepare.source = as_files(pictures, folder.with_name(f"{folder.name} list"))
    with contextlib.redirect_stdout(sys.stderr):
        prepare(config, folder)
    return f"records:{folder}"


def as_tfds(pictures: Pictures, folder: Path) -> str:
    """A data set of TFDS in ArrayRecord files."""
    import tensorflow_datasets as tfds

    class Pairs(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self) -> tfds.core.DatasetInfo:
            features = {"image": tfds.features.Image(), "caption": tfds.features.Text()}
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features)
            )

        def _split_generators(self, dl_manager: object) -> dict[str, Any]:
            return {"train": self._generate_examples()}

        def _generate_examples(self) -> Iterator[tuple[str, dict[str, Any]]]:
            for key, file, caption in pictures.content():
                yield key, {"image": file, "caption": caption}

    Pairs(data_dir=str(folder), file_format="array_record").download_and_prepare()
    return f"tfds:pairs:train?data_dir={folder}"


def as_parquet(pictures: Pictures, folder: Path) -> str:
    """A data set of Hugging Face."""
    import datasets

    folder.mkdir()
    features = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")})
    rows = {
        "image": [{"bytes": file, "path": None} for _, file, _ in pictures.content()],
        "caption": pictures.captions,
    }
    path = folder / "train-00000-of-00001.parquet"
    datasets.Dataset.from_dict(rows, features).to_parquet(str(path))
    return f"hf:{folder}:train"


WRITERS = {
    "files": as_files,
    "tar": as_tar,
    "records": as_records,
    "tfds": as_tfds,
    "hf": as_parquet,
}
