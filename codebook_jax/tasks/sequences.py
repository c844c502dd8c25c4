"""Sequences in order, such as the frames and the sentences of a story, aligned step by step.

Frames and sentences go through the image and the text tower. The teacher's steps choose codewords;
order-preserving transport aligns the steps of each story, and every step's student predicts the
codes of the steps that it is aligned with (`method.codebook_alignment`). In addition, every step
finds itself and the steps that it is aligned with among all of the batch (`step_alignment`).
Source: Duan et al. 2022, 3.1, for steps; Su & Hua 2017 for the alignment.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int, Key, PyTree, Shaped, UInt8

from codebook_jax import method
from codebook_jax.config import COMMON, SEQUENCES, check_fields
from codebook_jax.data.batch import StoryBatch
from codebook_jax.data.sources import Source
from codebook_jax.data.stories import StorySpec
from codebook_jax.data.text import Tokenizer, Vocabulary
from codebook_jax.evaluation import stories
from codebook_jax.evaluation.encoding import Progress
from codebook_jax.evaluation.retrieval import recalls_of
from codebook_jax.method import ordering
from codebook_jax.method.alignment import mean_of_directions
from codebook_jax.method.numerics import NEVER, key_of
from codebook_jax.models import codis
from codebook_jax.parallel import sharding
from codebook_jax.parallel.accumulation import Objective, Passes, Scalars
from codebook_jax.tasks import limits, optimizer
from codebook_jax.tasks.state import Counting
from codebook_jax.tasks.task import Evaluation, Items, Task

# Fields, a test of their values, and what is needed if it fails.
FITTING = (
    *limits.COMMON_FITTING,
    ("codebook.size", lambda size: size > 1, "give two codewords or more"),
    (
        "losses.alignment losses.codebook",
        lambda *weights: any(weights),
        "give one a weight, or nothing is learned",
    ),
    (
        "codebook.solver",
        lambda name: name in limits.ASSIGNMENTS and name not in ("nearest", "softmax"),
        "give one by transport: sinkhorn, ipot, swav or unbalanced",
    ),
)


@flax.struct.dataclass
class SequenceState(Counting):
    """The state of one run; its fields mean what they mean in `TrainState`."""

    step: Int[Array, ""]
    student: PyTree
    teacher: PyTree
    moments: PyTree
    bad_in_row: Int[Array, ""]
    bad_total: Int[Array, ""]


class Steps(NamedTuple):
    """Arrays of every step of a batch's stories."""

    frames: Shaped[Array, "batch frames ..."]
    sentences: Shaped[Array, "batch sentences ..."]


class Embedded(NamedTuple):
    """What `Passes` takes from a run of the towers."""

    features: Steps


class Sequences(Task):
    """The jitted programs of a run on stories; holds no parameters."""

    reads = "stories"

    def __init__(
        self, config: ml_collections.ConfigDict, vocabulary: Vocabulary, mesh: jax.sharding.Mesh
    ) -> None:
        self.model = codis.Model(config, vocabulary.size, mesh)
        self.rate, self.optimizer = optimizer.from_config(config)
        self.assignment = limits.ASSIGNMENTS[config.codebook.solver](config.codebook)
        self.order = order_of(config) if config.sequences.ordered else None
        self.passes = Passes(config.optimizer.accumulation, mesh)
        super().__init__(config, vocabulary, mesh)

    @staticmethod
    def check(config: ml_collections.ConfigDict) -> None:
        """Raises UserError, naming the fields, if no run on stories can start with this config."""
        check_fields(config, COMMON | SEQUENCES)
        limits.check_fitting(config, FITTING)

    @staticmethod
    def checkpoint_items() -> Items:
        return Items(("student", "teacher", "moments"), "student", ("student", "teacher"))

    @classmethod
    def export_items(cls, config: ml_collections.ConfigDict) -> tuple[str, ...]:
        """The student, and its teacher if asked; `codis` is the only format."""
        items = super().export_items(config)
        return (*items, "teacher") if config.export.teacher else items

    def fresh(self, key: Key[Array, ""]) -> SequenceState:
        """A state whose teacher is a copy of the student."""
        student = codis.init_student(self.config, self.vocabulary.size, key)
        return SequenceState(
            step=jnp.int32(0),
            student=student,
            teacher=jax.tree.map(jnp.copy, student["towers"]),
            moments=self.optimizer.init(student),
            bad_in_row=jnp.int32(0),
            bad_total=jnp.int32(0),
        )

    def abstract_batch(self) -> StoryBatch:
        """Shapes, types and shardings of a global batch."""
        model, of = self.config.model, self.config.sequences
        rows, side = self.config.data.global_batch, model.image.size_px
        frames, number = ((rows, of.max_frames, side, side, 3), np.uint8), ((rows,), np.int32)
        tokens = ((rows, of.max_sentences, model.text.max_tokens), np.int32)
        lengths = ((rows, of.max_sentences), np.int32)
        fields = frames, frames, number, tokens, lengths, number, number, number
        place = sharding.batch_sharding(self.mesh)
        return StoryBatch(*(jax.ShapeDtypeStruct(*field, sharding=place) for field in fields))

    def batch_spec(self) -> StorySpec:
        """What this process's rows of a batch hold: as for pairs, but nothing is mirrored."""
        shared, of = super().batch_spec()._asdict(), self.config.sequences
        del shared["flip"]
        return StorySpec(**shared, max_frames=of.max_frames, max_sentences=of.max_sentences)

    # -- the step

    def update(self, state: SequenceState, batch: StoryBatch) -> tuple[SequenceState, Scalars]:
        """One step; if its loss or gradient is not finite, only the counts change."""
        key = jax.random.fold_in(key_of(self.config.seed), state.step)
        taught = self.passes.over(functools.partial(self.teach, state.teacher), batch)
        objective = Objective(
            self.embed,
            functools.partial(self.compare, batch, taught.features),
            lambda *_: (jnp.float32(0), {}),  # no losses of single passes
            direct=("codebook", "temperature"),
        )
        given = objective, state.student, batch, taught, key
        (loss, scalars), gradients = self.passes.gradients(*given)
        gradients = optimizer.trained(self.config, gradients)
        gradient_norm = optax.tree.norm(gradients)
        good = jnp.isfinite(loss) & jnp.isfinite(gradient_norm)
        after = state.then(good, self.learn(state, gradients))
        return after, {
            "loss": loss,
            **scalars,
            "temperature": state.student["temperature"],
            "learning_rate": self.rate(state.updates),
            "teacher/momentum": self.momentum(state),
            "gradient_norm": gradient_norm,
            "bad_step": ~good,
            "bad_in_row": after.bad_in_row,
            "bad_total": after.bad_total,
        }

    @jax.named_scope("teach")
    def teach(self, towers: PyTree, batch: StoryBatch) -> Embedded:
        """The teacher's features of its view of the frames and of the sentences."""
        found = self._embed(towers, batch.teacher_frames, batch, None)
        return jax.lax.stop_gradient(found)

    @jax.named_scope("embed")
    def embed(self, student: PyTree, batch: StoryBatch, key: Key[Array, ""]) -> Embedded:
        """The student's features of its view of the frames and of the sentences."""
        return self._embed(student["towers"], batch.frames, batch, key)

    @jax.named_scope("compare")
    def compare(
        self, batch: StoryBatch, taught: Steps, features: Steps, own: Mapping[str, PyTree]
    ) -> tuple[Array, Scalars]:
        """The losses of the global batch, weighted; `own` has codebook and temperature."""
        config, scalars, loss = self.config, {}, jnp.float32(0)
        here = Steps(
            _present(batch.frame_count, features.frames.shape[1]),
            _present(batch.sentence_count, features.sentences.shape[1]),
        )
        plan = None
        if config.losses.codebook:
            scalars["loss/codebook"], aux = method.codebook_alignment(
                features._asdict(),
                own["codebook"]["codes"],
                teacher=taught._asdict(),
                valid=here._asdict(),
                assign=self.assignment,
                order=self.order,
                temperature=config.codebook.temperature,
            )
            broken = sum(aux.dropped.values()) > 0  # a feature is not finite: skip the update
            (plan,) = aux.alignments.values()
            loss += config.losses.codebook * jnp.where(broken, jnp.nan, scalars["loss/codebook"])
            for name in Steps._fields:
                scalars[f"codebook/perplexity_{name}"] = aux.perplexity[name]
            scalars["transport/column_error"] = jnp.stack([*aux.column_error.values()]).max()
        if config.losses.alignment:
            # Whole on every device: see `Pretraining.alignment_and_codebook`.
            if plan is None:
                plan = method.align_steps(1 - ordering.cosines(*taught), self.order, *here)
            everyone = features, taught, plan, here, batch.example
            features, taught, plan, here, story = sharding.whole(everyone, self.mesh)
            scalars["loss/alignment"] = step_alignment(
                features,
                taught,
                plan,
                here,
                story,
                temperature=own["temperature"],
                intra_weight=config.alignment.intra_weight,
            )
            loss += config.losses.alignment * scalars["loss/alignment"]
        return loss, scalars

    @jax.named_scope("learn")
    def learn(self, state: SequenceState, gradients: PyTree) -> SequenceState:
        """The student after the optimizer, the teacher after its average."""
        frozen = state.updates < self.config.codebook.freeze_steps
        given = gradients, state.student, state.moments
        student, moments = optimizer.updated(self.config, self.optimizer, *given, frozen=frozen)
        momentum = self.momentum(state)
        averaged = method.momentum_average(state.teacher, student["towers"], momentum)
        return state.replace(student=student, moments=moments, teacher=averaged)

    def momentum(self, state: SequenceState) -> Float[Array, ""]:
        of = self.config.teacher
        return method.momentum_at(state.updates, momentum=of.momentum, ramp=of.momentum_ramp)

    def _embed(
        self,
        towers: PyTree,
        frames: UInt8[Array, "batch frames side side 3"],
        batch: StoryBatch,
        key: Key[Array, ""] | None,
    ) -> Embedded:
        """All steps as rows of the towers; each story's steps stay on the device that has it."""
        towers, together = self.model.towers(towers), lambda x: x.reshape(-1, *x.shape[2:])
        image, _ = towers.embed_images(self.model.pixels(together(frames)))
        text, _ = towers.embed_texts(together(batch.tokens), together(batch.text_length), key)
        return Embedded(Steps(*(x.reshape(len(frames), -1, x.shape[-1]) for x in (image, text))))

    # -- evaluation

    def evaluate(
        self,
        state: SequenceState,
        source: Source,
        tokenizer: Tokenizer,
        *,
        images: int,
        final: bool,
        progress: Progress | None = None,
    ) -> Evaluation:
        """Retrieval of whole stories, and right order against shuffled, by student and teacher."""
        towers = {"student": state.student["towers"], "teacher": state.teacher}
        found = stories.encode_stories(
            self.model,
            towers,
            source,
            tokenizer,
            self.config,
            stories=images,
            progress=progress or (lambda *_: None),
        )
        results = {
            f"{name}/{how}": recalls
            for name, encoded in found.items()
            for how, recalls in stories.evaluate(encoded, order_of(self.config)).items()
        }
        chosen = "student/bag" if self.order is None else "student/ordered"
        return Evaluation(
            results,
            stories.flat(results),
            score=float(np.mean(list(recalls_of(results[chosen]).values()))),
            metric=f"mean of the recalls of {chosen} in validation",
            summary=stories.summary(results[chosen]),
            table=stories.format_table(results),
        )


def order_of(config: ml_collections.ConfigDict) -> ordering.Order:
    """The order that `config.sequences` describes."""
    return ordering.Order(*(config.sequences[field] for field in ordering.Order._fields))


def step_alignment(
    student: Steps,
    teacher: Steps,
    plan: Float[Array, "batch frames sentences"],
    here: Steps,
    story: Int[Array, " batch"],
    *,
    temperature: Float[Array, ""],
    intra_weight: float,
) -> Float[Array, ""]:
    """Instance alignment of steps: each finds the teacher's steps of the other side that it is
    aligned with, and itself on its own side, among all steps of the batch.

    Between sides, any aligned step will do (MIL-NCE; Miech et al. 2020): -log sum_j w_j p_j with
    the row w of the `plan`, scaled to sum 1, and p = softmax(cosines / temperature); with slack,
    a step counts by the share of it that is matched. The mean over the steps of a story, over the
    stories, and over the four directions, those within a side weighted by `intra_weight`. Other
    copies of the story in the batch are no candidates. With one step each, this is CODIS's loss
    without a queue at alpha 0 (Duan et al. 2022, 3.2).
    """
    other = (story[:, None] != story[None]) | jnp.eye(len(story), dtype=bool)
    plans = {(0, 1): plan, (1, 0): jnp.swapaxes(plan, 1, 2)}
    for side, there in enumerate(here):
        plans[side, side] = there[:, :, None] * jnp.eye(there.shape[1], dtype=plan.dtype)

    def direction(a: int, b: int) -> Float[Array, ""]:
        """How well steps of side a find those of side b."""
        cosines = jnp.einsum("and,bmd->anbm", student[a], teacher[b], precision="highest")
        allowed = here[b][None, None] & other[:, None, :, None]
        logits = jnp.where(allowed, cosines / temperature, NEVER)
        log_p = jax.nn.log_softmax(logits, axis=(2, 3))
        own = jnp.einsum("anam->anm", log_p)  # of the steps of the same story
        mass = plans[a, b].sum(axis=2)
        matched = mass > 0
        weights = plans[a, b] / jnp.where(matched, mass, 1)[:, :, None]
        log_weights = jnp.where(weights > 0, jnp.log(jnp.where(weights > 0, weights, 1)), NEVER)
        found = -jax.nn.logsumexp(log_weights + own, axis=2)
        found = jnp.where(matched, found * ordering.matched(plans[a, b], 2), 0)
        found = found.sum(axis=1) / jnp.maximum(matched.sum(axis=1), 1)
        return jnp.sum(found) / jnp.maximum(matched.any(axis=1).sum(), 1)

    by_direction = jnp.stack([jnp.stack([direction(a, b) for b in (0, 1)]) for a in (0, 1)])
    return mean_of_directions(by_direction, intra_weight=intra_weight)


def _present(counts: Int[Array, " batch"], most: int) -> Bool[Array, "batch most"]:
    """Which of `most` places hold a step."""
    return jnp.arange(most, dtype=counts.dtype) < counts[:, None]
