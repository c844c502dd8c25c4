"""A third modality joins a frozen codebook: the sound of dialling a number beside two_towers.py."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from two_towers import TEXTS, found, picture, trained

from codebook_jax import method

TONES = np.geomspace(500, 3000, 10)  # Hz, one for each digit


def sound(number, draw):
    """Two tones of 32 ms in noise, at 8 kHz; their spectra: [2 x 129]."""
    time, digits = np.arange(256) / 8000, (number // 10, number % 10)
    waves = [np.sin(2 * np.pi * TONES[digit] * time + draw.uniform(0, 6)) for digit in digits]
    waves += draw.normal(0, 0.5, (2, 256))
    return np.log1p(np.abs(np.fft.rfft(waves))).ravel().astype(np.float32)


def sounds(numbers, draw):
    return np.stack([sound(number, draw) for number in numbers])


@nnx.jit
def step(tower, optimizer, x, old, codes, numbers):
    def loss_of(tower):
        z = old | {"sound": tower(x)}
        loss, _ = method.codebook_alignment(z, codes)
        return loss + method.instance_alignment(z, z, ids=numbers, intra_weight=0)[0]

    loss, gradient = nnx.value_and_grad(loss_of)(tower)
    optimizer.update(tower, gradient)
    return loss


if __name__ == "__main__":
    draw, rngs = np.random.default_rng(0), nnx.Rngs(1)
    towers = trained(draw)
    codes = towers.align.codes[...]
    images = np.stack([picture(number, draw) for number in range(100)])
    old = towers(images, TEXTS)
    tower = nnx.Sequential(
        nnx.Linear(2 * 129, 256, rngs=rngs), nnx.gelu, nnx.Linear(256, 64, rngs=rngs)
    )
    optimizer = nnx.Optimizer(tower, optax.adam(2e-3), wrt=nnx.Param)
    for _ in range(300):
        numbers = draw.integers(0, 100, 64)
        known = jax.tree.map(lambda z: z[numbers], old)  # noqa: B023
        loss = step(tower, optimizer, sounds(numbers, draw), known, codes, numbers)
    z = towers(images, TEXTS) | {"sound": tower(sounds(range(100), draw))}
    print(f"sounds: loss {loss:.2f}")
    for a in z:
        print(a, {b: found(z[a], z[b]) for b in z if b != a}, "of 100 found")
    print("old embeddings unchanged:", all(bool(jnp.all(z[name] == old[name])) for name in old))
