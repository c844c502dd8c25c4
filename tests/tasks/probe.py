"""A second task in one file: a linear probe, from the image tower to the words of the captions."""

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import PyTree

from codebook_jax.data import augment
from codebook_jax.data.images import decode, resize_square
from codebook_jax.data.scenes.world import COLOURS
from codebook_jax.models import codis
from codebook_jax.parallel import sharding
from codebook_jax.tasks import optimizer
from codebook_jax.tasks.task import Evaluation, Items, Task


@flax.struct.dataclass
class State:
    step: PyTree
    towers: PyTree  # fixed
    head: PyTree
    moments: PyTree


class Probe(Task):
    def __init__(self, config, vocabulary, mesh):
        self.model = codis.Model(config, vocabulary.size, mesh)
        self.optimizer = optimizer.from_config(config)[1]
        super().__init__(config, vocabulary, mesh)
        self.logits = jax.jit(self._logits)

    @staticmethod
    def checkpoint_items():
        return Items(alone=("towers", "head"), trained="head", evaluated=("towers", "head"))

    def fresh(self, key):
        towers = codis.init_student(self.config, self.vocabulary.size, key)["towers"]
        head = {"kernel": jnp.zeros((self.config.model.dim, self.vocabulary.size), jnp.float32)}
        return State(jnp.int32(0), towers, head, self.optimizer.init(head))

    def update(self, state, batch):
        seen = jax.nn.one_hot(batch.tokens, self.vocabulary.size).max(axis=1)

        def loss_of(head):
            logits = self._logits(state.towers, head, batch.image)
            return optax.sigmoid_binary_cross_entropy(logits, seen).mean()

        loss, gradient = jax.value_and_grad(loss_of)(state.head)
        updates, moments = self.optimizer.update(gradient, state.moments, state.head)
        head = optax.apply_updates(state.head, updates)
        return State(state.step + 1, state.towers, head, moments), {
            "loss": loss,
            "bad_step": ~jnp.isfinite(loss),
        }

    def evaluate(self, state, source, tokenizer, *, images, final, progress=None):
        records = [source[place] for place in range(images or len(source))]
        side = self.config.model.image.size_px
        pixels = np.stack([resize_square(decode(record.image), side) for record in records])
        logits = self.logits(state.towers, state.head, sharding.to_device(pixels, self.mesh))
        of_colours = sharding.to_host(logits)[:, tokenizer.encode(list(COLOURS), 8)[0][:, 1]]
        found = np.array(list(COLOURS))[of_colours.argmax(axis=1)]
        named = [
            colour in record.captions[0] for colour, record in zip(found, records, strict=True)
        ]
        share = 100 * float(np.mean(named))
        text = f"the likeliest colour of {share:.1f} % of {len(records)} images is named"
        results = {"probe": {"named": share}}
        return Evaluation(results, {"eval/named": share}, share, "share of colours", text, text)

    def _logits(self, towers, head, images):
        pixels = augment.normalise(images, jnp.float32)
        features = self.model.towers(towers).embed_images(pixels)[0]
        return jax.lax.stop_gradient(features) @ head["kernel"]
