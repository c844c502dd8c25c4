"""Visual grounding, RefCOCO+, in every size: --config=configs/finetune_grounding.py[:SIZE]
--config.init=model:EXPORT --config.data.train=grounding:refcoco+_train.json
--config.data.eval=grounding:refcoco+_val.json?detections=dets.json --config.data.image_root=coco
"""

import runpy
from pathlib import Path

import ml_collections

_SHARED = runpy.run_path(str(Path(__file__).with_name("downstream.py")))


def get_config(size: str = "base") -> ml_collections.ConfigDict:
    """The locked config of one size; raises ValueError for a size that does not exist."""
    options = dict(
        batch=256, learning_rate=1e-5, epochs=5, data="scenes:expressions", tiny_rate=5e-5
    )  # ALBEF
    config = _SHARED["of_pairs"](_SHARED["recipe"](size, **options), "grounding", top_k=0)
    with config.unlocked():
        config.data.crop_scale = (1.0, 1.0)  # ALBEF resizes: a crop may lose what is named
        if size == "tiny":  # "the circle" fits many scenes: the most alike are no negatives of it
            config.itm.negatives = "random"
    return config.lock()
