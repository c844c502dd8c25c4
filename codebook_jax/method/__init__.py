"""The objective of CODIS for any JAX model: losses, assignments, queue, teacher, sequences.

    from codebook_jax import method

Pure functions on arrays; modalities are named. Source: Duan et al., CVPR 2022.
"""

from codebook_jax.method.assignment import (
    Assign,
    RunningCodes,
    codeword_costs,
    column_error,
    ipot,
    make_plan,
    move_unused,
    nearest,
    row_error,
    running_codes,
    sinkhorn,
    softmax,
    swav,
    unbalanced,
    update_center,
    update_codes,
)
from codebook_jax.method.codebook import soft_codes
from codebook_jax.method.masking import MaskedText, Masking, mask_words, masked_word_loss
from codebook_jax.method.matching import draw_negatives, matching_loss, may_be_negatives
from codebook_jax.method.modules import CodebookAlignment, codebook_functions, init_codes
from codebook_jax.method.numerics import unit
from codebook_jax.method.objective import (
    CodebookAux,
    InstanceAux,
    codebook_alignment,
    instance_alignment,
)
from codebook_jax.method.ordering import (
    Order,
    align_steps,
    sequence_similarities,
    sequence_similarity,
)
from codebook_jax.method.queue import Queue, empty_queue, enqueue, newest
from codebook_jax.method.teacher import momentum_at, momentum_average

__all__ = [
    "Assign",
    "CodebookAlignment",
    "CodebookAux",
    "InstanceAux",
    "MaskedText",
    "Masking",
    "Order",
    "Queue",
    "RunningCodes",
    "align_steps",
    "codebook_alignment",
    "codebook_functions",
    "codeword_costs",
    "column_error",
    "draw_negatives",
    "empty_queue",
    "enqueue",
    "init_codes",
    "instance_alignment",
    "ipot",
    "make_plan",
    "mask_words",
    "masked_word_loss",
    "matching_loss",
    "may_be_negatives",
    "momentum_at",
    "momentum_average",
    "move_unused",
    "nearest",
    "newest",
    "row_error",
    "running_codes",
    "sequence_similarities",
    "sequence_similarity",
    "sinkhorn",
    "soft_codes",
    "softmax",
    "swav",
    "unbalanced",
    "unit",
    "update_center",
    "update_codes",
]
