"""Packs shards on Apache Beam, with any runner: its workers write into one folder, which all must
reach.
"""

from __future__ import annotations

import pickle
import shlex
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from codebook_jax.data.sources import Source
from codebook_jax.errors import UserError


def pack(
    pack_shard: Callable[[Source, int], object],
    source_file: Path,
    shards: Sequence[int],
    *,
    runner: str,
    options: str,
) -> None:
    """Packs these shards of the source that is pickled in `source_file`; raises UserError for an
    unknown runner, or if a worker raises one.
    """
    try:
        import apache_beam
        from apache_beam.options.pipeline_options import PipelineOptions
    except ImportError as failure:
        raise UserError(
            f"config.prepare.beam_runner={runner} needs Apache Beam: pip install "
            '"codebook_jax[beam]"'
        ) from failure

    class PackShard(apache_beam.DoFn):
        """Packs a shard; the source is opened once per worker."""

        def setup(self) -> None:
            self._source = pickle.loads(source_file.read_bytes())

        def process(self, shard: int) -> Iterator[int]:
            pack_shard(self._source, shard)
            yield shard

    try:
        pipeline_options = PipelineOptions(shlex.split(options), runner=runner)
        with apache_beam.Pipeline(options=pipeline_options) as pipeline:
            numbers = pipeline | "shards" >> apache_beam.Create(list(shards))
            spread = numbers | "spread" >> apache_beam.Reshuffle()
            spread | "pack" >> apache_beam.ParDo(PackShard())
    except UserError:
        raise
    except (Exception, SystemExit) as failure:
        raise UserError(_sentence(failure, runner)) from failure


def _sentence(failure: BaseException, runner: str) -> str:
    """The UserError of a worker, which Beam wraps; else one with Beam's own message."""
    inner: BaseException | None = failure
    while inner is not None:
        if isinstance(inner, UserError):
            return str(inner)
        inner = inner.__cause__ or inner.__context__
    lines = str(failure).strip().splitlines() or [type(failure).__name__]
    return (
        f"Apache Beam's {runner} failed ({lines[0]}): check config.prepare.beam_runner and "
        "beam_options; the same command continues with the missing shards"
    )
