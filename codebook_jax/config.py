"""What a config may say: a rule for every field, what a restart may change, what must fit."""

from __future__ import annotations

import fnmatch
import json
import math
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import ml_collections

from codebook_jax.errors import UserError

# What a restart may change. A free field says how the run is computed or watched. A fixed one would
# break the order of the data or the shapes of the state once there is a checkpoint; one of the
# tokenizer holds from the first start, which made the workdir's tokenizer from it.
FREE, LEARNED, FIXED, TOKENIZER = "free", "learned", "fixed", "tokenizer"


class Number(NamedTuple):
    """Accepts finite numbers within these limits."""

    least: float = -math.inf
    most: float = math.inf
    above: float = -math.inf
    below: float = math.inf
    whole: bool = False

    def accepts(self, value: object) -> bool:
        if isinstance(value, bool) or not isinstance(value, int if self.whole else int | float):
            return False
        return self.least <= value <= self.most and self.above < value < self.below

    def __str__(self) -> str:
        words = ("of at least", "at most", "above", "below")
        limits = zip(words, self[:4], strict=True)
        named = [f"{word} {limit:g}" for word, limit in limits if not math.isinf(limit)]
        return f"a {'whole' if self.whole else 'finite'} number {' and '.join(named)}".rstrip()


class Kind(NamedTuple):
    """Accepts values of one kind, which `name` describes."""

    name: str
    accepts: Callable[[object], bool]

    def __str__(self) -> str:
        return self.name


class Field(NamedTuple):
    """What a config may say about a field, and what a restart may do with it."""

    rule: Number | Kind
    restart: str = LEARNED
    older: bool | float | str | None = None  # what runs without the field did; None: all have it


def whole(least: int, most: float = math.inf) -> Number:
    """Accepts whole numbers from `least` to `most`."""
    return Number(least, most, whole=True)


def one_of(*names: str) -> Kind:
    """Accepts these texts."""
    return Kind(f"one of {', '.join(names)}", names.__contains__)


def _is_range(value: object) -> bool:
    pair = value if isinstance(value, tuple | list) and len(value) == 2 else (0, 0)
    return all(POSITIVE.accepts(end) for end in pair) and pair[0] <= pair[1]


def _is_pattern(value: object) -> bool:
    try:
        return isinstance(value, str) and bool(re.compile(value))
    except re.error:
        return False


POSITIVE, SHARE = Number(above=0), Number(0, 1)
NOT_NEGATIVE, SHARE_BELOW_ONE = Number(0), Number(0, below=1)
TEXT = Kind("a text", lambda value: isinstance(value, str))
FLAG = Kind("true or false", lambda value: isinstance(value, bool))
SHARES = Kind(
    "shares between 0 and 1, as in (0.25,0.5)",
    lambda value: isinstance(value, tuple | list) and all(map(SHARE.accepts, value)),
)
TEXTS = Kind(
    "texts, as in ('yes','no')",
    lambda value: isinstance(value, tuple | list) and all(isinstance(it, str) for it in value),
)
RANGE = Kind("two positive numbers, the smaller first", _is_range)

# The fields of every task: the run, its model, optimizer and data, and the tools.
COMMON = {
    "size": Field(TEXT, FIXED),
    "task": Field(TEXT, FIXED),
    "seed": Field(whole(0), FIXED),
    "log_every_steps": Field(whole(1), FREE),
    "init": Field(TEXT, TOKENIZER, older="random"),
    "init_allow_partial": Field(FLAG, FREE, older=False),
    "mesh.slices": Field(whole(0), FREE, older=0),
    "mesh.*": Field(whole(-1), FREE),
    "model.dim": Field(whole(1), FIXED),
    "model.pool": Field(one_of("cls", "mean"), FIXED, older="cls"),
    "model.image.stem": Field(one_of("patch", "conv"), FIXED, older="patch"),
    "model.text.position_std": Field(NOT_NEGATIVE, FREE, older=0.0),  # of the start alone
    "model.dtype": Field(one_of("float32", "bfloat16"), FIXED),
    "model.remat": Field(one_of("auto", "none", "blocks", "dots"), FREE),
    "model.scan_unroll": Field(whole(1), FREE),
    "model.attention": Field(one_of("auto", "xla", "cudnn"), FREE),
    "model.image.size_px": Field(whole(1), FIXED),
    "model.image.patch_px": Field(whole(1), FIXED),
    "model.image.mlp_width": Field(whole(0), FIXED, older=0),
    "model.text.mlp_width": Field(whole(0), FIXED, older=0),
    "model.text.max_tokens": Field(whole(4), FIXED),
    "model.text.max_positions": Field(whole(4), FIXED),
    "model.text.dropout": Field(SHARE_BELOW_ONE, FIXED),
    "model.*.width": Field(whole(1), FIXED),
    "model.*.heads": Field(whole(1), FIXED),
    "model.text.fusion_depth": Field(whole(0), FIXED),
    "model.*depth": Field(whole(1), FIXED),
    "model.*.layer_norm_eps": Field(POSITIVE, FIXED),
    "model.*_std": Field(NOT_NEGATIVE, FIXED),
    "optimizer.name": Field(one_of("adamw", "muon"), FIXED, older="adamw"),
    "optimizer.muon_learning_rate": Field(POSITIVE, older=0.02),
    "optimizer.learning_rate": Field(POSITIVE),
    "optimizer.learning_rate_ends": Field(NOT_NEGATIVE),
    "optimizer.warmup_steps": Field(whole(0)),
    "optimizer.weight_decay": Field(NOT_NEGATIVE),
    "optimizer.b1": Field(SHARE_BELOW_ONE),
    "optimizer.b2": Field(SHARE_BELOW_ONE),
    "optimizer.eps": Field(POSITIVE),
    "optimizer.clip_norm": Field(NOT_NEGATIVE),
    "optimizer.freeze": Field(Kind("a regular expression", _is_pattern), FIXED, older=""),
    "optimizer.layer_decay": Field(Number(above=0, most=1), older=1.0),
    "optimizer.accumulation": Field(whole(1), FREE),
    "optimizer.max_bad_steps": Field(whole(1), FREE),
    "data.train": Field(TEXT, TOKENIZER),
    "data.eval": Field(TEXT, FREE),
    "data.test": Field(TEXT, FREE),
    "data.image_root": Field(TEXT, FREE),
    "data.path_map": Field(TEXT, FREE, older=""),
    "data.damaged_shards": Field(one_of("refuse", "skip"), FREE, older="refuse"),
    "data.scenes_examples": Field(whole(1), FIXED),
    "data.global_batch": Field(whole(2), FIXED),
    "data.alike": Field(whole(0), FIXED, older=0),
    "data.alike_window": Field(whole(2), FIXED, older=64),
    "data.tokenizer": Field(TEXT, TOKENIZER),
    "data.tokenizer_vocabulary": Field(whole(1), TOKENIZER),
    "data.tokenizer_lowercase": Field(FLAG, TOKENIZER, older=True),
    # the tokenizers of older runs stripped accents and still do; the same command continues them
    "data.tokenizer_strip_accents": Field(FLAG, TOKENIZER, older=False),
    "data.teacher_view": Field(one_of("independent", "same")),
    "data.crop_scale": Field(RANGE),
    "data.crop_ratio": Field(RANGE),
    "data.flip": Field(FLAG),
    "data.randaugment_layers": Field(whole(0)),
    "data.randaugment_magnitude": Field(Number(0, 10)),
    "data.workers": Field(whole(0), FREE),
    "data.threads": Field(whole(1), FREE),
    "data.prefetch": Field(whole(1), FREE),
    "data.patience_s": Field(Number(1), FREE, older=600.0),
    "data.max_bad_rate": Field(SHARE, FREE),
    "train.steps": Field(whole(1)),
    "train.epochs": Field(NOT_NEGATIVE, older=0.0),
    "train.memory_check": Field(FLAG, FREE),
    "evaluation.prompts": Field(TEXTS, FREE, older=("{}",)),
    "evaluation.between": Field(SHARES, FREE, older=()),
    "export.between": Field(SHARE, FREE, older=1.0),
    "evaluation.every_steps": Field(whole(-1), FREE),
    "evaluation.images": Field(whole(-1), FREE),
    "evaluation.batch": Field(whole(1), FREE),
    "evaluation.rerank_top_k": Field(whole(0), FREE),
    "evaluation.rerank_on_schedule": Field(FLAG, FREE),
    "evaluation.rerank_score": Field(one_of("logit", "log_odds"), FREE, older="logit"),
    "evaluation.rerank_dual_weight": Field(NOT_NEGATIVE, FREE, older=0.0),
    "checkpoint.*": Field(whole(1), FREE),
    "export.format": Field(one_of("codis", "huggingface", "albef"), FREE, older="codis"),
    "export.teacher": Field(FLAG, FREE),
    "prepare.source": Field(TEXT, FREE),
    "prepare.role": Field(one_of("train", "validation", "test"), FREE),
    "prepare.side_px": Field(whole(0), FREE),
    "prepare.quality": Field(whole(1, 100), FREE),
    "prepare.shard_records": Field(whole(1), FREE),
    "prepare.beam_*": Field(TEXT, FREE),
    "*.processes": Field(whole(0), FREE),
    "check.decode": Field(FLAG, FREE),
    "check.least_side_px": Field(whole(0), FREE),
    "check.near_bits": Field(whole(0, 15), FREE),  # more would match unrelated pictures
    "check.max_bad_share": Field(SHARE, FREE),
}
# What every task with a codebook says of it.
OF_CODEBOOKS = ("size", "temperature", "solver", "epsilon", "iterations", "swav_iterations")
OF_CODEBOOKS += ("ipot_beta", "tau", "freeze_steps")
# The fields of pre-training.
PRETRAINING = {
    "losses.*": Field(NOT_NEGATIVE),
    "alignment.intra_weight": Field(NOT_NEGATIVE),
    "alignment.same_image": Field(one_of("ignore", "negative", "positive")),
    "alignment.temperature*": Field(POSITIVE),
    "codebook.size": Field(whole(0), FIXED),
    "codebook.temperature": Field(POSITIVE),
    "codebook.solver": Field(TEXT),
    "codebook.epsilon": Field(POSITIVE),
    "codebook.iterations": Field(whole(1)),
    "codebook.swav_iterations": Field(whole(1), older=3),
    "codebook.ipot_beta": Field(POSITIVE),
    "codebook.tau": Field(Number(most=1, above=0), older=0.9),
    "codebook.decay": Field(SHARE, older=0.99),
    "codebook.move_unused_after": Field(whole(1), older=100),
    "codebook.softmax_temperature": Field(POSITIVE, older=0.04),
    "codebook.center_momentum": Field(SHARE, older=0.9),
    "codebook.queue_samples": Field(whole(0)),
    "codebook.freeze_steps": Field(whole(0)),
    "codebook.window_samples": Field(whole(1)),
    "teacher.use": Field(FLAG, FIXED, older=True),
    "teacher.momentum": Field(SHARE),
    "teacher.momentum_ramp": Field(FLAG),
    "teacher.alpha": Field(SHARE),
    "teacher.alpha_steps": Field(whole(-1)),
    "queue.size": Field(whole(0), FIXED),
    "queue.ids": Field(FLAG, FIXED, older=False),
    "itm.groups": Field(whole(0), FIXED),
    "itm.negatives": Field(one_of("hard", "random"), older="hard"),
    "mlm.*": Field(SHARE),
}
# The fields of fine-tuning tasks, each of which may add its own.
FINETUNING = {
    "teacher.use": PRETRAINING["teacher.use"],
    "teacher.momentum": PRETRAINING["teacher.momentum"],
    "teacher.momentum_ramp": PRETRAINING["teacher.momentum_ramp"],
    "teacher.alpha": PRETRAINING["teacher.alpha"],
    "teacher.alpha_steps": PRETRAINING["teacher.alpha_steps"],
}
VQA = {
    "vqa.decoder_depth": Field(whole(1), FIXED),
    "vqa.answers": Field(whole(1), FIXED),
    "vqa.answer_tokens": Field(whole(3), FIXED),
    "vqa.candidates_file": Field(TEXT, FREE),
    "vqa.candidates": Field(TEXTS, FREE),
    "vqa.candidates_most": Field(whole(1), FREE),
    "vqa.shortlist": Field(whole(1), FREE),
    "vqa.method": Field(one_of("rank", "generate"), FREE),
}
LABELS = {"labels.names": Field(TEXTS, FIXED)}
FROM_DATA = ("vqa.candidates", "labels.names")  # filled in at the start if they are empty
# The fields of sequences: some of those, and how steps are aligned.
SEQUENCES = {
    name: field
    for name, field in PRETRAINING.items()
    if name.startswith(("losses.", "alignment.intra", "alignment.temperature", "teacher.momentum"))
    or name in {f"codebook.{own}" for own in OF_CODEBOOKS}
} | {
    "sequences.max_*": Field(whole(1), FIXED),
    "sequences.ordered": Field(FLAG),
    "sequences.locality": Field(Number()),
    "sequences.spread": Field(Number(1e-3)),
    "sequences.width": Field(Number(1e-3)),
    "sequences.slack": Field(Number(above=0, most=1)),
    "sequences.iterations": Field(whole(1)),
}
FIELDS = COMMON | PRETRAINING | SEQUENCES | FINETUNING | VQA | LABELS


def field_of(name: str, fields: Mapping[str, Field] = FIELDS) -> Field | None:
    """The entry of a field by its dotted name: its own, otherwise the first pattern that fits."""
    matches = (field for pattern, field in fields.items() if fnmatch.fnmatch(name, pattern))
    return fields.get(name) or next(matches, None)


def restart_of(name: str) -> str:
    """What a restart may do with a field: FREE, LEARNED, FIXED or TOKENIZER."""
    field = field_of(name)
    return LEARNED if field is None else field.restart


def check_fields(config: ml_collections.ConfigDict, needed: Mapping[str, Field] = COMMON) -> None:
    """Raises UserError, with the field and its value, if one breaks its rule, or if one of the
    `needed`, which may be a task's own, is missing.
    """
    values = flat(config.to_dict())
    for name in needed:
        if "*" not in name and name not in values:
            raise UserError(f"config.{name} is missing: set it as configs/base.py does")
    for name, value in values.items():
        field = field_of(name, FIELDS | needed)
        if field is not None and not field.rule.accepts(value):
            raise UserError(f"config.{name}={value!r} cannot be used: give {field.rule}")


def with_fields(
    config: ml_collections.ConfigDict, fields: Mapping[str, Any]
) -> ml_collections.ConfigDict:
    """A locked copy of the config with these fields, by their dotted names."""
    changed = ml_collections.ConfigDict(config.to_dict())
    changed.update_from_flattened_dict(fields)
    return changed.lock()


def changed_fields(old: dict[str, Any], new: dict[str, Any]) -> dict[str, list[Any]]:
    """{dotted name: [old, new]} of the fields that both have and that differ."""
    before, after = flat(json.loads(json.dumps(old))), flat(json.loads(json.dumps(new)))
    return {
        name: [before[name], after[name]]
        for name in after
        if name in before and before[name] != after[name]
    }


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{dotted name: value} of a config's nested sections."""
    found = {}
    for name, value in tree.items():
        place = f"{prefix}{name}"
        found |= flat(value, f"{place}.") if isinstance(value, dict) else {place: value}
    return found
