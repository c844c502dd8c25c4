"""What the tasks share that choose one label for an example."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from codebook_jax.data.examples import label_number
from codebook_jax.data.text import Tokenizer
from codebook_jax.evaluation import classes
from codebook_jax.evaluation.predicting import Predicted
from codebook_jax.evaluation.submissions import write_rows
from codebook_jax.tasks.finetune import FinetuneState, Finetuning, Rows, scalars_of, without_answers
from codebook_jax.tasks.task import Evaluation


class Classifying(Finetuning):
    """A task that chooses one of its `labels`."""

    def logits(
        self, network: nnx.Module, rows: Rows, key: Key[Array, ""] | None = None
    ) -> Float[Array, "batch labels"]:
        return network(self.pixels(rows.images), rows.tokens, rows.text_length, key)

    def teach(self, network: nnx.Module, rows: Rows) -> Float[Array, "batch labels"]:
        """The teacher's probability of each label."""
        return jax.nn.softmax(self.logits(network, rows))

    def losses(
        self,
        state: FinetuneState,
        network: nnx.Module,
        rows: Rows,
        taught: Float[Array, "batch labels"] | None,
        key: Key[Array, ""],
    ) -> tuple[Float[Array, " batch"], dict[str, Float[Array, " batch"]]]:
        """Cross-entropy with (1 - alpha) times the right label and alpha times the teacher's."""
        logits = self.logits(network, rows, key)
        target = jax.nn.one_hot(rows.target, logits.shape[-1])
        if taught is not None:
            alpha = self.alpha(state)
            target = (1 - alpha) * target + alpha * taught
        right = logits.argmax(axis=-1) == rows.target
        return optax.softmax_cross_entropy(logits, target), {"accuracy": right.astype(jnp.float32)}

    def predicted(
        self,
        network: nnx.Module,
        pixels: Float[Array, "rows images side side 3"],
        tokens: Int[Array, "rows tokens"],
        lengths: Int[Array, " rows"],
    ) -> Float[Array, "rows labels"]:
        """The probability of each label."""
        return jax.nn.softmax(network(pixels, tokens, lengths))

    def judged(self, found: Predicted, tokenizer: Tokenizer) -> Evaluation:
        """Accuracy, with the confusions."""
        known = [number for number, example in enumerate(found.examples) if example.answers]
        if not known:
            return without_answers(found, self.reads, files=self.files(found))
        right = [self.labels[label_number(found.examples[at], self.labels)] for at in known]
        judged = classes.classify([self.answer(found, at) for at in known], right, self.labels)
        figures = judged.figures()
        return Evaluation(
            {"student": figures},
            scalars_of(figures),
            score=figures["accuracy"],
            metric="accuracy in validation",
            summary=f"accuracy {figures['accuracy']:.2f} % (the most frequent label "
            f"{figures['chance_frequent']:.2f} %) of {len(known):,} {self.reads}",
            table=classes.format_table(judged),
            files=self.files(found),
        )

    def answer(self, found: Predicted, at: int) -> str:
        """The label predicted for an example."""
        return self.labels[int(found.outputs[at].argmax())]

    def files(self, found: Predicted) -> tuple[tuple[str, Callable[[Path], str]], ...]:
        """The label of every example with its probability."""
        rows = [
            {"id": example.key, "label": self.answer(found, at), "probability": float(p.max())}
            for at, (example, p) in enumerate(zip(found.examples, found.outputs, strict=True))
        ]
        return (("predictions.jsonl", functools.partial(write_rows, rows=rows)),)
