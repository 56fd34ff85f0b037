"""The queue through which Megatron's checkpoint writers return their results."""

from __future__ import annotations

import queue

from nemo_prolong.engine.patches.patch import MEGATRON, Patch, replace


def _give_each_writer_a_queue() -> None:
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    replace(filesystem_async, "_get_write_results_queue", queue.Queue)()


PATCH = Patch(
    "results_queue",
    "Megatron starts a server process for one queue of all saves. It takes seconds and half a GiB, outlives a killed "
    "run, and keeps the results of a save that failed. A queue of the process for each writer does without",
    _give_each_writer_a_queue,
    MEGATRON,
    after_import=True,
    with_gpu=True,
)
