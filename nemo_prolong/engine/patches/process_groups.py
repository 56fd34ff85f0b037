"""Process groups of hierarchical context parallelism (``a2a+p2p``), which Megatron can form and NeMo never asks for."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence

from megatron.core import parallel_state


@contextlib.contextmanager
def hierarchical_context_parallel(sizes: Sequence[int] | None) -> Iterator[None]:
    """Have Megatron form hierarchical context-parallel groups too, wherever its groups are formed in the block.

    NeMo 2.7.3 calls ``initialize_model_parallel`` without this argument and offers no way to add it.

    Args:
        sizes: Ranks that exchange heads, then ranks of the ring around them; the product is CP. None changes nothing.
    """
    if sizes is None:
        yield
        return
    form_groups = parallel_state.initialize_model_parallel
    parallel_state.initialize_model_parallel = functools.partial(
        form_groups, hierarchical_context_parallel_sizes=list(sizes)
    )
    try:
        yield
    finally:
        parallel_state.initialize_model_parallel = form_groups
