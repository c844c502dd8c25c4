"""Late fusion as CLIP and ALIGN in every size:
--config=configs/clip.py[:tiny|small|base|large|huge].

Radford et al., ICML 2021, 2.3; Jia et al., ICML 2021, 3.2: two towers trained by one contrastive
loss within the batch, in both directions. No teacher, queue, fusion encoder, matching, masked
words or codebook. The text tower has all of BERT's layers, including those that the other recipes
use in the fusion encoder. All else is as in configs/base.py.
"""

import runpy
from pathlib import Path

import ml_collections

_BASE = runpy.run_path(str(Path(__file__).with_name("base.py")))


def get_config(size: str = "base") -> ml_collections.ConfigDict:
    """The locked config of one size; raises ValueError for a size that does not exist."""
    config = _BASE["paper"](size)
    config.losses.codebook = config.losses.matching = config.losses.masked_lm = 0.0
    config.model.text.depth += config.model.text.fusion_depth
    config.model.text.fusion_depth = 0
    config.codebook.size = 0
    config.queue.size = 0
    config.teacher.use = False
    config.teacher.alpha = 0.0
    config.alignment.intra_weight = 0.0
    config.alignment.same_image = "negative"
    config.data.teacher_view = "same"
    config.evaluation.rerank_top_k = 0
    return config
