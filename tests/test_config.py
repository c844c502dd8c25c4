"""Every field of every config has a rule, and what breaks a rule is refused with its value."""

import functools
import math
import runpy

import ml_collections
import pytest
from small_run import ROOT

from codebook_jax.build import check
from codebook_jax.config import FIELDS, Field, Number, check_fields, field_of, flat, whole
from codebook_jax.errors import UserError
from configs import base

RECIPES = [("base.py", size) for size in base.SIZES]
RECIPES += [(file, size) for file in ("albef.py", "clip.py", "paper.py") for size in base.SIZES]
RECIPES += [("pretrain_4m.py", "base")]
RECIPES += [("sequences.py", size) for size in base.SIZES]
TASKS = ("entailment", "grounding", "labels", "nlvr2", "retrieval", "vqa")
FINETUNES = [f"finetune_{task}.py" for task in TASKS]
RECIPES += [(file, size) for file in FINETUNES for size in ("tiny", "base")]
NO_TEACHER = {"teacher.use": False, "teacher.alpha": 0.0, "queue.size": 0}
NO_TEACHER |= {"alignment.intra_weight": 0.0, "data.teacher_view": "same"}
NO_FUSION = {"losses.matching": 0.0, "losses.masked_lm": 0.0, "evaluation.rerank_top_k": 0}
NO_FUSION |= {"model.text.fusion_depth": 0}


def shipped(file, size):
    return runpy.run_path(str(ROOT / "configs" / file))["get_config"](size)


OTHERS = [shipped(file, "tiny") for file in ("sequences.py", *FINETUNES)]
NAMES = list(flat(base.paper("tiny").to_dict()))
NAMES += [name for other in OTHERS for name in flat(other.to_dict()) if name not in NAMES]
NUMBERS = [name for name in NAMES if isinstance(field_of(name).rule, Number)]


def config_of(**fields):
    """A tiny config that has these fields, with these values, of whatever type."""
    has = lambda config: fields.keys() <= flat(config.to_dict()).keys()  # noqa: E731
    first = base.paper("tiny")
    values = next(filter(has, (first, *OTHERS)), first).to_dict()
    for name, value in fields.items():
        *sections, last = name.split(".")
        functools.reduce(dict.__getitem__, sections, values)[last] = value
    return ml_collections.ConfigDict(values)


def test_only_tiny_departs_from_the_papers_choices():
    for size in base.SIZES:
        own, papers = (flat(shipped(file, size).to_dict()) for file in ("base.py", "paper.py"))
        differing = {name for name in own if own[name] != papers[name]}
        assert differing == (set(base.IN_MINUTES) if size == "tiny" else set())


def outside(rule):
    """Values that a number's rule must refuse: just outside its limits, and what is no number."""
    step = 1 if rule.whole else 1e-6
    limits = (rule.least - step, rule.most + step, rule.above, rule.below)
    values = [value for value in limits if math.isfinite(value)]
    return [*values, math.nan, math.inf, -math.inf, True, "1", None, *([1.5] if rule.whole else [])]


@pytest.mark.parametrize("file, size", RECIPES)
def test_every_field_has_a_rule_and_every_recipe_keeps_them(file, size):
    config = shipped(file, size)
    assert [name for name in flat(config.to_dict()) if field_of(name) is None] == []
    check_fields(config)
    config.data.train = config.data.train or "json:pairs.json"
    config.data.eval = config.data.eval or "json:pairs.json"
    config.init = "random" if config.init == "model:" else config.init  # to be named
    check(config)


def test_every_rule_is_of_some_field():
    used = [field_of(name) for name in NAMES]
    assert [name for name, field in FIELDS.items() if not any(field is one for one in used)] == []


@pytest.mark.parametrize("name", NUMBERS)
def test_a_number_outside_its_range_is_refused_with_its_field_and_value(name):
    for value in outside(field_of(name).rule):
        with pytest.raises(UserError) as refusal:
            check_fields(config_of(**{name: value}))
        assert f"config.{name}={value!r} " in str(refusal.value)


@pytest.mark.parametrize(
    "name, value",
    [
        ("model.dtype", "float16"),
        ("model.attention", "flash"),
        ("data.teacher_view", 3),
        ("data.damaged_shards", ["refuse"]),
        ("data.flip", 1),
        ("train.memory_check", "true"),
        ("data.train", None),
        ("init", 0),
        ("data.crop_scale", (0.9, 0.5)),
        ("data.crop_scale", (0.0, 0.5)),
        ("data.crop_ratio", (1.0, math.nan)),
        ("data.crop_ratio", (1.0,)),
        ("data.crop_ratio", ("a", "b")),
        ("data.crop_ratio", 0.5),
    ],
)
def test_a_value_that_cannot_work_is_refused_with_its_field(name, value):
    with pytest.raises(UserError) as refusal:
        check_fields(config_of(**{name: value}))
    assert f"config.{name}={value!r} " in str(refusal.value)


@pytest.mark.parametrize(
    "changes, numbers",
    [
        ({"data.train": ""}, ("data.train=''",)),
        ({"data.eval": ""}, ("data.eval=''",)),
        ({f"losses.{name}": 0.0 for name in base.get_config().losses}, ("losses.alignment=0.0",)),
        ({"queue.size": 63}, ("queue.size=63", "data.global_batch=64")),
        ({"queue.size": 0, "codebook.queue_samples": 1}, ("queue_samples=1", "queue.size=0")),
        ({"codebook.size": 1}, ("losses.codebook=1.0", "codebook.size=1")),
        ({"codebook.size": 0}, ("losses.codebook=1.0", "codebook.size=0")),
        ({"losses.codebook": 0, "codebook.size": 1}, ("codebook.size=1",)),
        ({"teacher.use": False}, ("teacher.use=False", "teacher.alpha=0.4", "intra_weight=1.0")),
        (NO_TEACHER | {"teacher.alpha": 0.4}, ("teacher.use=False", "teacher.alpha=0.4")),
        (NO_TEACHER | {"queue.size": 64}, ("teacher.use=False", "queue.size=64")),
        (NO_TEACHER | {"alignment.intra_weight": 0.5}, ("use=False", "intra_weight=0.5")),
        (NO_TEACHER | {"data.teacher_view": "independent"}, ("use=False", "='independent'")),
        ({"model.text.fusion_depth": 0}, ("fusion_depth=0", "losses.matching=1.0")),
        (NO_FUSION | {"losses.matching": 0.5}, ("fusion_depth=0", "losses.matching=0.5")),
        (NO_FUSION | {"losses.masked_lm": 0.5}, ("fusion_depth=0", "losses.masked_lm=0.5")),
        (NO_FUSION | {"evaluation.rerank_top_k": 9}, ("fusion_depth=0", "rerank_top_k=9")),
        ({"codebook.queue_samples": 65}, ("codebook.queue_samples=65", "queue.size=64")),
        ({"alignment.temperature": 0.6}, ("temperature=0.6", "temperature_max=0.5")),
        ({"alignment.temperature_min": 0.7}, ("temperature_min=0.7", "temperature_max=0.5")),
        ({"mlm.random_share": 0.3}, ("mlm.mask_share=0.8", "mlm.random_share=0.3")),
        ({"model.text.max_tokens": 65}, ("max_tokens=65", "max_positions=64")),
        ({"model.image.size_px": 65}, ("size_px=65", "patch_px=8")),
        ({"model.image.heads": 3}, ("model.image.width=128", "model.image.heads=3")),
        ({"model.text.heads": 3}, ("model.text.width=128", "model.text.heads=3")),
        ({"sequences.ordered": True, "losses.alignment": 0, "losses.codebook": 0}, ("losses.",)),
        ({"sequences.ordered": True, "codebook.solver": "nearest"}, ("solver='nearest'",)),
        ({"sequences.ordered": True, "codebook.size": 1}, ("codebook.size=1",)),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_fields_that_do_not_fit_together_are_refused_with_both(changes, numbers):
    with pytest.raises(UserError) as refusal:
        check(config_of(**changes))
    assert all(number in str(refusal.value) for number in numbers)


@pytest.mark.parametrize(
    "changes",
    [
        NO_TEACHER,
        NO_FUSION,
        {"queue.size": 0},
        {"losses.codebook": 0.0, "codebook.size": 0},
        {"losses.codebook": 0.0},
    ],
)
def test_each_part_can_be_left_out_alone(changes):
    check(config_of(**changes))


def test_a_field_that_a_config_file_lacks_is_named():
    values = base.paper("tiny").to_dict()
    del values["data"]["patience_s"]
    with pytest.raises(UserError, match=r"config\.data\.patience_s is missing"):
        check_fields(ml_collections.ConfigDict(values))


def test_a_task_may_bring_fields_of_its_own():
    fields = {"vqa.answers": Field(whole(2))}
    with pytest.raises(UserError, match=r"config\.vqa\.answers=1 "):
        check_fields(ml_collections.ConfigDict({"vqa": {"answers": 1}, "other": -1}), fields)
