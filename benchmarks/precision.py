"""How much bfloat16 changes the outputs of an untrained model: `python benchmarks/precision.py
--size base --batch 4`.

The same random weights, pictures and captions, computed in float32 and in bfloat16: the cosine
between both versions of each [CLS] feature, and the losses of one step without dropout. Prints one
line of JSON.
"""

from __future__ import annotations

import argparse
import json

import jax
import numpy as np
from train_step import random_task


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="base")
    parser.add_argument("--batch", type=int, default=4)
    options = parser.parse_args()
    narrow, wide = (
        measured(options.size, options.batch, dtype) for dtype in ("bfloat16", "float32")
    )
    figures: dict[str, object] = {"size": options.size, "batch": options.batch}
    for name in ("image", "text"):
        figures[f"least cosine, {name}"] = float(np.sum(narrow[name] * wide[name], axis=1).min())
    for name in (name for name in wide if name.startswith("loss")):
        figures[name] = {"float32": wide[name], "off by": abs(narrow[name] / wide[name] - 1)}
    print(json.dumps(figures))


def measured(size: str, batch: int, dtype: str) -> dict[str, object]:
    """Unit features of the batch, and the losses of a step."""
    fields = {
        "data.global_batch": batch,
        "model.dtype": dtype,
        "model.text.dropout": 0.0,
        "model.remat": "none",
    }
    task, rows = random_task(size, fields)
    state = task.init_state(0)
    towers = state.student["towers"]
    found = {
        "image": np.asarray(task.encode_images(towers, rows.image)[0]),
        "text": np.asarray(task.encode_texts(towers, rows.tokens, rows.text_length)[0]),
    }
    _, scalars = task.step(state, rows)
    losses = jax.device_get(
        {name: value for name, value in scalars.items() if name.startswith("loss")}
    )
    return found | {name: float(value) for name, value in losses.items()}


if __name__ == "__main__":
    main()
