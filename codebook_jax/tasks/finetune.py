"""What the fine-tuning tasks share: a network from pre-trained encoders, and its own teacher.

A step augments, lets the teacher predict, compares the student with the right answers and with the
teacher's, learns, and averages the teacher. Source: Li et al. 2021, 4 and appendix A.
"""

from __future__ import annotations

import abc
import functools
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, Int, Key, PyTree, UInt8

from codebook_jax import method
from codebook_jax.config import COMMON, FINETUNING, check_fields
from codebook_jax.data import augment
from codebook_jax.data.batch import Answers, ExampleBatch
from codebook_jax.data.examples import ExampleSpec
from codebook_jax.data.sources import Source
from codebook_jax.data.text import Tokenizer, Vocabulary
from codebook_jax.errors import UserError, first_few
from codebook_jax.evaluation.encoding import Progress
from codebook_jax.evaluation.predicting import Predicted, Program, predict
from codebook_jax.evaluation.submissions import set_aside
from codebook_jax.method.numerics import key_of, own_settings
from codebook_jax.models.finetuned import Network
from codebook_jax.parallel import sharding
from codebook_jax.parallel.accumulation import Objective, Passes, Scalars
from codebook_jax.tasks import limits, optimizer
from codebook_jax.tasks.draws import augmented
from codebook_jax.tasks.state import Counting
from codebook_jax.tasks.task import ARCHITECTURE, Evaluation, Items, Task

FITTING = (
    *limits.TOWERS_FITTING,
    ("model.text.fusion_depth", bool, "the task reads the fusion encoder: give it layers"),
    (
        "teacher.use teacher.alpha",
        lambda use, alpha: use or alpha == 0,
        "soft targets are a teacher's: without one, give alpha 0",
    ),
)


@flax.struct.dataclass
class FinetuneState(Counting):
    """The state of one run; its fields mean what they mean in `TrainState`."""

    step: Int[Array, ""]
    student: PyTree
    teacher: PyTree | None  # like the whole student
    moments: PyTree
    bad_in_row: Int[Array, ""]
    bad_total: Int[Array, ""]


class Rows(NamedTuple):
    """The rows of a step, after all random draws."""

    images: UInt8[Array, "batch images side side 3"]
    tokens: Int[Array, "batch tokens"]
    text_length: Int[Array, " batch"]
    target: Int[Array, " batch"] | Answers


class Nothing(NamedTuple):
    """What `Passes` takes from a run of the encoders: no loss joins the passes."""

    features: tuple[()] = ()


class Finetuning(Task):
    """A task on examples: pictures with a text, and its label or answers.

    A task must define `labels`, or answers by its `batch_spec`, and what its network teaches,
    learns, predicts, and what that is worth. `models.finetuned` has the network.
    """

    images: ClassVar[int] = 1  # of an example
    adopts, cautions = ARCHITECTURE, staticmethod(limits.long_warmup)
    labels: ClassVar[tuple[str, ...]] = ()  # the answers that it chooses from, if always the same

    def __init__(
        self, config: ml_collections.ConfigDict, vocabulary: Vocabulary, mesh: jax.sharding.Mesh
    ) -> None:
        self.network = Network(config, vocabulary.size, mesh)
        self.rate, self.optimizer = optimizer.from_config(config)
        self.passes = Passes(config.optimizer.accumulation, mesh)
        super().__init__(config, vocabulary, mesh)
        self.predict = jax.jit(own_settings(self._predict))

    @classmethod
    def check(cls, config: ml_collections.ConfigDict) -> None:
        """Raises UserError, naming the fields, if no run of the task can start with this config."""
        check_fields(config, COMMON | FINETUNING)
        limits.check_fitting(config, FITTING)

    @classmethod
    def resolve(
        cls,
        config: ml_collections.ConfigDict,
        before: ml_collections.ConfigDict | None,
        *,
        shards: int,
        examples: int,
    ) -> ml_collections.ConfigDict:
        """Epochs as steps."""
        return limits.in_steps(config, examples)

    @staticmethod
    def checkpoint_items() -> Items:
        return Items(("student", "teacher", "moments"), "student", ("student",))

    @staticmethod
    def pretrained(name: str) -> str | None:
        """The encoders are those of pre-training, the teacher's the teacher's."""
        found = re.match(r"(student|teacher)/towers/(.*)", name)
        if found is None:
            return None
        return f"{'student/towers' if found[1] == 'student' else 'teacher'}/{found[2]}"

    # -- what a task defines

    @abc.abstractmethod
    def teach(self, network: nnx.Module, rows: Rows) -> PyTree:
        """What the teacher's network gives the student, with rows as leading axes."""

    @abc.abstractmethod
    def losses(
        self,
        state: FinetuneState,
        network: nnx.Module,
        rows: Rows,
        taught: PyTree | None,
        key: Key[Array, ""],
    ) -> tuple[Float[Array, " batch"], dict[str, Float[Array, " batch"]]]:
        """The student's loss of each row, and metrics of each row, which are averaged."""

    @abc.abstractmethod
    def predicted(
        self,
        network: nnx.Module,
        pixels: Float[Array, "rows images side side 3"],
        tokens: Int[Array, "rows tokens"],
        lengths: Int[Array, " rows"],
    ) -> PyTree:
        """What evaluation reads of the student's network, for each row."""

    @abc.abstractmethod
    def judged(self, found: Predicted, tokenizer: Tokenizer) -> Evaluation:
        """What the predictions of an evaluation are worth, where answers are known."""

    # -- the run

    def fresh(self, key: Key[Array, ""]) -> FinetuneState:
        """A state whose teacher is a copy of the student."""
        student = self.network.init(key)
        return FinetuneState(
            step=jnp.int32(0),
            student=student,
            teacher=jax.tree.map(jnp.copy, student) if self.config.teacher.use else None,
            moments=self.optimizer.init(student),
            bad_in_row=jnp.int32(0),
            bad_total=jnp.int32(0),
        )

    def abstract_batch(self) -> ExampleBatch:
        """Shapes, types and shardings of a global batch."""
        model, rows = self.config.model, self.config.data.global_batch
        side, spec = model.image.size_px, self.batch_spec()
        images, number = ((rows, self.images, side, side, 3), np.uint8), ((rows,), np.int32)
        tokens, target = ((rows, model.text.max_tokens), np.int32), number
        place = sharding.batch_sharding(self.mesh)
        of = lambda field: jax.ShapeDtypeStruct(*field, sharding=place)  # noqa: E731
        if not spec.labels:
            answers = (rows, spec.answers)
            target = ((*answers, spec.answer_tokens), np.int32), (answers, np.float32)
            target = Answers(*map(of, target))
        else:
            target = of(number)
        first = map(of, (images, ((rows,), bool), tokens, number))
        return ExampleBatch(*first, target, of(number), of(number))

    def batch_spec(self) -> ExampleSpec:
        """What this process's rows of a batch hold."""
        data, model = self.config.data, self.config.model
        return ExampleSpec(
            seed=self.config.seed,
            global_batch=data.global_batch,
            rows=sharding.process_rows(self.mesh, data.global_batch),
            size_px=model.image.size_px,
            images=self.images,
            max_tokens=model.text.max_tokens,
            crop_scale=data.crop_scale,
            crop_ratio=data.crop_ratio,
            flip=data.flip,
            labels=self.labels,
        )

    # -- the step

    def update(self, state: FinetuneState, batch: ExampleBatch) -> tuple[FinetuneState, Scalars]:
        """One step; if its loss or gradient is not finite, only the counts change."""
        key = jax.random.fold_in(key_of(self.config.seed), state.step)
        draw_key, dropout_key = jax.random.split(key)
        rows = self.draw(batch, draw_key)
        taught = None
        if self.config.teacher.alpha:
            taught = self.passes.over(functools.partial(self.taught, state.teacher), rows)
        objective = Objective(
            lambda *_: Nothing(),
            lambda *_: (jnp.float32(0), {}),  # no loss of the whole batch's features
            functools.partial(self.compare, state),
            direct=(),
        )
        given = objective, state.student, rows, taught, dropout_key
        (loss, scalars), gradients = self.passes.gradients(*given)
        gradients = optimizer.trained(self.config, gradients)
        gradient_norm = optax.tree.norm(gradients)
        good = jnp.isfinite(loss) & jnp.isfinite(gradient_norm)
        after = state.then(good, self.learn(state, gradients))
        scalars = {"loss": loss, **scalars, "learning_rate": self.rate(state.updates)}
        if state.teacher is not None:
            momentum = {"teacher/momentum": self.momentum(state)}
            scalars |= {"alpha": self.alpha(state), **momentum}
        return after, scalars | {
            "gradient_norm": gradient_norm,
            "bad_step": ~good,
            "bad_in_row": after.bad_in_row,
            "bad_total": after.bad_total,
        }

    @jax.named_scope("draw")
    def draw(self, batch: ExampleBatch, key: Key[Array, ""]) -> Rows:
        """The rows of a batch with their pictures augmented."""
        images, data = batch.images, self.config.data
        if data.flip or data.randaugment_layers:
            flip = jnp.repeat(batch.flip, self.images)
            flat = augmented(images.reshape(-1, *images.shape[2:]), flip, key, data)
            images = flat.reshape(images.shape)
        return Rows(images, batch.tokens, batch.text_length, batch.target)

    @jax.named_scope("teach")
    def taught(self, teacher: PyTree, rows: Rows) -> PyTree:
        """What the teacher gives the student, without a gradient."""
        return jax.lax.stop_gradient(self.teach(self.network(teacher), rows))

    @jax.named_scope("compare")
    def compare(
        self,
        state: FinetuneState,
        student: PyTree,
        _: Nothing,
        rows: Rows,
        taught: PyTree | None,
        key: Key[Array, ""],
    ) -> tuple[Array, Scalars]:
        """The loss of a pass, as its share of the batch's mean, and so the metrics."""
        losses, metrics = self.losses(state, self.network(student), rows, taught, key)
        batch = self.config.data.global_batch
        return losses.sum() / batch, {name: each.sum() / batch for name, each in metrics.items()}

    @jax.named_scope("learn")
    def learn(self, state: FinetuneState, gradients: PyTree) -> FinetuneState:
        """The student after the optimizer, the teacher after its average."""
        given = gradients, state.student, state.moments
        student, moments = optimizer.updated(self.config, self.optimizer, *given)
        after = state.replace(student=student, moments=moments)
        if state.teacher is None:
            return after
        average = method.momentum_average(state.teacher, student, self.momentum(state))
        return after.replace(teacher=average)

    def evaluate(
        self,
        state: FinetuneState,
        source: Source,
        tokenizer: Tokenizer,
        *,
        images: int,
        final: bool,
        progress: Progress | None = None,
    ) -> Evaluation:
        """Predicts with the student, and judges."""
        program = self.program(state.student, tokenizer)
        given = program, source, tokenizer, self.config, self.mesh
        found = predict(*given, images=images, pictures=self.images, progress=progress)
        return self.judged(found, tokenizer)

    def program(self, student: PyTree, tokenizer: Tokenizer) -> Program:
        """What is run for the examples of an evaluation."""
        return functools.partial(self.predict, student)

    def pixels(
        self, images: UInt8[Array, "rows images side side 3"]
    ) -> Float[Array, "rows images side side 3"]:
        """Pictures as the encoders expect them, in the model's type."""
        return augment.normalise(images, self.network.dtype)

    def alpha(self, state: FinetuneState) -> Float[Array, ""]:
        """Weight of the teacher's soft targets: linear over `teacher.alpha_steps`, if any."""
        of = self.config.teacher
        ramp = state.updates.astype(jnp.float32) / of.alpha_steps if of.alpha_steps else 1
        return jnp.float32(of.alpha) * jnp.minimum(ramp, 1)

    def momentum(self, state: FinetuneState) -> Float[Array, ""]:
        of = self.config.teacher
        return method.momentum_at(state.updates, momentum=of.momentum, ramp=of.momentum_ramp)

    def _predict(
        self,
        student: PyTree,
        images: UInt8[Array, "rows images side side 3"],
        tokens: Int[Array, "rows tokens"],
        lengths: Int[Array, " rows"],
    ) -> PyTree:
        return self.predicted(self.network(student), self.pixels(images), tokens, lengths)


def check_ids(found: Predicted, named: str) -> None:
    """Raises UserError if examples have one id."""
    counts = Counter(example.key for example in found.examples)
    if repeated := [repr(key) for key, count in counts.items() if count > 1]:
        raise UserError(
            f"{len(repeated):,} ids are those of several {named} ({first_few(repeated, 3)}): give "
            "each an id of its own, such as its number"
        )


def without_answers(found: Predicted, named: str, **more: Any) -> Evaluation:
    """The evaluation of examples whose answers nobody knows."""
    count = {"examples": float(len(found.examples))}
    sentence = f"{len(found.examples):,} {named} without known answers: predictions alone"
    options = dict(score=math.nan, metric="nothing", summary=sentence, table=sentence)
    return Evaluation({"student": count}, {}, **options, **more)


def submission(found: Predicted, write: Callable[[Path], str]) -> Callable[[Path], str]:
    """What writes a submission, or sets an older one aside if some example has no answer."""
    if not found.left_out and not found.unlisted:
        return write
    why = (
        f"it must answer every example, but the pictures of {found.left_out:,} cannot be read and "
        f"{found.unlisted:,} of the list were left out before: restore them and evaluate again"
    )
    return functools.partial(set_aside, why=why)


def scalars_of(figures: Mapping[str, float]) -> dict[str, float]:
    """The figures of an evaluation by their names in metrics.jsonl."""
    return {f"eval/{name}": value for name, value in figures.items()}
