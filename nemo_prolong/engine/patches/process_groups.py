"""Process groups of hierarchical context parallelism (``a2a+p2p``), which Megatron can form and NeMo never asks for."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any

from nemo_prolong.engine.patches.patch import NEMO, Patch, replace

_sizes: ContextVar[Sequence[int] | None] = ContextVar("hierarchical_context_parallel_sizes", default=None)


@contextlib.contextmanager
def hierarchical_context_parallel(sizes: Sequence[int] | None) -> Iterator[None]:
    """Have Megatron form hierarchical context-parallel groups too, wherever its groups are formed in the block.

    Needs ``prepare``.

    Args:
        sizes: Ranks of an all-to-all, then ranks of the ring around them; the product is CP. None changes nothing.
    """
    token = _sizes.set(sizes)
    try:
        yield
    finally:
        _sizes.reset(token)


def _with_sizes(form_groups: Callable[..., None]) -> Callable[..., None]:
    """Return ``initialize_model_parallel`` with the sizes of the block that it is called in."""

    @functools.wraps(form_groups)
    def form(*args: Any, **kwargs: Any) -> None:
        sizes = _sizes.get()
        if sizes is not None:
            kwargs["hierarchical_context_parallel_sizes"] = list(sizes)
        form_groups(*args, **kwargs)

    return form


def _add_the_sizes() -> None:
    from megatron.core import parallel_state

    replace(parallel_state, "initialize_model_parallel", _with_sizes(parallel_state.initialize_model_parallel))()


PATCH = Patch(
    "hierarchical_groups",
    "NeMo calls Megatron's initialize_model_parallel without the sizes of a hierarchy and has no way to pass them",
    _add_the_sizes,
    NEMO,
    after_import=True,
    with_gpu=True,
)
