"""Context parallelism splits the documents of a packed row over ranks, and its attention joins them again.

Split a row with ``DocumentPartition``, give every rank its tokens, and replace ``document_attention`` by
``context_parallel_attention``. Outputs and gradients are those of one rank.
"""

from nemo_prolong.ops.context_parallel.attention import context_parallel_attention
from nemo_prolong.ops.context_parallel.partition import DocumentPartition, with_empty_documents

__all__ = ["DocumentPartition", "context_parallel_attention", "with_empty_documents"]
