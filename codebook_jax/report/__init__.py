"""Pages for people to read, each one self-contained HTML file: that of a run (`--mode=report`) and
that of check-data.

page.py writes a page from its template, including the stylesheet, the script, the chart library
(uPlot) and the pictures.
"""

from __future__ import annotations

from collections.abc import Container
from pathlib import Path

import ml_collections


def report(
    config: ml_collections.ConfigDict | None,
    workdir: Path | str,
    flags: Container[str] | None = None,
) -> None:
    """Writes `report.html` into a run's workdir and prints its path; see run.py."""
    from codebook_jax.report import run

    run.write_report(config, Path(workdir).absolute(), flags)
