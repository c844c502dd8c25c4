"""Packs shards on Apache Beam, with any runner, whose workers must all reach the one folder."""

from __future__ import annotations

import pickle
import shlex
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from codebook_jax.data.packing import full_disk_named
from codebook_jax.data.sources import Source
from codebook_jax.errors import UserError, reason


def pack(
    pack_shard: Callable[[Source, int], object],
    source: Source,
    shards: Sequence[int],
    folder: Path,
    *,
    runner: str,
    options: str,
) -> None:
    """Packs shards of the source, pickled in `folder`; raises UserError if that fails."""
    try:
        import apache_beam
        from apache_beam.options.pipeline_options import PipelineOptions
    except ImportError as failure:
        raise UserError(
            f"config.prepare.beam_runner={runner} needs Apache Beam: pip install "
            '"codebook_jax[beam]"'
        ) from failure

    file = folder / "source.pickle"
    file.write_bytes(pickle.dumps(source, protocol=pickle.HIGHEST_PROTOCOL))

    class PackShard(apache_beam.DoFn):
        def setup(self) -> None:  # once per worker
            self._source = pickle.loads(file.read_bytes())

        def process(self, shard: int) -> Iterator[int]:
            pack_shard(self._source, shard)
            yield shard

    try:
        pipeline_options = PipelineOptions(shlex.split(options), runner=runner)
        with (
            full_disk_named(folder.parent),
            apache_beam.Pipeline(options=pipeline_options) as pipeline,
        ):
            numbers = pipeline | apache_beam.Create(list(shards)) | apache_beam.Reshuffle()
            numbers | apache_beam.ParDo(PackShard())
    except UserError:
        raise
    except (Exception, SystemExit) as failure:
        raise UserError(
            f"Apache Beam's {runner} failed ({reason(failure)}): check config.prepare.beam_runner "
            "and beam_options; the same command continues with the missing shards"
        ) from failure
