"""The rows of a stage as NeMo's data module, with a position that survives a resume."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from nemo.lightning.data import WrappedDataLoader
from nemo.lightning.pytorch.plugins import MegatronDataSampler
from torch.utils.data import DataLoader

from nemo_prolong.config.schema import RunConfig
from nemo_prolong.data.child_processes import start_loader_server
from nemo_prolong.data.dataset import PackedRowDataset, ValidationRowDataset
from nemo_prolong.data.epochs import log_epochs
from nemo_prolong.data.loading import LoadedRows, collate_loaded
from nemo_prolong.errors import DataError


class _RowSampler(MegatronDataSampler):
    """NeMo's sampler, whose loader starts its processes from a fork server.

    NeMo makes a new loader and leaves out how the old one started processes. Forking a process that holds the threads
    of gloo or CUDA can hang.
    """

    def transform_dataloader(self, dataloader: DataLoader[Any], consumed_samples: int = 0) -> DataLoader[Any]:
        """Return a loader of this rank's share of the rows."""
        loader = super().transform_dataloader(dataloader, consumed_samples)
        if loader.num_workers:
            start_loader_server()
            loader.multiprocessing_context = "forkserver"
        return loader


class PackedDataModule(pl.LightningDataModule):
    """Feeds global row ``i`` of the stage to step ``i // global_batch_size``, for any number of ranks.

    Args:
        cfg: The stage; ``data``, ``train``, ``seq_length`` and ``seed`` decide which rows come.

    Raises:
        DataError: If a directory is missing, empty or does not fit the configuration.
    """

    def __init__(self, cfg: RunConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self._train_rows = PackedRowDataset(
            cfg.data.root,
            cfg.data.mixture,
            cfg.seq_length,
            cfg.seed,
            num_rows=cfg.train.train_iters * cfg.train.global_batch_size,
            apply_instruct_masks=cfg.data.apply_instruct_masks,
            vocab_size=cfg.model.vocab_size,
            cache=cfg.data.cache,
        )
        log_epochs(self._train_rows.epochs())
        self._validation_rows = self._build_validation_rows()
        self.data_sampler = _RowSampler(
            seq_len=cfg.seq_length,
            micro_batch_size=cfg.train.micro_batch_size,
            global_batch_size=cfg.train.global_batch_size,
            output_log=False,
        )

    @property
    def validates(self) -> bool:
        """Whether the stage has a validation set and an interval."""
        return self._validation_rows is not None

    def rows_of_step(self, step: int) -> list[str]:
        """Return where the rows of a step are stored; the first step is 1."""
        rows = self.cfg.train.global_batch_size
        return [self._train_rows.place(index) for index in range((step - 1) * rows, step * rows)]

    def _build_validation_rows(self) -> ValidationRowDataset | None:
        data = self.cfg.data
        if not data.validation or self.cfg.train.val_check_interval == 0:
            return None
        rows = ValidationRowDataset(
            data.root,
            data.validation,
            self.cfg.seq_length,
            data.apply_instruct_masks,
            self.cfg.model.vocab_size,
            data.cache,
        )
        needed = self.cfg.train.limit_val_batches * self.cfg.train.global_batch_size
        if len(rows) < needed:
            raise DataError(
                f"train.limit_val_batches={self.cfg.train.limit_val_batches}",
                f"a validation takes {needed} rows, data.validation has {len(rows)}.",
                f"Set train.limit_val_batches={len(rows) // self.cfg.train.global_batch_size} (0 is none: "
                "train.val_check_interval=0), or prepare more validation rows.",
            )
        if not any(rows[index].loss_mask.any() for index in range(needed)):
            raise DataError(
                f"data.validation={','.join(data.validation)}",
                f"no token of the {needed} rows that a validation takes is a target, so there is no validation loss.",
                "Prepare them again with longer rows or shorter conversations, or set train.val_check_interval=0.",
            )
        return rows

    def _loader(self, rows: PackedRowDataset | ValidationRowDataset, mode: str) -> WrappedDataLoader:
        workers = self.cfg.data.num_workers
        return WrappedDataLoader(
            mode=mode,
            dataset=LoadedRows(rows),
            collate_fn=collate_loaded,
            num_workers=workers,
            persistent_workers=workers > 0,
        )

    def train_dataloader(self) -> WrappedDataLoader:
        """Return the training rows; NeMo adds the sampler that splits them over data-parallel ranks."""
        return self._loader(self._train_rows, "train")

    def val_dataloader(self) -> WrappedDataLoader | list[Any]:
        """Return the validation rows, or nothing."""
        return self._loader(self._validation_rows, "validation") if self._validation_rows is not None else []

    def state_dict(self) -> dict[str, int]:
        """Return the position: rows consumed so far."""
        assert self.trainer is not None
        return {"consumed_train_rows": self.trainer.global_step * self.cfg.train.global_batch_size}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Continue after the rows that were consumed."""
        consumed = state_dict["consumed_train_rows"]
        self.data_sampler.init_consumed_samples = consumed
        self.data_sampler.prev_consumed_samples = consumed
        self.data_sampler.init_global_step = consumed // self.cfg.train.global_batch_size
