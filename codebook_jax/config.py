"""Checks of a config, made before anything is built."""

from __future__ import annotations

import ml_collections

from codebook_jax.errors import UserError, refuse_below
from codebook_jax.models.layers import REMAT

LEAST = {
    "train.steps": 1,
    "mesh.data": -1,
    "mesh.fsdp": -1,
    "mesh.tensor": -1,
    "mesh.slices": 0,
    "log_every_steps": 1,
    "checkpoint.every_steps": 1,
    "checkpoint.keep": 1,
    "evaluation.every_steps": 0,
    "evaluation.images": -1,
    "evaluation.batch": 1,
    "evaluation.rerank_top_k": 0,
    "optimizer.accumulation": 1,
    "optimizer.warmup_steps": 0,
    "optimizer.max_bad_steps": 1,
    "data.global_batch": 2,
    "data.workers": 0,
    "data.threads": 1,
    "data.prefetch": 1,
    "data.patience_s": 1,
    "codebook.size": 2,
    "codebook.iterations": 1,
    "codebook.queue_samples": 0,
    "codebook.freeze_steps": 0,
    "codebook.window_samples": 1,
    "teacher.alpha_steps": -1,
    "model.scan_unroll": 1,
    "model.dim": 1,
    "model.image.size_px": 1,
    "model.image.patch_px": 1,
    "model.image.width": 1,
    "model.image.heads": 1,
    "model.text.width": 1,
    "model.text.heads": 1,
    "model.image.mlp_width": 0,
    "model.text.mlp_width": 0,
    "model.image.depth": 1,
    "model.text.depth": 1,
    "model.text.fusion_depth": 1,
    "model.text.max_tokens": 4,
}
CHOICES = {
    "alignment.same_image": ("ignore", "negative"),
    "data.teacher_view": ("independent", "same"),
    "model.remat": REMAT,
    "model.dtype": ("float32", "bfloat16"),
    "model.attention": ("auto", "xla", "cudnn"),
}
SHARES = (
    "data.max_bad_rate",
    "model.text.dropout",
    "mlm.probability",
    "mlm.max_share",
    "mlm.mask_share",
    "mlm.random_share",
    "teacher.momentum",
    "teacher.alpha",
)


def check_values(config: ml_collections.ConfigDict) -> None:
    """Raises UserError, naming the field and its value, if a value alone is outside its limits."""
    for name, minimum in LEAST.items():
        refuse_below(name, _of(config, name), minimum)
    for name, allowed in CHOICES.items():
        if (value := _of(config, name)) not in allowed:
            raise UserError(f"config.{name}={value!r} is not one of {', '.join(allowed)}")
    for name in SHARES:
        if not 0 <= (value := _of(config, name)) <= 1:
            what = "share of the images" if name == "data.max_bad_rate" else "share"
            raise UserError(f"config.{name}={value} is a {what}: give a number from 0 to 1")


def check(config: ml_collections.ConfigDict) -> None:
    """Raises UserError, naming the field and its value, if no run can start with this config."""
    check_values(config)
    for name in ("train", "eval"):
        if not config.data[name]:
            raise UserError(
                f"config.data.{name} is empty: name your pairs, e.g. "
                f"--config.data.{name}=json:PATH, or scenes"
            )
    if not any(config.losses.values()):
        raise UserError("every weight in config.losses is 0: nothing would be learned")
    for name in ("crop_scale", "crop_ratio"):
        pair = config.data[name]
        numbers = len(pair) == 2 and all(isinstance(n, int | float) and n > 0 for n in pair)
        if not numbers or pair[0] > pair[1]:
            raise UserError(
                f"config.data.{name}={pair} is not a range: give two positive numbers, the smaller "
                f"first, e.g. --config.data.{name}='(0.5, 1.0)'"
            )
    _check_sizes(config)


def _check_sizes(config: ml_collections.ConfigDict) -> None:
    batch, queue, image, text = (
        config.data.global_batch,
        config.queue.size,
        config.model.image,
        config.model.text,
    )
    if queue < batch:
        raise UserError(
            f"config.queue.size={queue} is smaller than config.data.global_batch={batch}: one "
            "step's features must fit, so give at least the batch"
        )
    if config.codebook.queue_samples > queue:
        raise UserError(
            f"config.codebook.queue_samples={config.codebook.queue_samples} is more than "
            f"config.queue.size={queue} holds"
        )
    if text.max_tokens > text.max_positions:
        raise UserError(
            f"config.model.text.max_tokens={text.max_tokens} is more than the "
            f"config.model.text.max_positions={text.max_positions} that have an embedding"
        )
    if image.size_px % image.patch_px:
        raise UserError(
            f"config.model.image.size_px={image.size_px} is not a multiple of "
            f"config.model.image.patch_px={image.patch_px}"
        )
    for name, part in (("image", image), ("text", text)):
        if part.width % part.heads:
            raise UserError(
                f"config.model.{name}.width={part.width} is not divisible by "
                f"config.model.{name}.heads={part.heads}"
            )


def _of(config: ml_collections.ConfigDict, name: str):
    for part in name.split("."):
        config = config[part]
    return config


from codebook_jax.run.record import with_fields  # noqa: E402, F401
