"""`--mode=plan`: what a training run will need and where its time goes, before there are devices to run it on.

`options.py` what is asked; `chips.py` what accelerators are given to do; `tpu.py` slices that libtpu compiles for; `hlo.py`
what a compiled step sends; `operations.py` its operations by part; `timing.py` the step's bound; `report.py` how it is said;
`foresight.py` all of it together.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_collections

from codebook_jax.plan.options import PlanOptions
from codebook_jax.workdir import check_outputs


def plan(config: ml_collections.ConfigDict, options: PlanOptions) -> dict[str, Any]:
    """Says what training with `config` on `options.devices` chips needs; its figures.

    Raises UserError for an unknown chip and for what does not fit together. JAX has to have that many devices:
    `options.environment` before it is imported.
    """
    if options.json:
        path = Path(options.json)
        check_outputs(path.parent, (path.name,))
    from codebook_jax.plan import foresight  # JAX, after its environment is set

    return foresight.foresee(config, options)
