"""Pre-training: read this first. One step teaches, assigns, learns, averages and remembers (Duan et
al. 2022, 3).

Everything is written for the global batch, under one jit over the mesh; the only randomness is
fold_in(seed, step).
A batch larger than memory is split into passes: accumulation.py.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import optax
from jaxtyping import Array, Float, Int, Key

from codebook_jax.data import augment
from codebook_jax.data.batch import Batch
from codebook_jax.data.text import Vocabulary
from codebook_jax.method import losses, teacher, usage
from codebook_jax.method.ambient import key_of, own_settings
from codebook_jax.method.losses import Pair
from codebook_jax.method.sampling import draw_negatives
from codebook_jax.method.transport import codeword_costs, transport_plan
from codebook_jax.models import codis
from codebook_jax.models.bert import Negatives, gather_in_groups
from codebook_jax.models.heads import MATCH
from codebook_jax.parallel import sharding
from codebook_jax.parallel.accumulation import Passes, Scalars
from codebook_jax.tasks import optimizer
from codebook_jax.tasks.draws import Inputs, draw_inputs
from codebook_jax.tasks.state import TrainState


class Taught(NamedTuple):
    """The teacher's outputs for a batch."""

    features: Pair  # z'_v, z'_t
    masked_states: Any  # [B, slots, width]: its fused states at the hidden words


class Learned(NamedTuple):
    """The student's outputs for a batch before fusion."""

    features: Pair  # z_v, z_t
    image_tokens: Any
    text_states: Any
    masked_states: Any  # of the texts with hidden words


def create(config: ml_collections.ConfigDict, vocabulary: Vocabulary, mesh: jax.sharding.Mesh):
    """The task for one config, vocabulary and mesh; raises UserError if they do not fit
    together.
    """
    return Pretraining(config, vocabulary, mesh)


class Pretraining:
    """The jitted programs of a run; holds no parameters."""

    def __init__(
        self, config: ml_collections.ConfigDict, vocabulary: Vocabulary, mesh: jax.sharding.Mesh
    ) -> None:
        self.config, self.vocabulary, self.mesh = config, vocabulary, mesh
        self.model = codis.build_model(config, vocabulary.size, mesh)
        o = config.optimizer
        self.rate = optimizer.schedule(
            peak=o.learning_rate,
            ends=o.learning_rate_ends,
            warmup_steps=o.warmup_steps,
            steps=config.train.steps,
        )
        self.optimizer = optimizer.adamw(
            self.rate,
            weight_decay=o.weight_decay,
            b1=o.b1,
            b2=o.b2,
            eps=o.eps,
            clip_norm=o.clip_norm,
        )
        self.pass_groups = config.itm.groups // o.accumulation
        self.passes = Passes(o.accumulation, mesh)
        shapes = jax.eval_shape(own_settings(self._init), key_of(0))
        self.shardings = sharding.state_shardings(shapes, mesh)
        self._abstract = jax.tree.map(
            lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
            shapes,
            self.shardings,
        )
        rows = sharding.batch_sharding(mesh)
        whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
        self.step = jax.jit(
            own_settings(self._step),
            donate_argnums=0,
            in_shardings=(self.shardings, rows),
            out_shardings=(self.shardings, whole),
        )
        self.encode_images = jax.jit(own_settings(self._encode_images))
        self.encode_texts = jax.jit(own_settings(self._encode_texts))
        self.match = jax.jit(own_settings(self._match))

    # -- state

    def abstract_state(self) -> TrainState:
        """Shapes, types and shardings of the state."""
        return self._abstract

    def init_state(self, seed: int) -> TrainState:
        """A fresh state, created directly on its devices."""
        return jax.jit(own_settings(self._init), out_shardings=self.shardings)(key_of(seed))

    def _init(self, key: Key[Array, ""]) -> TrainState:
        config = self.config
        student = codis.init_student(config, self.vocabulary.size, key)
        return TrainState(
            step=jnp.int32(0),
            student=student,
            teacher=jax.tree.map(jnp.copy, student["towers"]),
            moments=self.optimizer.init(student),
            queue=teacher.empty_queue(config.queue.size, config.model.dim),
            usage=usage.empty_usage(config.codebook.window_samples),
            bad_in_row=jnp.int32(0),
            bad_total=jnp.int32(0),
        )

    # -- the step

    def _step(self, state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Array]]:
        key = jax.random.fold_in(key_of(self.config.seed), state.step)
        draw_key, dropout_key = jax.random.split(key)
        with jax.named_scope("draw"):
            inputs = draw_inputs(batch, draw_key, self.config, self.vocabulary)
        taught = self.passes.over(functools.partial(self.teach, state.teacher), inputs)
        plan = self.assign(taught.features, state)
        (loss, scalars), gradients = self.passes.gradients(
            state.student,
            inputs,
            taught,
            dropout_key,
            embed=self.embed,
            compare=functools.partial(
                self.compare,
                state=state,
                teacher_features=taught.features,
                plan=plan,
                image_id=batch.image_id,
            ),
            pair=functools.partial(
                self.pair, alpha=self.alpha(_updates(state)), teacher_towers=state.teacher
            ),
        )
        gradient_norm = optax.tree.norm(gradients)
        good = jnp.isfinite(loss) & jnp.isfinite(gradient_norm)
        after = self.remember(self.learn(state, gradients), taught.features, plan)
        after = _if_good(good, after, state)
        scalars = {"loss": loss, **scalars, "gradient_norm": gradient_norm, "bad_step": ~good}
        return after, scalars | self.report(state, after, inputs, plan)

    @jax.named_scope("teach")
    def teach(self, towers: Any, inputs: Inputs) -> Taught:
        """The teacher's features of its view of the images and of the texts, and its states at the
        hidden words.
        """
        towers = self.model.towers(towers)
        image, image_tokens = towers.embed_images(self._pixels(inputs.teacher_image))
        text, _, masked_states = self._read(towers, inputs, None)
        if inputs.masked is not None:
            fused = towers.fusion(
                masked_states[:, None], inputs.text_length[:, None], image_tokens
            )[:, 0]
            masked_states = _at_positions(fused, inputs.masked.positions)
        return jax.lax.stop_gradient(Taught(Pair(image, text), masked_states))

    @jax.named_scope("assign")
    def assign(self, features: Pair, state: TrainState) -> Float[Array, "2 rows codes"] | None:
        """The transport plan of the teacher's image and text features over the codewords.

        Its first rows are the batch's; `codebook.queue_samples` more are the queue's newest. Each
        valid row sums to 1 / (their number).
        """
        codebook = self.config.codebook
        if not self.config.losses.codebook:
            return None
        rows, valid = jnp.stack(features), None
        if codebook.queue_samples:
            older, here = teacher.newest(state.queue, codebook.queue_samples)
            rows = jnp.concatenate([rows, jnp.stack(older)], axis=1)
            valid = jnp.concatenate([jnp.ones(features.image.shape[0], bool), here])
            valid = jnp.broadcast_to(valid, rows.shape[:2])
        return transport_plan(
            codeword_costs(rows, codis.unit(state.student["codebook"]["codes"])),
            solver=codebook.solver,
            epsilon=codebook.epsilon,
            iterations=codebook.iterations,
            ipot_beta=codebook.ipot_beta,
            valid=valid,
        )

    @jax.named_scope("embed")
    def embed(self, student: Any, inputs: Inputs, key: Key[Array, ""]) -> Learned:
        """The student's outputs for its view of the images and for the texts, before fusion."""
        towers = self.model.towers(student["towers"])
        image, image_tokens = towers.embed_images(self._pixels(inputs.image))
        text, states, masked_states = self._read(towers, inputs, jax.random.fold_in(key, 0))
        return Learned(Pair(image, text), image_tokens, states, masked_states)

    @jax.named_scope("compare")
    def compare(
        self,
        features: Pair,
        own: Mapping[str, Any],
        *,
        state: TrainState,
        teacher_features: Pair,
        plan: Float[Array, "2 rows codes"] | None,
        image_id: Array,
    ) -> tuple[Array, Scalars]:
        """L_ica and L_code of the global batch's features, weighted; `own` has the codebook and the
        temperature.
        """
        config, scalars, loss = self.config, {}, jnp.float32(0)
        if config.losses.alignment:
            # Every row's candidates are the whole batch and the queue. Without this, XLA splits the
            # candidates instead of the rows, and so gathers the queues and moves the logits.
            candidates, candidate_id = sharding.whole((teacher_features, image_id), self.mesh)
            alignment = losses.alignment_loss(
                features,
                candidates,
                state.queue.features,
                state.queue.valid,
                candidate_id,
                temperature=own["temperature"],
                alpha=self.alpha(_updates(state)),
                intra_weight=config.alignment.intra_weight,
                same_image=config.alignment.same_image,
            )
            scalars["loss/alignment"] = alignment
            loss += config.losses.alignment * alignment
        if plan is not None:
            parts = losses.codebook_losses(
                features,
                teacher_features,
                codis.unit(own["codebook"]["codes"]),
                Pair(*usage.soft_codes(plan, len(image_id))),
                temperature=config.codebook.temperature,
            )
            scalars |= {f"loss/codebook_{name}": part for name, part in parts._asdict().items()}
            scalars["loss/codebook"] = sum(parts)
            loss += config.losses.codebook * sum(parts)
        scalars["features/std"] = jnp.stack(features).std(axis=1).mean()  # towards 0: collapse
        return loss, scalars

    @jax.named_scope("pair")
    def pair(
        self,
        student: Any,
        learned: Learned,
        inputs: Inputs,
        taught: Taught,
        key: Key[Array, ""],
        *,
        alpha: Array,
        teacher_towers: Any,
    ) -> tuple[Array, Scalars]:
        """L_itm and L_mlm, weighted: one run of the fusion encoder over all pairs that either loss
        needs.
        """
        config, scalars, loss = self.config, {}, jnp.float32(0)
        towers = self.model.towers(student["towers"])
        rows: list[
            tuple[Array, Array]
        ] = []  # (states, lengths) of the texts that each image is paired with
        negatives = None
        if inputs.masked is not None:
            rows.append((learned.masked_states, inputs.text_length))
        if inputs.noise is not None:
            own_text = learned.text_states, inputs.text_length
            image, text = self._negatives(student, learned.features, inputs, taught.features)
            other_text = jax.tree.map(
                lambda x: gather_in_groups(x, text, self.pass_groups), own_text
            )
            rows += [own_text, other_text, own_text]  # the last looks at its negative image
            negatives = Negatives(image, self.pass_groups)
        if not rows:
            return loss, scalars
        states, lengths = (jnp.stack(part, axis=1) for part in zip(*rows, strict=True))
        fused = towers.fusion(
            states,
            lengths,
            learned.image_tokens,
            negatives=negatives,
            key=jax.random.fold_in(key, 1),
        )
        if inputs.noise is not None:
            logits = self.model.match_logits(student["matching"], fused[:, -3:, 0])
            match = jnp.broadcast_to(jnp.array([True, False, False]), inputs.match_weight.shape)
            flat = logits.reshape(-1, 2), match.ravel(), inputs.match_weight.ravel()
            scalars["loss/matching"] = losses.matching_loss(*flat)
            right = (_likeliest(logits) == MATCH) == match
            scalars["matching/accuracy"] = jnp.sum(jnp.where(right, inputs.match_weight, 0))
            loss += config.losses.matching * scalars["loss/matching"]
        if inputs.masked is not None:
            logits = towers.word_logits(_at_positions(fused[:, 0], inputs.masked.positions))
            scalars["loss/masked_lm"] = losses.masked_word_loss(
                logits,
                self.model.towers(teacher_towers).word_logits(taught.masked_states),
                inputs.masked.words,
                inputs.word_weight,
                alpha=alpha,
            )
            right = _likeliest(logits) == inputs.masked.words
            scalars["masked_lm/accuracy"] = jnp.sum(jnp.where(right, inputs.word_weight, 0))
            loss += config.losses.masked_lm * scalars["loss/masked_lm"]
        return loss, scalars

    @jax.named_scope("learn")
    def learn(self, state: TrainState, gradients: Any) -> TrainState:
        """The student after the optimizer, the teacher after its average."""
        alignment = self.config.alignment
        frozen = _updates(state) < self.config.codebook.freeze_steps
        gradients["codebook"] = jax.tree.map(
            lambda gradient: jnp.where(frozen, 0, gradient), gradients["codebook"]
        )
        updates, moments = self.optimizer.update(gradients, state.moments, state.student)
        student = optax.apply_updates(state.student, updates)
        student["temperature"] = jnp.clip(
            student["temperature"], alignment.temperature_min, alignment.temperature_max
        )
        averaged = teacher.average(state.teacher, student["towers"], self.momentum(_updates(state)))
        return state.replace(student=student, moments=moments, teacher=averaged)

    @jax.named_scope("remember")
    def remember(
        self, state: TrainState, features: Pair, plan: Float[Array, "2 rows codes"] | None
    ) -> TrainState:
        """The queues with the teacher's features, and the codewords that won them."""
        state = state.replace(queue=teacher.enqueue(state.queue, features))
        if plan is None:
            return state
        winners = _likeliest(plan[:, : features.image.shape[0]])
        return state.replace(usage=usage.record(state.usage, winners))

    @jax.named_scope("report")
    def report(
        self,
        before: TrainState,
        after: TrainState,
        inputs: Inputs,
        plan: Float[Array, "2 rows codes"] | None,
    ) -> Scalars:
        """The metrics besides the losses."""
        scalars = {
            "temperature": before.student["temperature"],
            "alpha": self.alpha(_updates(before)),
            "learning_rate": self.rate(_updates(before)),
            "teacher/momentum": self.momentum(_updates(before)),
            "queue/filled": after.queue.filled,
            "bad_in_row": after.bad_in_row,
            "bad_total": after.bad_total,
        }
        if inputs.allowed is not None:
            scalars["matching/without_negative"] = jnp.sum(
                ~inputs.allowed.any(axis=1), dtype=jnp.int32
            )
        if plan is not None:
            scalars |= usage.codebook_scalars(after.usage, plan, len(inputs.tokens))
        return scalars

    # -- schedules

    def alpha(self, updates: Array) -> Array:
        """Weight of the teacher's soft targets: 0, rising over the first `teacher.alpha_steps`."""
        ramp = updates.astype(jnp.float32) / max(self.config.teacher.alpha_steps, 1)
        return jnp.float32(self.config.teacher.alpha) * jnp.minimum(ramp, 1)

    def momentum(self, updates: Array) -> Array:
        of = self.config.teacher
        return teacher.momentum_at(updates, momentum=of.momentum, ramp=of.momentum_ramp)

    # -- evaluation

    def _encode_images(self, towers: Any, images: Array) -> tuple[Array, Array]:
        return self.model.towers(towers).embed_images(self._pixels(images))

    def _encode_texts(self, towers: Any, tokens: Array, lengths: Array) -> tuple[Array, Array]:
        return self.model.towers(towers).embed_texts(tokens, lengths)

    def _match(self, student: Any, image_tokens: Array, states: Array, lengths: Array) -> Array:
        fused = self.model.towers(student["towers"]).fusion(states, lengths, image_tokens)
        return self.model.match_logits(student["matching"], fused[:, :, 0])[..., MATCH]

    # -- small pieces

    def _pixels(self, images: Array) -> Array:
        return augment.normalise(images, jnp.dtype(self.config.model.dtype))

    def _read(
        self, towers: codis.Towers, inputs: Inputs, key: Key[Array, ""] | None
    ) -> tuple[Array, Array, Array | None]:
        """Features and states of the texts, and states of the masked ones, in one run of the text
        encoder.
        """
        if inputs.masked is None:
            return *towers.embed_texts(inputs.tokens, inputs.text_length, key), None
        # Side by side: a row's two texts stay on the device that has the row.
        rows, length = inputs.tokens.shape
        tokens = jnp.stack([inputs.tokens, inputs.masked.tokens], axis=1).reshape(2 * rows, length)
        features, states = towers.embed_texts(tokens, jnp.repeat(inputs.text_length, 2), key)
        states = states.reshape(rows, 2, *states.shape[1:])
        return features[::2], states[:, 0], states[:, 1]

    def _negatives(
        self, student: Any, learned: Pair, inputs: Inputs, taught: Pair
    ) -> tuple[Array, Array]:
        """For each text a negative image, for each image a negative text: their places in the
        group.
        """
        draw = functools.partial(
            draw_negatives,
            allowed=inputs.allowed,
            groups=self.pass_groups,
            temperature=student["temperature"],
        )
        image = draw(learned.text, taught.image, noise=inputs.noise.text)
        return image, draw(learned.image, taught.text, noise=inputs.noise.image)


def _likeliest(scores: Float[Array, "*some choices"]) -> Int[Array, "*some"]:
    return jax.lax.argmax(scores, scores.ndim - 1, jnp.int32)


def _updates(state: TrainState) -> Array:
    """Steps that changed the parameters, which the schedules count."""
    return state.step - state.bad_total


def _at_positions(
    states: Float[Array, "texts tokens width"], positions: Int[Array, "texts slots"]
) -> Float[Array, "texts slots width"]:
    return jnp.take_along_axis(states, positions[:, :, None], axis=1)


def _if_good(good: Array, after: TrainState, before: TrainState) -> TrainState:
    """The state after a good step; a bad one changes only the counts and the position."""
    chosen = jax.tree.map(lambda new, old: jnp.where(good, new, old), after, before)
    return chosen.replace(
        step=before.step + 1,
        bad_in_row=jnp.where(good, 0, before.bad_in_row + 1),
        bad_total=before.bad_total + (~good).astype(jnp.int32),
    )
