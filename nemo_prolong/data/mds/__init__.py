"""MDS directories: the format in which ProLong publishes packed rows, read and written without its library."""

from nemo_prolong.data.mds.files import SHARD_BYTES, MdsReader, MdsWriter

__all__ = ["SHARD_BYTES", "MdsReader", "MdsWriter"]
