"""NLVR2, sentences about two pictures, in every size: --config=configs/finetune_nlvr2.py[:SIZE]
--config.init=model:EXPORT --config.data.train=nlvr2:train.json --config.data.eval=nlvr2:dev.json
--config.data.image_root=images
"""

import runpy
from pathlib import Path

import ml_collections

_SHARED = runpy.run_path(str(Path(__file__).with_name("downstream.py")))


def get_config(size: str = "base") -> ml_collections.ConfigDict:
    """The locked config of one size; raises ValueError for a size that does not exist."""
    options = dict(batch=128, learning_rate=2e-5, epochs=10, data="scenes:comparisons")  # ALBEF
    config = _SHARED["task"](_SHARED["recipe"](size, **options), "nlvr2")
    with config.unlocked():
        # true: which of two pictures a text of pairs belongs to, or neither; one epoch of it at 256
        # pixels comes before NLVR2 (ALBEF)
        config.nlvr2 = dict(text_assignment=False)
    return config.lock()
