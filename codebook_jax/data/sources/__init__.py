"""Where images and captions come from, by index, so that any process and any worker can read any part.

`opening` finds the source that a config names; a file beside it for each format that people have on disk.
"""

from codebook_jax.data.sources.opening import ROLES, open_source, source_of
from codebook_jax.data.sources.record import Record, Source

__all__ = ["ROLES", "Record", "Source", "open_source", "source_of"]
