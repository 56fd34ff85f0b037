"""Context parallelism: the documents of a packed row split over ranks, and the attention that joins them again.

Split a row with ``DocumentPartition``, give every rank its tokens, and replace ``document_attention`` by
``context_parallel_attention``: outputs and gradients are those of one rank.
"""

from nemo_prolong.ops.context_parallel.attention import context_parallel_attention
from nemo_prolong.ops.context_parallel.partition import DocumentPartition

__all__ = ["DocumentPartition", "context_parallel_attention"]
