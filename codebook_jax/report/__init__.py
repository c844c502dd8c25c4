"""Pages to look at, each one file of HTML that needs nothing else: a run's (`--mode=report`), and that of check-data.

page.py writes one from its template, with the stylesheet, the script, the chart library (uPlot) and the pictures inside.
"""

from __future__ import annotations

from pathlib import Path

import ml_collections


def report(config: ml_collections.ConfigDict | None, workdir: Path | str) -> None:
    """Writes `report.html` into a run's workdir and prints its path; see run.py."""
    from codebook_jax.report import run  # not above: it imports JAX, which check-data does without

    run.write_report(config, Path(workdir).absolute())
