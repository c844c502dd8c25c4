"""Visual entailment, SNLI-VE, in every size: --config=configs/finetune_entailment.py[:SIZE]
--config.init=model:EXPORT --config.data.train=entailment:snli_ve_train.jsonl
--config.data.eval=entailment:snli_ve_dev.jsonl --config.data.image_root=flickr30k-images
"""

import runpy
from pathlib import Path

import ml_collections

_SHARED = runpy.run_path(str(Path(__file__).with_name("downstream.py")))


def get_config(size: str = "base") -> ml_collections.ConfigDict:
    """The locked config of one size; raises ValueError for a size that does not exist."""
    options = dict(batch=256, learning_rate=2e-5, epochs=5, data="scenes:statements")  # ALBEF
    config = _SHARED["task"](_SHARED["recipe"](size, **options), "entailment")
    config.teacher.alpha_steps = 0  # ALBEF: no ramp
    return config.lock()
