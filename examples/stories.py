"""Stories: which name belongs to which picture is not told, only their order; see two_towers.py."""

import sys

import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from PIL import Image, ImageDraw
from two_towers import NAMES, TEXTS, Towers, picture

from codebook_jax import method

FRAMES, SENTENCES = 6, 5  # one frame has no name
ORDER = method.Order(locality=0.5, spread=0.1, width=1.0)


def stories(count, draw):
    """Pictures [count, 6, pixels], names [count, 5, letters], and which picture each belongs to."""
    numbers = draw.integers(0, 100, (count, FRAMES))
    told = np.sort(draw.random((count, FRAMES)).argsort(axis=1)[:, :SENTENCES], axis=1)
    pictures = np.stack([picture(number, draw) for number in numbers.ravel()])
    names = np.take_along_axis(numbers, told, axis=1)
    return pictures.reshape(count, FRAMES, -1), TEXTS[names], told, names


def embed(towers, pictures, texts):
    z = towers(pictures.reshape(-1, pictures.shape[-1]), texts.reshape(-1, texts.shape[-1]))
    return {name: method.unit(steps).reshape(len(pictures), -1, 64) for name, steps in z.items()}


@nnx.jit
def step(towers, optimizer, pictures, texts):
    def loss_of(towers):
        z = embed(towers, pictures, texts)
        loss, _ = towers.align(z, order=ORDER)
        whole = {name: steps.mean(axis=1) for name, steps in z.items()}
        return loss + method.instance_alignment(whole, intra_weight=0)[0]

    loss, gradient = nnx.value_and_grad(loss_of)(towers)
    optimizer.update(towers, gradient)
    return loss


def aligned(z):
    here = (jnp.ones(steps.shape[:2], bool) for steps in (z["image"], z["text"]))
    cosines = jnp.einsum("bnd,bmd->bnm", z["image"], z["text"])
    return method.align_steps(1 - cosines, ORDER, *here)


def drawn(plan, pictures, names):
    """The alignment of one story: a row for each picture, a column for each name."""
    side, page = 90, Image.new("L", (90 * (SENTENCES + 1), 90 * (FRAMES + 1)), 255)
    pen = ImageDraw.Draw(page)
    for column, number in enumerate(names):
        pen.text((side * (column + 1) + 4, 40), NAMES[number].replace(" and ", "\n"), 0)
    for row, pixels in enumerate(pictures):
        page.paste(Image.fromarray(np.uint8(255 * pixels.reshape(24, 36))), (27, side * row + 120))
        for column, mass in enumerate(plan[row] * FRAMES):
            box = [side * (column + 1) + 2, side * (row + 1) + 2]
            pen.rectangle([*box, box[0] + 86, box[1] + 86], int(255 * (1 - mass)), 200)
    return page


if __name__ == "__main__":
    draw, towers = np.random.default_rng(0), Towers(nnx.Rngs(0))
    optimizer = nnx.Optimizer(towers, optax.adam(2e-3), wrt=nnx.Param)
    for i in range(400):
        pictures, texts, *_ = stories(32, draw)
        loss = step(towers, optimizer, pictures, texts)
        if i % 50 == 0:
            print(f"step {i}: loss {loss:.2f}")
    pictures, texts, told, names = stories(100, draw)
    plan = np.asarray(aligned(embed(towers, pictures, texts)))
    right = (plan.argmax(axis=1) == told).mean()
    print(f"{right:.0%} of the names are aligned most with their picture")
    drawn(plan[0], pictures[0], names[0]).save(sys.argv[1] if sys.argv[1:] else "alignment.png")
