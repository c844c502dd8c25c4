"""Visual question answering, VQA 2.0, in every size: --config=configs/finetune_vqa.py[:SIZE]
--config.init=model:EXPORT --config.data.train=vqa:vqa_train.json,vqa:vg_qa.json
--config.data.eval=vqa:vqa_val.json --config.data.test=vqa:vqa_test.json
--config.data.image_root=images. For a submission, also train on vqa_val.json, as ALBEF does.
"""

import runpy
from pathlib import Path

import ml_collections

_SHARED = runpy.run_path(str(Path(__file__).with_name("downstream.py")))


def get_config(size: str = "base") -> ml_collections.ConfigDict:
    """The locked config of one size; raises ValueError for a size that does not exist."""
    options = dict(batch=256, learning_rate=2e-5, epochs=8, data="scenes:questions")  # ALBEF
    config, tiny = _SHARED["task"](_SHARED["recipe"](size, **options), "vqa"), size == "tiny"
    with config.unlocked():
        config.model.text.max_tokens = 24 if tiny else 25  # ALBEF
        config.vqa = dict(
            decoder_depth=2
            if tiny
            else 6,  # ALBEF: as many as the fusion encoder, which they start as
            answers=4
            if tiny
            else 10,  # different ones to a question that are learned; VQA has 10 people
            answer_tokens=6 if tiny else 10,  # of an answer, with its first and last
            candidates_file="",  # JSON list of answers to rank; empty: the commonest in training
            candidates=(),  # these answers, filled in at the start
            candidates_most=3128,  # how many of those; ALBEF
            shortlist=32 if tiny else 128,  # of them, by their first word; ALBEF
            method="rank",  # "rank" the candidates (ALBEF) | "generate" any words
        )
    return config.lock()
