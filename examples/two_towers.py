"""The objective in a model of your own: pictures of numbers and their names meet in a codebook."""

import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from PIL import Image, ImageDraw, ImageFont

from codebook_jax import method

ONES = "zero one two three four five six seven eight nine".split()
TENS = "ten twenty thirty forty fifty sixty seventy eighty ninety".split()
NAMES = ONES + [f"{ten} and {one}" for ten in TENS for one in ONES]
TEXTS = np.array([list(name.ljust(18).encode()) for name in NAMES])  # [100, 18]


def picture(number, draw):
    image, font = Image.new("L", (36, 24)), ImageFont.load_default(18)
    ImageDraw.Draw(image).text(tuple(draw.integers(0, (12, 5))), str(number), 255, font)
    return np.asarray(image, np.float32).ravel() / 255


class Towers(nnx.Module):
    def __init__(self, rngs):
        self.letters = nnx.Embed(128, 16, rngs=rngs)
        layers = lambda n: (nnx.Linear(n, 256, rngs=rngs), nnx.gelu, nnx.Linear(256, 64, rngs=rngs))  # noqa: E731
        self.image, self.text = (nnx.Sequential(*layers(n)) for n in (24 * 36, 18 * 16))
        self.align = method.CodebookAlignment(codes=128, dim=64, rngs=rngs)

    def __call__(self, images, texts):
        letters = self.letters(texts).reshape(len(texts), -1)
        return {"image": self.image(images), "text": self.text(letters)}


@nnx.jit
def step(towers, optimizer, images, numbers):
    def loss_of(towers):
        z = towers(images, jnp.asarray(TEXTS)[numbers])
        loss, aux = towers.align(z)
        return loss + method.instance_alignment(z, ids=numbers, intra_weight=0)[0], aux

    (loss, aux), gradient = nnx.value_and_grad(loss_of, has_aux=True)(towers)
    optimizer.update(towers, gradient)
    return loss, aux.perplexity["image"]


def trained(draw, steps=300):
    towers = Towers(nnx.Rngs(0))
    optimizer = nnx.Optimizer(towers, optax.adam(2e-3), wrt=nnx.Param)
    for i in range(steps):
        numbers = draw.integers(0, 100, 64)
        images = np.stack([picture(number, draw) for number in numbers])
        loss, used = step(towers, optimizer, images, numbers)
        if i % 50 == 0:
            print(f"step {i}: loss {loss:.2f}, {used:.0f} codewords in use")
    return towers


def found(queries, candidates):
    cosines = method.unit(queries) @ method.unit(candidates).T
    return int(jnp.sum(jnp.argmax(cosines, axis=1) == jnp.arange(len(queries))))


if __name__ == "__main__":
    draw = np.random.default_rng(0)
    towers = trained(draw)
    z = towers(np.stack([picture(number, draw) for number in range(100)]), TEXTS)
    print(f"{found(z['image'], z['text'])} of 100 new pictures find their name")
