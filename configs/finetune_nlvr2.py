"""NLVR2, sentences about two pictures, in every size: --config=configs/finetune_nlvr2.py[:SIZE]
--config.init=model:EXPORT --config.data.train=nlvr2:train.json --config.data.eval=nlvr2:dev.json
--config.data.image_root=images

Before it, one epoch of text assignment on pairs (Li et al. 2021, appendix; at 256 pixels) teaches
the layers for two pictures: add --config.task=text_assignment --config.train.epochs=1
--config.model.image.size_px=256 and data of pairs, and start NLVR2 from that run's export.
"""

import runpy
from pathlib import Path

import ml_collections

_SHARED = runpy.run_path(str(Path(__file__).with_name("downstream.py")))


def get_config(size: str = "base") -> ml_collections.ConfigDict:
    """The locked config of one size; raises ValueError for a size that does not exist."""
    options = dict(batch=128, learning_rate=2e-5, epochs=10, data="scenes:comparisons")  # ALBEF
    config = _SHARED["task"](_SHARED["recipe"](size, **options), "nlvr2")
    if size == "tiny":  # ours: more steps in the same minutes
        with config.unlocked():
            config.optimizer.freeze = "^towers/(image|text)/"
            config.teacher.update(use=False, alpha=0.0)
            config.data.scenes_examples = 36_000
    return config.lock()
