"""One checkpoint on its way to disk.

The order is what makes it safe: files under a temporary name, fsync, hashes read back from the files, the manifest by
rename, and last the directory's final name. A kill between any two of them leaves a leftover, never half a checkpoint.
"""

from __future__ import annotations

import json
import secrets
import shutil
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import lightning.pytorch as pl
import torch
from megatron.core import parallel_state

from nemo_prolong.distributed.ranks import (
    agree_all,
    from_rank_zero,
    gather_on_rank_zero,
    run_on_all_ranks,
    run_on_rank_zero,
)
from nemo_prolong.engine.checkpoint.megatron_io import PlannedSave
from nemo_prolong.files import sync, write_text_atomically
from nemo_prolong.records.checkpoint.manifest import (
    COMMON_FILE,
    FORMAT_FILE,
    METADATA_FILE,
    MODEL_FILE,
    WEIGHTS,
    CheckpointManifest,
    FileRecord,
    checkpoint_directory,
)
from nemo_prolong.records.checkpoint.model_description import ModelDescription
from nemo_prolong.records.checkpoint.retention import publish_checkpoint
from nemo_prolong.records.checkpoint.verify import hash_files, list_files
from nemo_prolong.records.run_directory import RunDirectory
from nemo_prolong.records.stage_manifest import installed_versions, utc_now


@dataclass
class _Share:
    """What one rank wrote: where its items lie, and the hashes of its files."""

    results: list[Any] = field(default_factory=list)
    files: dict[str, FileRecord] = field(default_factory=dict)
    error: Exception | None = None


class MegatronCheckpointSave:
    """One save of the state of a trainer, see ``CheckpointSave``; every method is called on all ranks.

    Args:
        trainer: Whose strategy has a ``StageCheckpointIO``.
        run: Run directory.
        description: Step and model.
        reached: Called with the name of each point of the path as it is passed.
    """

    def __init__(
        self,
        trainer: pl.Trainer,
        run: RunDirectory,
        description: ModelDescription,
        reached: Callable[[str], None],
    ) -> None:
        self.step = description.step
        self.final = checkpoint_directory(run.path, self.step)
        # Writers of a killed process may outlive it for a moment: they must not meet the files of the next attempt.
        self.temporary = self.final.with_name(f"{self.final.name}.writing-{from_rank_zero(secrets.token_hex(4))}")
        self.manifest: CheckpointManifest | None = None
        self._trainer = trainer
        self._run = run
        self._description = description
        self._reached = reached
        self._planned: PlannedSave
        self._share = _Share()
        self._thread: threading.Thread | None = None

    def start(self, *, background: bool) -> None:
        """Plan the save and write the shards, or start to write them.

        Args:
            background: Return when the state is copied, while it is being written.

        Raises:
            RankFailure: On every rank, if the directory could not be made. What goes wrong later ``complete`` raises.
        """
        self._reached("save_due")
        run_on_rank_zero(lambda: (self.temporary / WEIGHTS).mkdir(parents=True))
        self._reached("directory_made")
        self._trainer.save_checkpoint(self.temporary)
        self._planned = self._trainer.strategy.checkpoint_io.take_planned()
        self._reached("planned")
        if not background:
            self._write_share(self._planned.write_shards)
            return
        try:
            wait = self._planned.write_shards_in_background()
        except Exception as error:  # told to all ranks in complete()
            self._share.error = error
            return
        self._thread = threading.Thread(target=self._write_share, args=(wait,), daemon=True)
        self._thread.start()

    def _write_share(self, write: Callable[[], None]) -> None:
        """Write, or wait for the writer, and hash what this rank wrote; errors are kept for ``complete``."""
        try:
            names = self._planned.shard_names()
            write()
            self._share.results = self._planned.shard_results()
            self._share.files = hash_files(self.temporary, names)
        except Exception as error:  # told to all ranks in complete()
            self._share.error = error

    def is_written(self) -> bool:
        """Return whether all ranks have written their shards."""
        return agree_all(self._thread is None or not self._thread.is_alive())

    def complete(self) -> None:
        """Wait for the shards, write what is not sharded, the manifest, and give the checkpoint its name.

        Raises:
            RankFailure: On every rank, if one could not write.
        """
        run_on_all_ranks(self._finished_share)
        self._reached("shards_written")
        shares = gather_on_rank_zero((self._share.results, self._share.files))
        run_on_rank_zero(lambda: self._write_small_files([results for results, _ in shares or ()]))
        run_on_rank_zero(lambda: self._seal([files for _, files in shares or ()]))

    def _finished_share(self) -> None:
        if self._thread is not None:
            self._thread.join()
        if self._share.error is not None:
            raise self._share.error

    def _write_small_files(self, results: list[list[Any]]) -> None:
        self._planned.write_metadata(results)
        self._reached("metadata_written")
        self._planned.write_common()
        self._reached("common_written")
        self._planned.write_format()
        self._reached("format_written")
        write_text_atomically(self.temporary / MODEL_FILE, json.dumps(asdict(self._description), indent=2) + "\n")
        self._reached("model_written")

    def _seal(self, shares: list[dict[str, FileRecord]]) -> None:
        """Write the manifest and rename the directory; on rank 0."""
        files = hash_files(self.temporary, (MODEL_FILE, METADATA_FILE, COMMON_FILE, FORMAT_FILE))
        for share in shares:
            files |= share
        assert list_files(self.temporary) == set(files), "a file of the checkpoint was hashed by no rank"
        self._reached("hashed")
        sync(self.temporary / WEIGHTS)
        self.manifest = CheckpointManifest(
            step=self.step,
            run=self._run.identity,
            layout=_layout(),
            versions=installed_versions(),
            saved_at=utc_now(),
            files=dict(sorted(files.items())),
        )
        self.manifest.write(self.temporary)
        self._reached("manifest_written")
        publish_checkpoint(self.temporary, self.final)
        self._reached("published")

    def abandon(self) -> None:
        """Delete what was written; on rank 0, after a failure."""
        shutil.rmtree(self.temporary, ignore_errors=True)


def _layout() -> dict[str, int]:
    """Return the sizes of the mesh axes that wrote the checkpoint."""
    return {
        "world_size": torch.distributed.get_world_size(),
        "tensor": parallel_state.get_tensor_model_parallel_world_size(),
        "pipeline": parallel_state.get_pipeline_model_parallel_world_size(),
        "context": parallel_state.get_context_parallel_world_size(),
        "data": parallel_state.get_data_parallel_world_size(),
    }
