"""The paper's pre-training: --config=configs/pretrain_4m.py --config.data.train=json:PATH
--config.data.eval=json:PATH

Duan et al., CVPR 2022, section 4: 4.0 M images with 5.1 M captions (COCO, Visual Genome, Conceptual
Captions 3M, SBU), 30 epochs at a global batch of 512, from a DeiT-B/16 and BERT-base. All else is
as in configs/base.py:base.
"""

import runpy
from pathlib import Path

import ml_collections

_BASE = runpy.run_path(str(Path(__file__).with_name("base.py")))
PAIRS, EPOCHS = 5_100_000, 30


def get_config(size: str = "base") -> ml_collections.ConfigDict:
    """The locked config; raises ValueError for another size than the paper's."""
    if size != "base":
        raise ValueError(
            f"configs/pretrain_4m.py has the paper's size alone, base, and not {size!r}."
        )
    config = _BASE["get_config"](size)
    # Downloaded from the Hugging Face hub; folders work too. `random` starts from random weights.
    config.init = "image:facebook/deit-base-patch16-224,text:google-bert/bert-base-uncased"
    config.train.steps = EPOCHS * PAIRS // config.data.global_batch
    config.data.train = ""  # name your own; docs/data.md has the commands for these four
    config.data.eval = ""
    config.data.crop_scale = (0.2, 1.0)  # ALBEF
    config.data.flip = True  # ALBEF; also swaps left and right in the caption
    config.data.randaugment_layers = 2  # ALBEF
    return config
