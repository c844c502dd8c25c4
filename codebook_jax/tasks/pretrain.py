"""Pre-training: read this first. One step teaches, assigns, learns, averages and remembers.

Everything is written for the global batch, under one jit over the mesh; the only randomness is
fold_in(seed, step). A batch larger than memory is split into passes: parallel/accumulation.py.
Source: Duan et al. 2022, 3.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import ml_collections
import optax
from jaxtyping import Array, Float, Int, Key, PyTree

from codebook_jax.data.batch import Batch
from codebook_jax.data.sources import Source
from codebook_jax.data.text import Tokenizer, Vocabulary
from codebook_jax.evaluation import retrieval, zero_shot
from codebook_jax.evaluation.encoding import Progress
from codebook_jax.evaluation.stage import Bookkeeping, Cache
from codebook_jax.method import alignment, assignment, codebook, matching, teacher
from codebook_jax.method.masking import masked_word_loss
from codebook_jax.method.numerics import key_of, unit
from codebook_jax.method.queue import empty_queue, enqueue, newest
from codebook_jax.models import codis
from codebook_jax.models.bert import Negatives, gather_in_groups, taken
from codebook_jax.parallel import sharding
from codebook_jax.parallel.accumulation import Objective, Passes, Scalars
from codebook_jax.tasks import judging, limits, optimizer, running
from codebook_jax.tasks.draws import Inputs, Pair, draw_inputs
from codebook_jax.tasks.state import Learned, Plan, Targets, Taught, TrainState
from codebook_jax.tasks.task import Evaluation, Items, Task


class Pretraining(Task):
    """The jitted programs of a run; holds no parameters."""

    evaluates, resumes = ("labels", "expressions"), True
    check = staticmethod(limits.check)
    resolve = staticmethod(limits.resolve)
    cautions = staticmethod(limits.cautions)

    def __init__(
        self, config: ml_collections.ConfigDict, vocabulary: Vocabulary, mesh: jax.sharding.Mesh
    ) -> None:
        self.model = codis.Model(config, vocabulary.size, mesh)
        self.rate, self.optimizer = optimizer.from_config(config)
        self.assignment = limits.ASSIGNMENTS[config.codebook.solver](config.codebook)
        self.pass_groups = config.itm.groups // config.optimizer.accumulation
        self.passes = Passes(config.optimizer.accumulation, mesh)
        super().__init__(config, vocabulary, mesh)

    @staticmethod
    def checkpoint_items() -> Items:
        return Items(("student", "teacher", "moments", "queue"), "student", ("student", "teacher"))

    @staticmethod
    def export_items(config: ml_collections.ConfigDict) -> tuple[str, ...]:
        """The student; with its teacher if asked, ALBEF's format with the queue too."""
        limits.check_export(config)
        if config.export.format == "albef":
            return "student", "teacher", "queue"
        teacher = config.export.format == "codis" and config.export.teacher
        return ("student", "teacher") if teacher else ("student",)

    def fresh(self, key: Key[Array, ""]) -> TrainState:
        """A state whose teacher is a copy of the student and whose queues are empty."""
        config, dim = self.config, self.config.model.dim
        student = codis.init_student(config, self.vocabulary.size, key)
        of, size, kept = config.codebook, config.queue.size, config.teacher.use
        queue = None
        if size:
            options = dict(size=size, dim=dim, with_ids=config.queue.ids)
            queue = empty_queue(Pair._fields, **options)
        return TrainState(
            step=jnp.int32(0),
            student=student,
            teacher=jax.tree.map(jnp.copy, student["towers"]) if kept else None,
            moments=self.optimizer.init(student),
            queue=queue,
            usage=codebook.empty_usage(of.window_samples) if of.size else None,
            bad_in_row=jnp.int32(0),
            bad_total=jnp.int32(0),
            running=running.first(of, student["codebook"]["codes"]) if of.size else None,
        )

    # -- the step

    def update(self, state: TrainState, batch: Batch) -> tuple[TrainState, Scalars]:
        """One step; if its loss or gradient is not finite, only the counts change."""
        key = jax.random.fold_in(key_of(self.config.seed), state.step)
        draw_key, dropout_key = jax.random.split(key)
        with jax.named_scope("draw"):
            inputs = draw_inputs(batch, draw_key, self.config, self.vocabulary)
        taught = self.passes.over(functools.partial(self.teach, state.teaching), inputs)
        plan = self.assign(taught.features, state)
        targets = Targets(taught.features, plan, batch.image_id)
        objective = self.objective(state, targets)
        given = objective, state.student, inputs, taught, dropout_key
        (loss, scalars), gradients = self.passes.gradients(*given)
        gradients = optimizer.trained(self.config, gradients)
        gradient_norm = optax.tree.norm(gradients)
        good = jnp.isfinite(loss) & jnp.isfinite(gradient_norm)
        after = self.remember(self.learn(state, gradients), targets)
        after = state.then(good, after)
        scalars = {"loss": loss, **scalars, "gradient_norm": gradient_norm, "bad_step": ~good}
        return after, scalars | self.report(state, after, inputs, plan)

    def objective(self, state: TrainState, targets: Targets) -> Objective:
        """The four losses: L_ica and L_code of the global batch, L_itm and L_mlm of each pass."""
        return Objective(
            self.embed,
            functools.partial(self.alignment_and_codebook, state, targets),
            functools.partial(self.matching_and_masked_words, state),
            direct=tuple(name for name in ("codebook", "temperature") if name in state.student),
        )

    @jax.named_scope("teach")
    def teach(self, towers: PyTree, inputs: Inputs) -> Taught:
        """The teacher's features of its view of the batch, and its states at the hidden words."""
        towers = self.model.towers(towers)
        if self.config.teacher.alpha == 0:  # then what it reads behind hidden words counts nothing
            inputs = inputs._replace(masked=None)
        image, image_tokens = towers.embed_images(self.model.pixels(inputs.teacher_image))
        text, _, masked_states = self._read(towers, inputs, None)
        if inputs.masked is not None:
            texts = masked_states[:, None], inputs.text_length[:, None]
            fused = towers.fusion(*texts, image_tokens)[:, 0]
            masked_states = taken(fused, inputs.masked.positions)
        return jax.lax.stop_gradient(Taught(Pair(image, text), masked_states))

    @jax.named_scope("assign")
    def assign(self, features: Pair, state: TrainState) -> Plan | None:
        """The transport plan of the teacher's image and text features over the codewords.

        Its first rows are the batch's; `codebook.queue_samples` more are the queue's newest. Each
        valid row sums to 1 / (their number). Each device solves a small transport alone: one gather
        of the features instead of two sums per iteration, which wait for each other.
        """
        if not self.config.losses.codebook:
            return None
        rows, valid = jnp.stack(features), None
        if queued := self.config.codebook.queue_samples:
            older, here = newest(state.queue, queued)
            rows = jnp.concatenate([rows, jnp.stack(Pair(**older))], axis=1)
            valid = jnp.concatenate([jnp.ones(features.image.shape[0], bool), here])
            valid = jnp.broadcast_to(valid, rows.shape[:2])
        codes = unit(state.student["codebook"]["codes"])
        size = 4 * rows.shape[0] * rows.shape[1] * len(codes)
        place = functools.partial(sharding.whole_if_small, mesh=self.mesh, size=size)
        rows, codes, valid = place((rows, codes, valid))
        costs = place(running.centred(state.running, assignment.codeword_costs(rows, codes)))
        return place(assignment.make_plan(costs, self.assignment, valid=valid))

    @jax.named_scope("embed")
    def embed(self, student: PyTree, inputs: Inputs, key: Key[Array, ""]) -> Learned:
        """The student's outputs for its view of the images and for the texts, before fusion."""
        towers = self.model.towers(student["towers"])
        image, image_tokens = towers.embed_images(self.model.pixels(inputs.image))
        text, states, masked_states = self._read(towers, inputs, jax.random.fold_in(key, 0))
        return Learned(Pair(image, text), image_tokens, states, masked_states)

    @jax.named_scope("compare")
    def alignment_and_codebook(
        self, state: TrainState, targets: Targets, features: Pair, own: Mapping[str, PyTree]
    ) -> tuple[Array, Scalars]:
        """L_ica and L_code of the global batch, weighted; `own` has codebook and temperature."""
        config, scalars, loss = self.config, {}, jnp.float32(0)
        if config.losses.alignment:
            # Every row's candidates are the whole batch and the queue. Without this, XLA splits the
            # candidates instead of the rows, and so gathers the queues and moves the logits.
            everyone = targets.features, targets.image_id
            candidates, candidate_id = sharding.whole(everyone, self.mesh)
            found = alignment.cross_entropies(
                features._asdict(),
                None if state.teacher is None else candidates._asdict(),
                state.queue,
                candidate_id,
                temperature=own["temperature"],
                alpha=self.alpha(state),
                same=config.alignment.same_image,
            )
            intra_weight = config.alignment.intra_weight
            scalars["loss/alignment"] = alignment.alignment_loss(found, intra_weight=intra_weight)
            loss += config.losses.alignment * scalars["loss/alignment"]
        if targets.plan is not None:
            found = codebook.code_losses(
                features._asdict(),
                targets.features._asdict(),
                unit(own["codebook"]["codes"]),
                Pair(*codebook.soft_codes(targets.plan, len(targets.image_id)))._asdict(),
                temperature=config.codebook.temperature,
            )
            parts = {
                "transport": sum(part.mean() for part in found.transport.values()),
                "text_to_code": found.predicted["text", "image"].mean(),
                "image_to_code": found.predicted["image", "text"].mean(),
            }
            scalars |= {f"loss/codebook_{name}": part for name, part in parts.items()}
            scalars["loss/codebook"] = sum(parts.values())
            loss += config.losses.codebook * scalars["loss/codebook"]
        scalars["features/std"] = jnp.stack(features).std(axis=1).mean()  # towards 0: collapse
        return loss, scalars

    @jax.named_scope("pair")
    def matching_and_masked_words(
        self,
        state: TrainState,
        student: PyTree,
        learned: Learned,
        inputs: Inputs,
        taught: Taught,
        key: Key[Array, ""],
    ) -> tuple[Array, Scalars]:
        """L_itm and L_mlm, weighted: one run of the fusion encoder over the pairs of both."""
        config, scalars, loss = self.config, {}, jnp.float32(0)
        towers = self.model.towers(student["towers"])
        texts: dict[str, tuple[Array, Array]] = {}  # states, lengths that each image is paired with
        negatives = None
        if inputs.masked is not None:
            texts["masked"] = learned.masked_states, inputs.text_length
        if inputs.noise is not None:
            own = learned.text_states, inputs.text_length
            image, text = self._negatives(student, learned.features, inputs, taught.features)
            other = jax.tree.map(lambda x: gather_in_groups(x, text, self.pass_groups), own)
            texts |= {"own": own, "other text": other, "other image": own}
            negatives = Negatives(image, self.pass_groups)  # the image of the last texts
        if not texts:
            return loss, scalars
        place = list(texts).index
        states, lengths = (jnp.stack(part, axis=1) for part in zip(*texts.values(), strict=True))
        images, dropout_key = learned.image_tokens, jax.random.fold_in(key, 1)
        fused = towers.fusion(states, lengths, images, negatives=negatives, key=dropout_key)
        if inputs.noise is not None:
            logits = self.model.match_logits(student["matching"], fused[:, place("own") :, 0])
            match = jnp.broadcast_to(jnp.array([True, False, False]), inputs.match_weight.shape)
            flat = logits.reshape(-1, 2), match.ravel(), inputs.match_weight.ravel()
            scalars["loss/matching"] = matching.matching_loss(*flat)
            right = (_likeliest(logits) == codis.MATCH) == match
            scalars["matching/accuracy"] = jnp.sum(jnp.where(right, inputs.match_weight, 0))
            loss += config.losses.matching * scalars["loss/matching"]
        if inputs.masked is not None:
            masked = taken(fused[:, place("masked")], inputs.masked.positions)
            logits, of_teacher = towers.word_logits(masked), None
            if taught.masked_states is not None:
                of_teacher = self.model.towers(state.teaching).word_logits(taught.masked_states)
            scalars["loss/masked_lm"] = masked_word_loss(
                logits, of_teacher, inputs.masked.words, inputs.word_weight, alpha=self.alpha(state)
            )
            right = _likeliest(logits) == inputs.masked.words
            scalars["masked_lm/accuracy"] = jnp.sum(jnp.where(right, inputs.word_weight, 0))
            loss += config.losses.masked_lm * scalars["loss/masked_lm"]
        return loss, scalars

    @jax.named_scope("learn")
    def learn(self, state: TrainState, gradients: PyTree) -> TrainState:
        """The student after the optimizer, the teacher after its average."""
        frozen = state.updates < self.config.codebook.freeze_steps
        frozen |= isinstance(state.running, assignment.RunningCodes)
        given = gradients, state.student, state.moments
        student, moments = optimizer.updated(self.config, self.optimizer, *given, frozen=frozen)
        after = state.replace(student=student, moments=moments)
        if state.teacher is None:
            return after
        averaged = teacher.momentum_average(state.teacher, student["towers"], self.momentum(state))
        return after.replace(teacher=averaged)

    @jax.named_scope("remember")
    def remember(self, state: TrainState, targets: Targets) -> TrainState:
        """The queues with the teacher's features, and the codewords that won them."""
        features, plan, image_id = targets
        if state.queue is not None:
            state = state.replace(queue=enqueue(state.queue, features._asdict(), image_id))
        if plan is None:
            return state
        winners = _likeliest(plan[:, : features.image.shape[0]])
        state = state.replace(usage=codebook.add_winners(state.usage, winners))
        if state.running is None:
            return state
        codes = state.student["codebook"]["codes"]
        rows = jnp.concatenate(features)
        soft = codebook.soft_codes(plan, len(features.image)).reshape(len(rows), -1)
        costs = assignment.codeword_costs(rows, unit(codes))
        after = running.advance(self.config.codebook, state.running, rows, costs, soft)
        codes = after.codes if isinstance(after, assignment.RunningCodes) else codes
        student = {**state.student, "codebook": {"codes": codes}}
        return state.replace(running=after, student=student)

    @jax.named_scope("report")
    def report(
        self, before: TrainState, after: TrainState, inputs: Inputs, plan: Plan | None
    ) -> Scalars:
        """The metrics besides the losses."""
        scalars = {
            "temperature": before.student["temperature"],
            "learning_rate": self.rate(before.updates),
            "bad_in_row": after.bad_in_row,
            "bad_total": after.bad_total,
        }
        if before.teacher is not None:
            scalars |= {"alpha": self.alpha(before), "teacher/momentum": self.momentum(before)}
        if after.queue is not None:
            scalars["queue/filled"] = after.queue.filled
        if inputs.allowed is not None:
            alone = ~inputs.allowed.any(axis=1)
            scalars["matching/without_negative"] = jnp.sum(alone, dtype=jnp.int32)
        if plan is not None:
            scalars |= codebook.codebook_scalars(
                after.usage, plan, len(inputs.tokens), Pair._fields
            )
        return scalars

    # -- schedules

    def alpha(self, state: TrainState) -> Array:
        """Weight of the teacher's soft targets: 0, rising over the first `teacher.alpha_steps`."""
        ramp = state.updates.astype(jnp.float32) / max(self.config.teacher.alpha_steps, 1)
        return jnp.float32(self.config.teacher.alpha) * jnp.minimum(ramp, 1)

    def momentum(self, state: TrainState) -> Array:
        of = self.config.teacher
        return teacher.momentum_at(state.updates, momentum=of.momentum, ramp=of.momentum_ramp)

    # -- evaluation

    def evaluate(
        self,
        state: TrainState,
        source: Source,
        tokenizer: Tokenizer,
        *,
        images: int,
        final: bool,
        progress: Progress | None = None,
        cache: Cache | None = None,
    ) -> Evaluation:
        """Retrieval, or what an evaluation of labels or of expressions asks."""
        student, fused = state.student, self.config.model.text.fusion_depth > 0
        given = source, tokenizer, self.config
        options = dict(images=images, progress=progress)
        if source.kind == "labels":
            return judging.labels(
                zero_shot.tell_labels(self.model, student["towers"], *given, **options)
            )
        if source.kind == "expressions":
            return judging.expressions(
                zero_shot.find_expressions(self.model, student, *given, **options)
            )
        reranks = final or self.config.evaluation.rerank_on_schedule
        scoring = judging.scoring(self.model, student, self.config) if fused and reranks else None
        both = {"student": student["towers"], "teacher": state.teacher}
        towers = {name: parameters for name, parameters in both.items() if parameters is not None}
        options = dict(images=images, books=Bookkeeping(progress, cache))
        results = retrieval.evaluate(self.model, towers, *given, **options, scoring=scoring)
        return judging.recalls(results)

    def _read(
        self, towers: codis.Towers, inputs: Inputs, key: Key[Array, ""] | None
    ) -> tuple[Array, Array, Array | None]:
        """Features and states of the texts, and states of the masked ones, in one run."""
        if inputs.masked is None:
            return *towers.embed_texts(inputs.tokens, inputs.text_length, key), None
        # Side by side: a row's two texts stay on the device that has the row.
        rows, length = inputs.tokens.shape
        tokens = jnp.stack([inputs.tokens, inputs.masked.tokens], axis=1).reshape(2 * rows, length)
        features, states = towers.embed_texts(tokens, jnp.repeat(inputs.text_length, 2), key)
        states = states.reshape(rows, 2, *states.shape[1:])
        return features[::2], states[:, 0], states[:, 1]

    def _negatives(
        self, student: PyTree, learned: Pair, inputs: Inputs, taught: Pair
    ) -> tuple[Array, Array]:
        """The negative image of each text, the negative text of each image: places in a group."""
        hard = self.config.itm.negatives == "hard"
        draw = functools.partial(
            matching.draw_negatives,
            allowed=inputs.allowed,
            groups=self.pass_groups,
            temperature=student["temperature"] if hard else jnp.float32(jnp.inf),
        )
        image = draw(learned.text, taught.image, noise=inputs.noise.text)
        return image, draw(learned.image, taught.text, noise=inputs.noise.image)


def _likeliest(scores: Float[Array, "*some choices"]) -> Int[Array, "*some"]:
    return jax.lax.argmax(scores, scores.ndim - 1, jnp.int32)
