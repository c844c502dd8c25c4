"""A linear probe of the image encoder, in every size: --config=configs/finetune_labels.py[:SIZE]
--config.init=model:EXPORT --config.data.train=folders:train --config.data.eval=folders:val

With --config.optimizer.freeze= the whole encoder is fine-tuned. Without any training,
--mode=eval --config.data.test=folders:val tells labels by prompts.
"""

import runpy
from pathlib import Path

import ml_collections

_SHARED = runpy.run_path(str(Path(__file__).with_name("downstream.py")))


def get_config(size: str = "base") -> ml_collections.ConfigDict:
    """The locked config of one size; raises ValueError for a size that does not exist."""
    options = dict(
        batch=256, learning_rate=1e-3, epochs=10, data="scenes:labels", tiny_rate=3e-2
    )  # ours
    config = _SHARED["task"](_SHARED["recipe"](size, **options), "labels")
    with config.unlocked():
        config.labels = dict(names=())  # filled in at the start: all that training data have
        config.teacher.update(use=False, alpha=0.0)
        config.optimizer.freeze = "^towers/"
        config.evaluation.between = ()
    return config.lock()
