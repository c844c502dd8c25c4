"""What the recipes of the downstream tasks share; configs/finetune_TASK.py has each.

Li et al., NeurIPS 2021, appendix, whose recipes Duan et al., CVPR 2022, follow: AdamW, a cosine
from 1e-5 or 2e-5 to 1e-6, 384 pixels, crops of 0.5 to 1, mirrored at random, RandAugment, soft
targets of an EMA teacher at 0.4. `tiny` suits the built-in scenes: minutes on two cores.
"""

import runpy
from pathlib import Path

import ml_collections

_BASE = runpy.run_path(str(Path(__file__).with_name("base.py")))
# Parts of pre-training that no task with a head or a decoder of its own has.
_NOT_USED = ("losses", "alignment", "codebook", "queue", "itm", "mlm")


def recipe(
    size: str,
    *,
    batch: int,
    learning_rate: float,
    epochs: float,
    data: str,
    tiny_rate: float = 2e-4,
) -> ml_collections.ConfigDict:
    """The unlocked config of pre-training in one size with what fine-tuning changes; raises
    ValueError for a size that does not exist. `batch` is of all devices;
    ALBEF's is of each of 8. `tiny_rate` is the learning rate of `tiny`, ours, by validation.
    """
    config, tiny = _BASE["get_config"](size), size == "tiny"
    with config.unlocked():
        config.init = "model:"  # name what it starts from: an export, a run, or ALBEF's file
        config.model.image.size_px = 64 if tiny else 384  # ALBEF
        config.teacher.update(use=True, momentum=0.995, momentum_ramp=tiny, alpha=0.4)  # ALBEF
        config.optimizer.update(
            name="adamw",
            learning_rate=tiny_rate if tiny else learning_rate,
            learning_rate_ends=1e-6,  # ALBEF: of the cosine; its warm-up starts from 1e-5
            warmup_steps=20 if tiny else 1000,
        )
        config.train.epochs = 2.0 if tiny else float(epochs)  # 0: train.steps counts
        config.data.update(
            train=data,
            eval=data,
            global_batch=64 if tiny else batch,
            alike=0,
            teacher_view="same",  # ALBEF
            crop_scale=(1.0, 1.0) if tiny else (0.5, 1.0),  # ALBEF; scenes: whole pictures
            flip=not tiny,  # ALBEF; left and right change places in texts
            randaugment_layers=0 if tiny else 2,  # ALBEF
        )
        config.evaluation.update(every_steps=-1, between=(0.25, 0.5, 0.75))  # once an epoch
    return config


def task(config: ml_collections.ConfigDict, name: str) -> ml_collections.ConfigDict:
    """The config as that of a task with a head or a decoder of its own."""
    with config.unlocked():
        config.task = name
        for section in _NOT_USED:
            del config[section]
        config.evaluation.rerank_top_k = 0
    return config


def of_pairs(
    config: ml_collections.ConfigDict, name: str, *, top_k: int
) -> ml_collections.ConfigDict:
    """The config as that of a task with the parts of pre-training, which learns to align and to
    match: all texts of an image are positives (ALBEF).
    """
    tiny = config.size == "tiny"
    with config.unlocked():
        config.task = name
        config.losses.update(codebook=0.0, masked_lm=0.0)  # ALBEF
        config.alignment.same_image = "positive"  # ALBEF
        config.evaluation.rerank_top_k = min(top_k, 16) if tiny else top_k
    return config
