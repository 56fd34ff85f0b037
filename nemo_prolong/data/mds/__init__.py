"""MDS directories: the format in which ProLong publishes packed rows, read and written without its library."""

from nemo_prolong.data.mds.reader import MdsReader
from nemo_prolong.data.mds.shard import OFFSET_BYTES, SHARD_BYTES, ShardFormat
from nemo_prolong.data.mds.writer import MdsWriter

__all__ = ["OFFSET_BYTES", "SHARD_BYTES", "MdsReader", "MdsWriter", "ShardFormat"]
