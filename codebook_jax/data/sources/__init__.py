"""Sources of pairs, stories or examples, read by index, so that any process and any worker can read
any part.
`opening` opens the source that a config names; the other modules each read one format.
"""

from codebook_jax.data.sources.opening import open_source, source_of
from codebook_jax.data.sources.record import KINDS, ROLES, Example, Record, Source, Story

__all__ = ["KINDS", "ROLES", "Example", "Record", "Source", "Story", "open_source", "source_of"]
