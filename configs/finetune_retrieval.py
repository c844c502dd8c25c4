"""Retrieval, COCO or Flickr30K, in every size: --config=configs/finetune_retrieval.py[:SIZE]
--config.init=model:EXPORT --config.data.train=karpathy:dataset_coco.json
--config.data.eval=karpathy:dataset_coco.json --config.data.image_root=coco

Flickr30K takes --config.train.epochs=10 --config.evaluation.rerank_top_k=128.
"""

import runpy
from pathlib import Path

import ml_collections

_SHARED = runpy.run_path(str(Path(__file__).with_name("downstream.py")))


def get_config(size: str = "base") -> ml_collections.ConfigDict:
    """The locked config of one size; raises ValueError for a size that does not exist."""
    options = dict(batch=256, learning_rate=1e-5, epochs=5, data="scenes", tiny_rate=5e-5)  # ALBEF
    return _SHARED["of_pairs"](_SHARED["recipe"](size, **options), "retrieval", top_k=256).lock()
