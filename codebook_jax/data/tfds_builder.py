"""Any source as a data set of TensorFlow Datasets, written to ArrayRecord files without TensorFlow.

    import codebook_jax.data.tfds_builder  # registers `codebook_pairs`
    sources = {"train": "json:data/mine/train.json", "validation": "json:data/mine/val.json"}
    builder = tfds.builder("codebook_pairs", data_dir="data/tfds", sources=sources)
    builder.download_and_prepare()
    tfds.data_source("codebook_pairs", data_dir="data/tfds", split="train")[0]

To train here, `--mode=prepare` is simpler.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds  # pip install "codebook_jax[tfds]"

from codebook_jax.data.images import UnreadableImage
from codebook_jax.data.packing import packed_picture
from codebook_jax.data.sources import KINDS, open_source
from codebook_jax.errors import UserError

_ROLES = {"validation": "validation", "val": "validation", "dev": "validation", "test": "test"}


class CodebookPairs(tfds.core.GeneratorBasedBuilder):
    """A split for each source: {"image": JPEG, "captions": [text], "image_id", "name"}."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "The pairs of any source, in its order."}  # noqa: RUF012 (as tfds has it)
    code_path = Path(__file__)  # else found with importlib_resources, which tfds does not install

    def __init__(
        self,
        *,
        sources: Mapping[str, str] | None = None,
        image_root: str = "",
        path_map: str = "",
        side_px: int = 512,
        quality: int = 95,
        size_px: int = 256,
        **kwargs: Any,
    ) -> None:
        """`sources` is {split: a source as in config.data.train}; None reads what was prepared.

        In splits called validation or test, an image is one record with all its captions. `size_px`
        is the size of scenes, the others are as in the config; `kwargs` are those of any builder.
        """
        self._sources, self._packing = dict(sources or {}), (side_px, quality)
        self._settings = {"image_root": image_root, "path_map": path_map, "size_px": size_px}
        super().__init__(**{"file_format": "array_record", **kwargs})

    def _info(self) -> tfds.core.DatasetInfo:
        features = {
            "image": tfds.features.Image(shape=(None, None, 3), encoding_format="jpeg"),
            "captions": tfds.features.Sequence(tfds.features.Text()),
            "image_id": tfds.features.Scalar(np.int64),
            "name": tfds.features.Text(),
        }
        return self.dataset_info_from_configs(
            description="Images with captions, packed by codebook_jax.",
            features=tfds.features.FeaturesDict(features),
            disable_shuffling=True,  # the order of the source
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, dict]]]:
        if not self._sources:
            cure = 'pass its sources, for example sources={"train": "json:PAIRS.json"}'
            raise UserError(f"codebook_pairs is not prepared yet: {cure}")
        return {split: self._generate_examples(split) for split in self._sources}

    def _generate_examples(self, split: str) -> Iterator[tuple[int, dict[str, Any]]]:
        """(key, example) of every pair whose picture can be read; prints those that cannot."""
        spec, role = self._sources[split], _ROLES.get(split, "train")
        source = open_source(spec, role=role, scenes_examples=1000, seed=0, **self._settings)
        if source.kind != "pairs":
            held = KINDS[source.kind][0]
            raise UserError(f"{spec} lists {held}, not pairs: pack examples with --mode=prepare")
        for number in range(len(source)):
            name = source.name(number)
            try:
                record = source[number]
                jpeg, *_ = packed_picture(record.image, *self._packing)
            except UnreadableImage as failure:
                print(f"{split}: left out {name}: {failure}", flush=True)
                continue
            example = {"image": jpeg, "captions": list(record.captions)}
            yield number, example | {"image_id": record.image_id, "name": name}
