"""Stories: sequences of frames and of sentences, aligned in their order. In every size:
--config=configs/sequences.py[:tiny|small|base|large|huge].

Data: json:STORIES.json, a list of {"frames": [paths in order], "captions": [sentences in order]}
(visual stories, instruction steps, subtitles), or the built-in scenes:stories. The towers, the
codebook and the optimizer are those of configs/base.py, with two losses: the code loss of every
step, carried over the alignment, and a contrast among all steps of a batch.
"""

import runpy
from pathlib import Path

import ml_collections

_BASE = runpy.run_path(str(Path(__file__).with_name("base.py")))
# Fields of pre-training that this task does not have.
_NOT_USED = {
    "losses": ("matching", "masked_lm"),
    "alignment": ("same_image",),
    "codebook": (
        "queue_samples",
        "window_samples",
        "decay",
        "move_unused_after",
        "softmax_temperature",
        "center_momentum",
    ),
    "teacher": ("use", "alpha", "alpha_steps"),
}


def get_config(size: str = "base") -> ml_collections.ConfigDict:
    """The locked config of one size; raises ValueError for a size that does not exist."""
    config, tiny = _BASE["paper"](size), size == "tiny"
    with config.unlocked():
        config.task = "sequences"
        for section, fields in _NOT_USED.items():
            for field in fields:
                del config[section][field]
        del config.queue, config.itm, config.mlm
        config.sequences = dict(
            max_frames=6 if tiny else 16,  # of a longer story, evenly spaced ones are read
            max_sentences=6 if tiny else 16,
            ordered=True,  # false: steps are aligned as a bag, which knows no order
            # lambda1: reward for steps at the same relative place; ours, by benchmarks/sequences.py
            # --sweep: the authors' 50 swamps cosines
            locality=1.0,
            # lambda2: weight of the diagonal prior, and the entropic epsilon; ours, likewise
            spread=0.2,
            # delta: standard deviation of the prior, in steps off the diagonal; Su & Hua
            width=1.0,
            # share of either side that is matched; below 1, narration may mention what is not shown
            slack=1.0,
            iterations=100,  # Sinkhorn's
        )
        config.model.text.fusion_depth = 0
        config.data.train = config.data.eval = "scenes:stories"
        config.evaluation.rerank_top_k = 0
        config.data.global_batch = 16 if tiny else config.data.global_batch // 16  # stories
        if tiny:
            config.train.steps = 200
            config.optimizer.warmup_steps = 40
    return config.lock()
