"""The whole objective in float64 NumPy, written from the equations alone, with loops where they are
plainer.

Nothing of codebook_jax is imported: a mistake would have to be made twice. What exists in both
modalities is a pair (image, text); symbols are those of METHOD. Sources: Duan et al., CVPR 2022, 3
(CODIS); Li et al., NeurIPS 2021, 3 (ALBEF); Cuturi 2013 (Sinkhorn); Xie et al. 2018 (IPOT).
"""

from typing import Any, NamedTuple

import numpy as np
from scipy.special import log_softmax, logsumexp, softmax

IMAGE, TEXT = MODALITIES = 0, 1
EMPTY = -1  # the id of what is not queued yet


def unit(rows):
    """Rows of length one."""
    return _double(rows) / np.linalg.norm(_double(rows), axis=-1, keepdims=True)


# -- instance alignment


def candidates(own, image_id, queued_id, same_image):
    """Places in [batch ; queue] of everything in one query's softmax; `queued_id` is EMPTY where
    nothing is queued yet.
    """
    ignore = {"ignore": True, "negative": False}[same_image]
    return [
        place
        for place, other in enumerate([*image_id, *queued_id])
        if place == own or (other != EMPTY and not (ignore and other == image_id[own]))
    ]


def alignment_targets(
    teacher, queue, queued_id, image_id, *, temperature, alpha, same_image="ignore"
):
    """y [query modality, candidates' modality, B, B + Q]: zero for what is not in the softmax."""
    targets = np.zeros((2, 2, len(image_id), len(image_id) + len(queued_id)))
    for query in MODALITIES:
        for key in MODALITIES:
            everyone = np.concatenate([_double(teacher[key]), _double(queue[key])])
            for own in range(len(image_id)):
                here = candidates(own, image_id, queued_id, same_image)
                similarities = everyone[here] @ _double(teacher[query][own])
                targets[query, key, own, here] = alpha * softmax(similarities / temperature)
                targets[query, key, own, own] += 1 - alpha
    return targets


def alignment(
    student,
    teacher,
    queue,
    queued_id,
    image_id,
    targets,
    *,
    temperature,
    intra_weight,
    same_image="ignore",
):
    """L_ica: the mean cross-entropy of each of four directions, and their weighted mean."""
    total = weights = 0.0
    for query in MODALITIES:
        for key in MODALITIES:
            everyone = np.concatenate([_double(teacher[key]), _double(queue[key])])
            direction = 0.0
            for own in range(len(image_id)):
                here = candidates(own, image_id, queued_id, same_image)
                log_p = log_softmax(everyone[here] @ _double(student[query][own]) / temperature)
                direction -= targets[query, key, own, here] @ log_p / len(image_id)
            weight = intra_weight if query == key else 1.0
            total += weight * direction
            weights += weight
    return total / weights


# -- codebook


def costs(features, codes):
    """D(z, c) = 1 - z . c"""
    return 1 - _double(features) @ _double(codes).T


def sinkhorn_plan(cost, *, epsilon, iterations):
    """T = diag(a) exp(-D / epsilon) diag(b) with a and b found by turns, rows last."""
    log_kernel = -_double(cost) / epsilon
    rows, columns = log_kernel.shape
    log_a = np.zeros(rows)
    for _ in range(iterations):
        log_b = -np.log(columns) - logsumexp(log_kernel + log_a[:, None], axis=0)
        log_a = -np.log(rows) - logsumexp(log_kernel + log_b[None, :], axis=1)
    return np.exp(log_a[:, None] + log_kernel + log_b[None, :])


def ipot_plan(cost, *, beta, iterations):
    """T^{s+1} = diag(a) (exp(-D / beta) * T^s) diag(b), one sweep each, b carried on; then a row
    update.

    T^s is kept as the product of all a, all b and exp(-s D / beta), whose logarithms do not
    underflow.
    """
    cost = _double(cost)
    rows, columns = cost.shape
    all_a, all_b, log_b = np.zeros(rows), np.zeros(columns), np.zeros(columns)
    for step in range(1, iterations + 1):
        log_q = all_a[:, None] + all_b[None, :] - step * cost / beta
        log_a = -np.log(rows) - logsumexp(log_q + log_b[None, :], axis=1)
        log_b = -np.log(columns) - logsumexp(log_q + log_a[:, None], axis=0)
        all_a, all_b = all_a + log_a, all_b + log_b
    log_plan = all_a[:, None] + all_b[None, :] - iterations * cost / beta
    return np.exp(log_plan - logsumexp(log_plan, axis=1, keepdims=True)) / rows


def transport_plan(cost, *, solver, epsilon, iterations, ipot_beta):
    """The plan of one modality by the named solver."""
    if solver == "sinkhorn":
        return sinkhorn_plan(cost, epsilon=epsilon, iterations=iterations)
    assert solver == "ipot"
    return ipot_plan(cost, beta=ipot_beta, iterations=iterations)


def soft_codes(plan, batch):
    """q = N T of the batch's rows, which are the first of the N."""
    return len(plan) * plan[:batch]


class CodeLosses(NamedTuple):
    """The parts of L_code."""

    transport: Any
    text_to_code: Any
    image_to_code: Any


def code_losses(student, teacher, codes, q, *, gamma):
    """L_ot, L_t2p and L_i2p, with T = q / B of the batch's rows."""
    codes = _double(codes)
    batch = len(student[IMAGE])
    transport = sum(np.sum(_double(q[m]) / batch * costs(teacher[m], codes)) for m in MODALITIES)

    def predicted(by, of):
        total = 0.0
        for own in range(batch):
            log_p = log_softmax(codes @ _double(student[by][own]) / gamma)
            total -= _double(q[of][own]) @ log_p
        return total / batch

    return CodeLosses(transport, predicted(by=TEXT, of=IMAGE), predicted(by=IMAGE, of=TEXT))


# -- matching and masked words


def negatives(queries, keys, image_id, noise, *, groups, temperature):
    """Each row's place in the batch of its negative: of its group, of another image; -1 where there
    is none.

    `noise` [B, B / groups] is Gumbel's, so that the largest sum is a draw from the softmax.
    """
    size = len(image_id) // groups
    found = np.full(len(image_id), -1)
    for own in range(len(image_id)):
        best = -np.inf
        for place in range(size):
            other = own // size * size + place
            score = _double(queries[own]) @ _double(keys[other]) / temperature + noise[own, place]
            if image_id[other] != image_id[own] and score > best:
                best, found[own] = score, other
    return found


def matching(logits, has_negative):
    """L_itm of logits [B, 3, 2]: a pair, its image with another text, its text with another image;
    class 1: match.
    """
    total = weights = 0.0
    for row, counts in zip(_double(logits), has_negative, strict=True):
        for right, weight, of in zip((1, 0, 0), (1, counts, counts), row, strict=True):
            if weight:
                total -= log_softmax(of)[right]
                weights += 1
    return total / weights


def masked_words(logits, teacher_logits, words, used, *, alpha):
    """L_mlm over the slots [B, slots] that are used."""
    terms = []
    for slot in zip(*np.nonzero(used), strict=True):
        target = alpha * softmax(_double(teacher_logits[slot]))
        target[words[slot]] += 1 - alpha
        terms.append(-target @ log_softmax(_double(logits[slot])))
    return np.mean(terms)


# -- the objective


class Said(NamedTuple):
    """The towers' outputs for a batch; only `teacher` and `teacher_words` are the teacher's."""

    student: Any  # z_v, z_t
    teacher: Any  # z'_v, z'_t
    match: Any  # [image, text, 2]: logits of every image of the batch with every text
    student_words: Any  # [text, tokens, vocab]: logits at every place of the text with hidden words
    teacher_words: Any


class Decided(NamedTuple):
    """Values that pass no gradient: fixed once, before anything is differentiated."""

    alpha: float
    targets: Any  # y of the alignment
    codes: Any  # q_v, q_t
    image_negatives: Any  # the place of each text's
    text_negatives: Any  # the place of each image's


def decide(said, ring, image_id, noise, *, temperature, codebook, alpha, config):
    """Targets, codes and negatives of a batch; `noise` is that of the images' and of the texts'
    draws.
    """
    codes, chosen = config.codebook, []
    for modality in MODALITIES:
        older = ring.newest(codes.queue_samples)[modality]
        rows = np.concatenate([_double(said.teacher[modality]), older])
        plan = transport_plan(
            costs(rows, unit(codebook)),
            solver=codes.solver,
            epsilon=codes.epsilon,
            iterations=codes.iterations,
            ipot_beta=codes.ipot_beta,
        )
        chosen.append(soft_codes(plan, len(image_id)))
    targets = alignment_targets(
        said.teacher,
        ring.rows,
        ring.ids,
        image_id,
        temperature=temperature,
        alpha=alpha,
        same_image=config.alignment.same_image,
    )

    def draw(query, key):
        return negatives(
            said.student[query],
            said.teacher[key],
            image_id,
            noise[query],
            groups=config.itm.groups,
            temperature=temperature,
        )

    return Decided(alpha, targets, chosen, draw(TEXT, IMAGE), draw(IMAGE, TEXT))


def objective(said, decided, ring, image_id, masked, *, temperature, codebook, config):
    """Every loss and their weighted sum, by the names of a step's scalars."""
    parts = code_losses(
        said.student, said.teacher, unit(codebook), decided.codes, gamma=config.codebook.temperature
    )
    losses = {f"loss/codebook_{name}": part for name, part in parts._asdict().items()}
    losses["loss/codebook"] = sum(parts)
    losses["loss/alignment"] = alignment(
        said.student,
        said.teacher,
        ring.rows,
        ring.ids,
        image_id,
        decided.targets,
        temperature=temperature,
        intra_weight=config.alignment.intra_weight,
        same_image=config.alignment.same_image,
    )
    own = np.arange(len(image_id))
    pairs = [(own, own), (own, decided.text_negatives), (decided.image_negatives, own)]
    logits = np.stack([said.match[images, texts] for images, texts in pairs], axis=1)
    losses["loss/matching"] = matching(logits, decided.image_negatives >= 0)
    row = own[:, None]
    losses["loss/masked_lm"] = masked_words(
        said.student_words[row, masked.positions],
        said.teacher_words[row, masked.positions],
        masked.words,
        masked.used,
        alpha=decided.alpha,
    )
    names = ("alignment", "codebook", "matching", "masked_lm")
    losses["loss"] = sum(config.losses[name] * losses[f"loss/{name}"] for name in names)
    return losses


# -- what a run remembers


def alpha_at(updates, *, alpha, alpha_steps):
    """Weight of the soft targets after `updates`: linear from 0."""
    return alpha * min(updates / alpha_steps, 1)


def momentum_at(updates, *, momentum, ramp):
    """m of the average that follows `updates` earlier ones."""
    return min(momentum, (1 + updates) / (10 + updates)) if ramp else momentum


def averaged(teacher, student, momentum):
    """theta' <- m theta' + (1 - m) theta, of arrays in dicts of dicts."""
    if isinstance(teacher, dict):
        return {name: averaged(old, student[name], momentum) for name, old in teacher.items()}
    return momentum * _double(teacher) + (1 - momentum) * _double(student)


class Ring:
    """The last Q features of both modalities, first in, first out; one after another goes to the
    next place.
    """

    def __init__(self, size, dim):
        self.rows, self.ids, self.written = np.zeros((2, size, dim)), np.full(size, EMPTY), 0

    @property
    def valid(self):
        return self.ids != EMPTY

    def enqueue(self, features, ids):
        for *both, own in zip(*features, ids, strict=True):
            place = self.written % len(self.ids)
            self.rows[:, place], self.ids[place] = both, own
            self.written += 1

    def newest(self, count):
        """The newest features of both modalities, newest first, at most as many as exist."""
        there = min(count, self.written, self.rows.shape[1])
        places = [(self.written - 1 - age) % self.rows.shape[1] for age in range(there)]
        return self.rows[:, places]


def _double(x):
    return np.asarray(x, np.float64)
