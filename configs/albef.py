"""ALBEF's objective in this code, in every size:
--config=configs/albef.py[:tiny|small|base|large|huge].

Li et al., NeurIPS 2021: no codebook, no intra-modal terms, one view for teacher and student, other
captions of the same image as negatives in the alignment (never in the matching, as everywhere in
this code). All else is as in configs/base.py, whose crops, flips and RandAugment suit the built-in
scenes; configs/pretrain_4m.py has ALBEF's.
"""

import runpy
from pathlib import Path

import ml_collections

_BASE = runpy.run_path(str(Path(__file__).with_name("base.py")))


def get_config(size: str = "base") -> ml_collections.ConfigDict:
    """The locked config of one size; raises ValueError for a size that does not exist."""
    config = _BASE["paper"](size)
    config.losses.codebook = 0.0
    config.alignment.intra_weight = 0.0
    config.alignment.same_image = "negative"
    config.queue.ids = False  # nothing would read them
    config.data.teacher_view = "same"
    return config
