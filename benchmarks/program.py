"""What the pre-training step costs on an accelerator, read from its program and not from a clock:
`python benchmarks/program.py`. Needs a CPU alone.

Prints, one line each, what docs/scale.md ("What a step keeps and sends") lists.
"""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from codebook_jax.models import layers, vit

ROWS, TOKENS, WIDTH, HEADS, DEPTH = 4, 256, 768, 12, 2


def main() -> None:
    print(f"kept by a block of ViT-B in bfloat16, x batch x tokens x width: {kept():.1f} bytes")


def kept() -> float:
    """Bytes that the backward pass of a block keeps of its rows, without those of attention."""
    spec = SimpleNamespace(
        width=WIDTH, heads=HEADS, mlp_width=0, init_std=0.02, layer_norm_eps=1e-6
    )
    compute = layers.Compute(jnp.dtype("bfloat16"), "none", 1, "xla", None)
    make = lambda rngs: vit.VisionBlock(spec, compute, rngs)  # noqa: E731
    blocks = nnx.eval_shape(lambda: layers.stack(make, DEPTH, nnx.Rngs(0)))
    graph, state = nnx.split(blocks)

    def run(parameters: Any, x: jax.Array) -> jax.Array:
        apply = lambda block, x, _: block(x)  # noqa: E731
        return layers.scan(nnx.merge(graph, parameters), apply, x, None, compute)

    x = jax.ShapeDtypeStruct((ROWS, TOKENS, WIDTH), jnp.bfloat16)
    pulled = jax.eval_shape(lambda *given: jax.vjp(run, *given)[1], state, x)
    of_rows = [leaf for leaf in jax.tree.leaves(pulled) if {ROWS, ROWS * TOKENS} & {*leaf.shape}]
    found = sum(leaf.size * leaf.dtype.itemsize for leaf in of_rows if HEADS not in leaf.shape)
    return found / (DEPTH * math.prod(x.shape))


if __name__ == "__main__":
    main()
