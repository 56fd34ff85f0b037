"""What Megatron can be told about process groups and NeMo never tells it.

These are the sizes of hierarchical context parallelism (``a2a+p2p``) and the timeout of the groups.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any, NamedTuple

from nemo_prolong.engine.patches.patch import NEMO, Patch, replace

_WORLD_TIMEOUT = "TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC"
"""What NeMo reads the timeout of the world group from. NCCL's monitor ends a process when its watchdog thread has not
got on for as long; its own 8 minutes would come before ours too."""


class _GroupSettings(NamedTuple):
    """See ``group_settings``."""

    hierarchical_sizes: Sequence[int] | None = None
    timeout_seconds: float | None = None


_NO_SETTINGS = _GroupSettings()
_settings: ContextVar[_GroupSettings] = ContextVar("group_settings", default=_NO_SETTINGS)


@contextlib.contextmanager
def group_settings(hierarchical_sizes: Sequence[int] | None, timeout_seconds: float | None) -> Iterator[None]:
    """Have all process groups formed with these settings, wherever they are formed in the block.

    By default the world group of NCCL has a timeout of 10 minutes, the others have 30. Needs ``prepare``.

    Args:
        hierarchical_sizes: Ranks of an all-to-all, then ranks of the ring around them; the product is CP. None forms no
            hierarchical context-parallel groups.
        timeout_seconds: After which a collective fails. None leaves it to the libraries.
    """
    token = _settings.set(_GroupSettings(hierarchical_sizes, timeout_seconds))
    if timeout_seconds is not None:
        # Groups are connected when they are first used, after the block too.
        os.environ[_WORLD_TIMEOUT] = str(math.ceil(timeout_seconds))
    try:
        yield
    finally:
        _settings.reset(token)


def _with_settings(form_groups: Callable[..., None]) -> Callable[..., None]:
    """Return ``initialize_model_parallel`` with the settings of the block that it is called in."""

    @functools.wraps(form_groups)
    def form(*args: Any, **kwargs: Any) -> None:
        settings = _settings.get()
        if settings.hierarchical_sizes is not None:
            kwargs["hierarchical_context_parallel_sizes"] = list(settings.hierarchical_sizes)
        if settings.timeout_seconds is not None:
            kwargs["distributed_timeout_minutes"] = settings.timeout_seconds / 60
        form_groups(*args, **kwargs)

    return form


def _add_the_settings() -> None:
    from megatron.core import parallel_state

    replace(parallel_state, "initialize_model_parallel", _with_settings(parallel_state.initialize_model_parallel))()


PATCH = Patch(
    "process_groups",
    "NeMo calls Megatron's initialize_model_parallel without a timeout and the sizes of a hierarchy, and has no way to "
    "pass them",
    _add_the_settings,
    NEMO,
    after_import=True,
    with_gpu=True,
)
