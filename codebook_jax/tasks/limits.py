"""What must fit together in a pre-training config, and what its automatic choices mean."""

from __future__ import annotations

import operator
from collections.abc import Callable

import ml_collections

from codebook_jax.config import COMMON, PRETRAINING, check_fields, flat, with_fields
from codebook_jax.errors import UserError
from codebook_jax.method import assignment

# How features are assigned to codewords, by `codebook.solver`, from the section `config.codebook`.
# A new assignment is one function and one line here.
ASSIGNMENTS: dict[str, Callable[[ml_collections.ConfigDict], assignment.Assign]] = {
    "sinkhorn": lambda c: assignment.sinkhorn(epsilon=c.epsilon, iterations=c.iterations),
    "ipot": lambda c: assignment.ipot(beta=c.ipot_beta, iterations=c.iterations),
    "swav": lambda c: assignment.swav(epsilon=c.epsilon, iterations=c.swav_iterations),
    "unbalanced": lambda c: assignment.unbalanced(
        epsilon=c.epsilon, tau=c.tau, iterations=c.iterations
    ),
    "nearest": lambda c: assignment.nearest(),
    "softmax": lambda c: assignment.softmax(temperature=c.softmax_temperature),
}
# What a format of export takes for granted; Hugging Face's leaves the pooling to who uses it.
GRANTED = {
    "albef": {"model.image.stem": "patch", "model.pool": "cls"},
    "huggingface": {"model.image.stem": "patch"},
}
FEW = 8  # pairs in a group of negatives below which a run is warned; ours: ALBEF has 64
PAIRS = "name your pairs, e.g. json:PATH, or scenes"


Fit = tuple[str, Callable[..., bool], str]


def _divides(whole: int, part: int) -> bool:
    return whole % part == 0


# Fields, whether their values fit, and what is needed: of every task that has the towers, ...
TOWERS_FITTING = (
    ("data.train", bool, PAIRS),
    ("data.eval", bool, PAIRS),
    (
        "data.global_batch data.alike",
        lambda batch, alike: alike == 0 or (alike > 1 and _divides(batch, alike)),
        "groups of two or more alike pairs must fill the batch; 0: none",
    ),
    ("model.text.max_tokens model.text.max_positions", operator.le, "each token needs a position"),
    ("model.image.size_px model.image.patch_px", _divides, "patches must fill the image"),
    (
        "model.image.stem model.image.patch_px model.image.width",
        lambda stem, px, width: stem != "conv" or (px in (4, 8, 16, 32) and width % px == 0),
        "convolutions make patches of 4, 8, 16 or 32, which must divide the width",
    ),
    ("model.image.width model.image.heads", _divides, "the heads must divide the width"),
    ("model.text.width model.text.heads", _divides, "the heads must divide the width"),
)
# ... of those with a temperature ...
COMMON_FITTING = (
    *TOWERS_FITTING,
    (
        "alignment.temperature_min alignment.temperature alignment.temperature_max",
        lambda least, first, most: least <= first <= most,
        "the first temperature must lie in its range",
    ),
)
# ... and of pre-training.
FITTING = (
    *COMMON_FITTING,
    (
        "losses.alignment losses.codebook losses.matching losses.masked_lm",
        lambda *weights: any(weights),
        "give one a weight, or nothing is learned",
    ),
    ("codebook.solver", ASSIGNMENTS.__contains__, f"give one of {', '.join(ASSIGNMENTS)}"),
    (
        "losses.codebook codebook.size",
        lambda weight, size: size > 1 or size == weight == 0,
        "the loss needs two codewords or more; without it, 0 keeps none",
    ),
    (
        "queue.size data.global_batch",
        lambda size, batch: size == 0 or size >= batch,
        "the queue must hold at least one batch, or nothing (0)",
    ),
    (
        "teacher.use teacher.alpha queue.size alignment.intra_weight",
        lambda use, *needs: use or not any(needs),
        "all but the first need a teacher: without one, give them 0",
    ),
    (
        "teacher.use data.teacher_view",
        lambda use, view: use or view == "same",
        "there is no teacher to see a view of its own: give same",
    ),
    (
        "model.text.fusion_depth losses.matching losses.masked_lm evaluation.rerank_top_k",
        lambda depth, *needs: depth or not any(needs),
        "all but the first need a fusion encoder: without one, give them 0",
    ),
    ("codebook.queue_samples queue.size", operator.le, "the queue does not hold so many"),
    ("mlm.mask_share mlm.random_share", lambda *both: sum(both) <= 1, "their sum is at most 1"),
)


def check(config: ml_collections.ConfigDict) -> None:
    """Raises UserError, with the fields and their values, if no pre-training can start so."""
    check_fields(config, COMMON | PRETRAINING)
    check_fitting(config, FITTING)


def check_fitting(config: ml_collections.ConfigDict, fitting: tuple[Fit, ...]) -> None:
    """Raises UserError, with the fields and their values, for the first that do not fit."""
    values = flat(config.to_dict())
    for names, fit, needed in fitting:
        if not fit(*(values[name] for name in names.split())):
            given = ", ".join(f"config.{name}={values[name]!r}" for name in names.split())
            raise UserError(f"{given} cannot be used: {needed}")


def check_export(config: ml_collections.ConfigDict) -> None:
    """Raises UserError if the model lacks what `config.export` asks for."""
    form, teacher = config.export.format, config.export.teacher
    needs = {"teacher": config.teacher.use} if form == "albef" or teacher else {}
    if form == "albef":
        needs |= {"fusion encoder": config.model.text.fusion_depth, "queue": config.queue.size}
    if lacks := [f"no {part}" for part, there in needs.items() if not there]:
        raise UserError(
            f"config.export.format={form!r} with config.export.teacher={teacher!r} cannot be "
            f"written: this model has {', '.join(lacks)}"
        )
    values = flat(config.to_dict())
    for name, granted in GRANTED.get(form, {}).items():
        if (value := values[name]) != granted:
            raise UserError(
                f"config.export.format={form!r} cannot be written: it has no place for "
                f"config.{name}={value!r}; codis has"
            )


def resolve(
    config: ml_collections.ConfigDict,
    before: ml_collections.ConfigDict | None,
    *,
    shards: int,
    examples: int,
) -> ml_collections.ConfigDict:
    """Groups of negatives: the given number, else the run's, else data shards x accumulation.

    `teacher.alpha_steps` -1 means the steps of one epoch. Of an older run, the queue has no ids.
    """
    config = in_steps(config, examples)
    ids = config.queue.ids if before is None else before.queue.ids
    groups = config.itm.groups
    batch, passes = config.data.global_batch, config.optimizer.accumulation
    if groups == 0:
        groups = before.itm.groups if before is not None else shards * passes
    check_groups(batch, passes, shards, groups)
    return with_fields(config, {"itm.groups": groups, "queue.ids": ids})


def in_steps(config: ml_collections.ConfigDict, examples: int) -> ml_collections.ConfigDict:
    """`train.epochs` as steps, and -1 of other numbers of steps as those of one epoch."""
    epoch = max(1, examples // config.data.global_batch)
    found = {}
    if config.train.epochs:
        found["train.steps"] = max(1, round(config.train.epochs * epoch))
    values = flat(config.to_dict())
    for name in ("evaluation.every_steps", "teacher.alpha_steps"):
        if values.get(name, 0) < 0:
            found[name] = epoch
    return with_fields(config, found)


def cautions(config: ml_collections.ConfigDict) -> list[str]:
    """Sentences on what can work but learns little."""
    return [*long_warmup(config), *_few_negatives(config)]


def _few_negatives(config: ml_collections.ConfigDict) -> list[str]:
    """A sentence on groups of matching negatives with few pairs."""
    groups, batch = config.itm.groups, config.data.global_batch
    pairs = batch // groups
    if not config.losses.matching or pairs >= FEW:
        return []
    return [
        f"config.itm.groups={groups} splits config.data.global_batch={batch} into groups of "
        f"{pairs} pairs, and a negative is one of {pairs - 1} others: give a batch of "
        f"{FEW * groups} or more, or a new run fewer groups"
    ]


def long_warmup(config: ml_collections.ConfigDict) -> list[str]:
    """A sentence on a learning rate that climbs for more than half of the steps."""
    warmup, steps = config.optimizer.warmup_steps, config.train.steps
    if 2 * warmup <= steps:
        return []
    return [
        f"config.optimizer.warmup_steps={warmup:,} is more than half of the {steps:,} steps, and "
        f"the learning rate hardly reaches its peak: give fewer, such as {steps // 10}"
    ]


def check_groups(batch: int, passes: int, shards: int, groups: int) -> None:
    """Raises UserError if the batch cannot be split into these groups of negatives."""
    if batch % groups or batch // groups < 2:
        raise UserError(
            f"config.itm.groups={groups} does not split config.data.global_batch={batch} into "
            "equal groups of two or more pairs: choose another batch or fewer groups"
        )
    if passes > 1 and groups % (shards * passes):
        raise UserError(
            f"config.optimizer.accumulation={passes} on {shards} data shards needs "
            f"config.itm.groups to be a multiple of {shards * passes}, but it is {groups}: a group "
            "of negatives must lie in one pass"
        )
