"""`--mode=plan`: what a training run will need and where its time goes, before there are devices to
run it on.

`options.py`: the flags; `chips.py`: what accelerators can do; `tpu.py`: slices that libtpu compiles
for; `hlo.py`: what a compiled step sends; `operations.py`: its operations by part; `timing.py`:
bounds on its time; `report.py`: the printed text;
`foresight.py`: the whole plan.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_collections

from codebook_jax.files import check_outputs
from codebook_jax.tools.plan.options import PlanOptions


def plan(config: ml_collections.ConfigDict, options: PlanOptions) -> dict[str, Any]:
    """Prints what training with `config` on `options.devices` chips needs; returns the figures.

    Raises UserError for an unknown chip or settings that do not fit together. JAX must have that
    many devices: set
    `options.environment` before importing it.
    """
    if options.json:
        path = Path(options.json)
        check_outputs(path.parent, (path.name,))
    from codebook_jax.tools.plan import foresight

    return foresight.foresee(config, options)
