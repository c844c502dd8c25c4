"""Labels of images: a linear classifier on the image encoder, which stays as it is (a linear probe)
unless `optimizer.freeze` is emptied.

Source: Radford et al. 2021, 3.2; Kornblith et al. 2019.
"""

from __future__ import annotations

import ml_collections

from codebook_jax.config import COMMON, FINETUNING, LABELS, check_fields, with_fields
from codebook_jax.data.examples import ExampleSpec
from codebook_jax.data.sources import Source
from codebook_jax.errors import UserError, first_few
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
        if names:
            Labelling.check_data(config, config.data.train, source)
        elif before is not None:
            names = tuple(before.labels.names)
        names = names or tuple(sorted(_labels_of(source)))
        if len(names) < 2:
            raise UserError(f"{source!r} has {len(names)} label: give images of two or more")
        return with_fields(config, {"labels.names": names})

    @staticmethod
    def check_data(config: ml_collections.ConfigDict, spec: str, source: Source) -> None:
        """Raises UserError, naming them and a picture of each, for labels that are not learned."""
        known, found = set(config.labels.names), _labels_of(source)
        named = [f"{it!r} ({source.name(at)})" for it, at in found.items() if it not in known]
        if named:
            raise UserError(
                f"{spec} has labels that are none of the {len(known):,} in training: "
                f"{first_few(named, 5)}: add pictures of these to the training data, or leave them "
                "out here"
            )

    def batch_spec(self) -> ExampleSpec:
        """What this process's rows of a batch hold."""
        return super().batch_spec()._replace(labels=self.labels)


def _labels_of(source: Source) -> dict[str, int]:
    """The labels, each with the first position that has it; UserError for one without words."""
    found: dict[str, int] = {}
    for at in range(len(source)):
        label = source.captions(at)[-1:]
        if not label:
            raise UserError(f"{source.name(at)} has a label without words: name it in words")
        found.setdefault(label[0], at)
    return found
