"""Labels of images: a linear classifier on the image encoder, which stays as it is (a linear probe)
unless `optimizer.freeze` is emptied.

Source: Radford et al. 2021, 3.2; Kornblith et al. 2019.
"""

from __future__ import annotations

import ml_collections

from codebook_jax.config import COMMON, FINETUNING, LABELS, check_fields, with_fields
from codebook_jax.data.examples import ExampleSpec
from codebook_jax.data.sources import Source
from codebook_jax.errors import UserError
from codebook_jax.tasks import limits
from codebook_jax.tasks.classifying import Classifying
from codebook_jax.tasks.finetune import FITTING


class Labelling(Classifying):
    """The jitted programs of a run; holds no parameters."""

    reads = "labels"

    @property
    def labels(self) -> tuple[str, ...]:
        return tuple(self.config.labels.names)

    @staticmethod
    def check(config: ml_collections.ConfigDict) -> None:
        """Raises UserError, naming the fields, if no run of the task can start with this config."""
        check_fields(config, COMMON | FINETUNING | LABELS)
        limits.check_fitting(config, FITTING)

    @staticmethod
    def from_data(
        config: ml_collections.ConfigDict, before: ml_collections.ConfigDict | None, source: Source
    ) -> ml_collections.ConfigDict:
        """The labels: those of the config, of the run, or all in training."""
        names = tuple(config.labels.names)
        if not names and before is not None:
            names = tuple(before.labels.names)
        names = names or tuple(
            sorted({label for at in range(len(source)) for label in source.captions(at)[-1:]})
        )
        if len(names) < 2:
            raise UserError(f"{source!r} has {len(names)} label: give images of two or more")
        return with_fields(config, {"labels.names": names})

    def batch_spec(self) -> ExampleSpec:
        """What this process's rows of a batch hold."""
        return super().batch_spec()._replace(labels=self.labels)
