"""Megatron's half of a save: plan it and write the shards; the small files are left to us.

Megatron writes ``common.pt``, ``.metadata`` and ``metadata.json`` on rank 0 between collectives. When the disk is full
there, rank 0 raises and the others wait for it forever. Here the same calls are taken apart: those that communicate
touch no files, and those that touch files do not communicate.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import multiprocessing
import os
import queue
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from nemo.lightning.io.pl import MegatronCheckpointIO
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.storage import WriteResult

from nemo_prolong.files import synced_file
from nemo_prolong.records.checkpoint.manifest import COMMON_FILE, FORMAT_FILE, METADATA_FILE, WEIGHTS
from nemo_prolong.records.checkpoint.verify import MEGATRON_FORMAT


@dataclass
class PlannedSave:
    """A save that is planned on all ranks, of which nothing is written yet.

    Attributes:
        checkpoint: Directory to write to.
        common: What is not sharded, for ``common.pt``.
        request: Megatron's request that writes this rank's shards.
        writer: What collects their results.
        metadata: Of all shards, on rank 0; None elsewhere.
    """

    checkpoint: Path
    common: dict[str, Any]
    request: AsyncRequest
    writer: FileSystemWriterAsync
    metadata: Metadata | None

    def shard_names(self) -> list[str]:
        """Return the files that this rank writes, relative to the checkpoint."""
        return [f"{WEIGHTS}/{name}" for _, name, _ in self.writer.write_buckets or ()]

    def write_shards(self) -> None:
        """Write the shards of this rank, by a child of this process and its children, and wait for them."""
        self.write_shards_in_background()()

    def write_shards_in_background(self) -> Callable[[], None]:
        """Copy the shards of this rank out of the model, start to write them, and return what waits for the end."""
        if self.request.async_fn is None:
            return lambda: None
        rank, _, results = self.request.async_fn_args
        fork = multiprocessing.get_context("fork")
        receiver, sender = fork.Pipe(duplex=False)
        process = fork.Process(
            target=_write_and_send, args=(self.request.async_fn, rank, self.request.preload_fn(), results, sender)
        )
        with _children_die_with_parent():
            process.start()
        sender.close()

        def wait() -> None:
            try:
                results.put(receiver.recv())
            except EOFError:
                results.put(RuntimeError("a writing process was killed, most likely because memory ran out"))
            process.join()

        return wait

    def shard_results(self) -> list[WriteResult]:
        """Return where the items of this rank lie; call once, after the shards are written.

        Raises:
            OSError, RuntimeError: What went wrong in the writing process.
        """
        results = self.writer.retrieve_write_results()
        if isinstance(results, list):
            return results
        raise results[0]

    def write_metadata(self, results: Sequence[list[WriteResult]]) -> None:
        """Write ``.metadata`` from the results of all ranks; on rank 0."""
        assert self.metadata is not None
        self.writer.finish(self.metadata, list(results))
        assert (self.checkpoint / METADATA_FILE).is_file()

    def write_common(self) -> None:
        """Write what is not sharded; on rank 0."""
        with synced_file(self.checkpoint / COMMON_FILE) as file:
            torch.save(self.common, file)

    def write_format(self) -> None:
        """Write what tells Megatron that this is a distributed checkpoint; on rank 0."""
        with synced_file(self.checkpoint / FORMAT_FILE) as file:
            file.write(json.dumps(MEGATRON_FORMAT).encode())


_POLL_SECONDS = 0.05
_libc = ctypes.CDLL(None)
_PR_SET_PDEATHSIG = 1
_dying_with_parent = False


@contextlib.contextmanager
def _children_die_with_parent() -> Iterator[None]:
    """Let the kernel kill what is forked here, and what that forks, when its parent dies.

    Megatron's writers wait for their parent to take their results. When it is killed they would wait for ever, holding
    the state that they were writing.
    """
    global _dying_with_parent
    _dying_with_parent = True
    try:
        yield
    finally:
        _dying_with_parent = False


def _after_fork() -> None:
    if _dying_with_parent:
        _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


os.register_at_fork(after_in_child=_after_fork)


def _write_and_send(
    write: Callable[..., None], rank: int, buckets: Any, results: queue.Queue[Any], sender: Any
) -> None:
    """Write in a process of its own; the queue is this process's copy."""
    threading.Thread(target=_end_with_a_killed_writer, daemon=True).start()
    write(rank, buckets, results)
    sender.send(results.get())


def _end_with_a_killed_writer() -> None:
    """End this process when one of its writers was killed. Megatron would wait for its results for ever."""
    writers: set[BaseProcess] = set()
    while True:
        writers.update(multiprocessing.active_children())
        if any(writer.exitcode for writer in writers):
            os._exit(1)
        time.sleep(_POLL_SECONDS)


class _PlanningStrategy(TorchDistSaveShardedStrategy):
    """Megatron's strategy, which also shows what its request closes over."""

    writer: FileSystemWriterAsync
    metadata: Metadata | None

    def _get_save_and_finalize_callbacks(self, writer: FileSystemWriterAsync, save_state_dict_ret: Any) -> AsyncRequest:
        self.writer, self.metadata = writer, save_state_dict_ret[1]
        return super()._get_save_and_finalize_callbacks(writer, save_state_dict_ret)


class StageCheckpointIO(MegatronCheckpointIO):
    """NeMo's checkpoint reader and writer, whose ``save_checkpoint`` plans and leaves the writing to its caller.

    Args:
        parallel_load: Every rank reads a share and passes it on; needs CUDA.
    """

    def __init__(self, parallel_load: bool) -> None:
        super().__init__(parallel_load=parallel_load)
        self._planned: PlannedSave | None = None
        self._consistent = False

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Plan the save; ``take_planned`` returns it. The directory ``weights`` exists on every rank already."""
        checkpoint["content_metadata"] = storage_options["content_metadata"]
        # The check that every element is saved once costs a gather, and the layout does not change within a run.
        sharded, common = save_preprocess(checkpoint, not self._consistent)
        self._consistent = True
        strategy = _PlanningStrategy("torch_dist", 1)
        request = FullyParallelSaveStrategyWrapper(strategy).async_save(sharded, Path(path) / WEIGHTS)
        self._planned = PlannedSave(Path(path), common, request, strategy.writer, strategy.metadata)

    def take_planned(self) -> PlannedSave:
        """Return the save that was planned last."""
        assert self._planned is not None
        planned, self._planned = self._planned, None
        return planned
