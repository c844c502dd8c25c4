"""What the training loop asks of a task, and what tasks share.

A task is one file: a state, a step, its batches and its evaluation. The loop, checkpoints, metrics,
memory, evaluation and export use this class and name no field of a task's state.
"""

from __future__ import annotations

import abc
import contextlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import jax
import ml_collections
import numpy as np
from jaxtyping import Array, Key, PyTree

from codebook_jax.config import check_fields
from codebook_jax.data.alike import Alike
from codebook_jax.data.batch import Batch
from codebook_jax.data.pipeline import BatchSpec, BatchStream, Spec
from codebook_jax.data.sources import Source
from codebook_jax.data.text import Tokenizer, Vocabulary
from codebook_jax.errors import UserError
from codebook_jax.evaluation.encoding import Progress
from codebook_jax.method.numerics import key_of, own_settings
from codebook_jax.parallel import sharding

State = Any  # a struct whose fields its task alone knows
Scalars = Mapping[str, Array]


# Fields that a fine-tuning takes from the weights it starts from.
ARCHITECTURE = ("model.dim", "model.pool", "model.image.stem", "model.image.patch_px")


class Items(NamedTuple):
    """How a state is stored, by the names of its fields."""

    alone: tuple[str, ...]  # can be restored alone; the other fields are stored together
    trained: str  # the trained parameters: what is counted and exported
    evaluated: tuple[str, ...]  # what `evaluate` reads


class Evaluation(NamedTuple):
    """What an evaluation found."""

    results: dict[str, dict[str, float]]  # by protocol: eval.json
    scalars: dict[str, float]  # `eval/...`: metrics.jsonl
    score: float  # chooses the best checkpoint, higher is better
    metric: str  # the meaning of `score`
    summary: str  # one line
    table: str  # several
    # Predictions that `--mode=eval` writes into the workdir: a name, and what writes that path, or
    # sets aside what an earlier evaluation wrote there, and returns a sentence on it.
    files: tuple[tuple[str, Callable[[Path], str]], ...] = ()


class Task(abc.ABC):
    """A task for one config, vocabulary and mesh; holds programs, no parameters.

    A task must define `checkpoint_items`, `fresh`, `update` and `evaluate`, all for the global
    batch; the rest suits batches of pairs of an image and a text. Another kind of batch needs
    `batch_spec` and `abstract_batch`, with at least the fields `example` and `skipped` of `Batch`.
    """

    reads: ClassVar[str] = "pairs"  # the kind of its data, one of KINDS
    evaluates: ClassVar[tuple[str, ...]] = ()  # other kinds that it can be evaluated on
    # Fields of the model that come from the weights that config.init names.
    adopts: ClassVar[tuple[str, ...]] = ()
    resumes: ClassVar[bool] = False  # whether `evaluate` takes a `cache`, to go on after a kill
    step: jax.stages.Wrapped  # `update`, jitted over the mesh; donates the state

    def __init__(
        self, config: ml_collections.ConfigDict, vocabulary: Vocabulary, mesh: jax.sharding.Mesh
    ) -> None:
        self.config, self.vocabulary, self.mesh = config, vocabulary, mesh
        shapes = jax.eval_shape(own_settings(self.fresh), key_of(0))
        self.shardings = sharding.state_shardings(shapes, mesh)
        self._abstract_state = jax.tree.map(
            lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
            shapes,
            self.shardings,
        )
        whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
        # Else the step copies parameters and moments before it changes them.
        region = {"xla_cpu_copy_insertion_use_region_analysis": True}
        self.step = jax.jit(
            own_settings(self.update),
            donate_argnums=0,
            in_shardings=(self.shardings, sharding.batch_sharding(mesh)),
            out_shardings=(self.shardings, whole),
            compiler_options=region if sharding.on_cpu(mesh) else None,
        )

    @staticmethod
    def check(config: ml_collections.ConfigDict) -> None:
        """Raises UserError, naming the field and its value, if the task cannot run with it."""
        check_fields(config)

    @staticmethod
    def resolve(
        config: ml_collections.ConfigDict,
        before: ml_collections.ConfigDict | None,
        *,
        shards: int,
        examples: int,
    ) -> ml_collections.ConfigDict:
        """The config with the task's automatic choices as numbers.

        `before` is the config of the run that is continued, `shards` counts the data shards,
        `examples` the training data. Raises UserError if the choices do not fit them.
        """
        return config

    @staticmethod
    def from_data(
        config: ml_collections.ConfigDict, before: ml_collections.ConfigDict | None, source: Source
    ) -> ml_collections.ConfigDict:
        """The config with what the task takes from its training data, such as a list of answers;
        `before` is the config of the run that is continued.
        """
        return config

    @staticmethod
    def as_used(
        config: ml_collections.ConfigDict, before: ml_collections.ConfigDict
    ) -> ml_collections.ConfigDict:
        """The config for the use of a trained run, whose config was `before`, with what follows
        from the fields that differ.
        """
        return config

    @staticmethod
    def check_data(config: ml_collections.ConfigDict, spec: str, source: Source) -> None:
        """Raises UserError if an answer in the data that `spec` names is none that the task, whose
        config is complete, can give.
        """
        return

    @staticmethod
    def cautions(config: ml_collections.ConfigDict) -> list[str]:
        """Sentences that a run with this resolved config prints as warnings at its start."""
        return []

    @staticmethod
    def pretrained(name: str) -> str | None:
        """The parameter of pre-training that one of the state starts as; None: a fresh one."""
        return name

    @staticmethod
    @abc.abstractmethod
    def checkpoint_items() -> Items:
        """Which parts of the state are restored alone, trained, evaluated."""

    @classmethod
    def export_items(cls, config: ml_collections.ConfigDict) -> tuple[str, ...]:
        """Which parts `config.export.format` is made of; UserError if the task has no such form."""
        if config.export.format != "codis":
            raise UserError(
                f"config.export.format={config.export.format!r} is for models of pre-training: "
                f"config.task={config.task!r} is exported as codis"
            )
        return (cls.checkpoint_items().trained,)

    @abc.abstractmethod
    def fresh(self, key: Key[Array, ""]) -> State:
        """A state with random parameters."""

    @abc.abstractmethod
    def update(self, state: State, batch: Batch) -> tuple[State, Scalars]:
        """The state after one step, and its scalars: at least `loss` and `bad_step`, whether the
        state stayed as it was, since something was not finite.
        """

    @abc.abstractmethod
    def evaluate(
        self,
        state: State,
        source: Source,
        tokenizer: Tokenizer,
        *,
        images: int,
        final: bool,
        progress: Progress | None = None,
    ) -> Evaluation:
        """Evaluates the first `images` (0: all) of a source.

        `state` may lack what `checkpoint_items` does not list as evaluated. `final` is False for
        the evaluations during training, which may leave out what takes long.
        """

    def abstract_state(self) -> State:
        """Shapes, types and shardings of the state."""
        return self._abstract_state

    def init_state(self, seed: int) -> State:
        """A fresh state, created directly on its devices."""
        return self._made(self.fresh, self.shardings, seed)

    def init_parameters(self, seed: int) -> PyTree:
        """The trained parameters of a fresh state, alone."""
        trained = self.checkpoint_items().trained
        places = getattr(self.shardings, trained)
        return self._made(lambda key: getattr(self.fresh(key), trained), places, seed)

    def _made(self, make: Callable[[Key[Array, ""]], PyTree], places: PyTree, seed: int) -> PyTree:
        # The same values bit for bit, compiled in less than half the time.
        options = {"xla_backend_optimization_level": 1} if sharding.on_cpu(self.mesh) else None
        make = jax.jit(own_settings(make), out_shardings=places, compiler_options=options)
        return make(key_of(seed))

    def abstract_batch(self) -> Batch:
        """Shapes, types and shardings of a global batch."""
        model, rows = self.config.model, self.config.data.global_batch
        side = model.image.size_px
        image, number = ((rows, side, side, 3), np.uint8), ((rows,), np.int32)
        text = ((rows, model.text.max_tokens), np.int32)
        fields = Batch(image, image, ((rows,), bool), text, number, number, number, number)
        place = sharding.batch_sharding(self.mesh)
        return Batch(*(jax.ShapeDtypeStruct(*field, sharding=place) for field in fields))

    def batch_spec(self) -> Spec:
        """What this process's rows of a batch hold."""
        data, model = self.config.data, self.config.model
        window = data.alike_window * data.global_batch
        alike = Alike(data.alike, window, model.text.max_tokens) if data.alike else None
        return BatchSpec(
            seed=self.config.seed,
            global_batch=data.global_batch,
            rows=sharding.process_rows(self.mesh, data.global_batch),
            size_px=model.image.size_px,
            max_tokens=model.text.max_tokens,
            crop_scale=data.crop_scale,
            crop_ratio=data.crop_ratio,
            flip=data.flip,
            views=1 if data.teacher_view == "same" else 2,
            alike=alike,
        )

    def batches(
        self, source: Source, tokenizer: Tokenizer, *, start_step: int, workers: int
    ) -> AbstractContextManager[Iterator[Batch]]:
        """This process's rows of every batch from `start_step` on; leaving the context ends the
        worker processes.
        """
        data = self.config.data
        making = {"workers": workers, "threads": data.threads, "prefetch": data.prefetch}
        return contextlib.closing(
            BatchStream(source, tokenizer, self.batch_spec(), **making, start_step=start_step)
        )
