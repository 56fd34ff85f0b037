"""Weights & Biases, online or offline (``wandb sync <run>/wandb/offline-run-*`` sends it later)."""

from __future__ import annotations

import uuid

from nemo_prolong.config.schema import WandbConfig
from nemo_prolong.telemetry.tracker import Figures, TrackedRun


class WandbTracker:
    """One W&B run per run directory. A resumed run continues it.

    Args:
        cfg: Where it goes.
        run: The run.
    """

    def __init__(self, cfg: WandbConfig, run: TrackedRun) -> None:
        import wandb

        run_id, _ = run.id_of("wandb", lambda: uuid.uuid4().hex)
        self._run = wandb.init(
            project=cfg.project,
            entity=cfg.entity,
            mode=cfg.mode,
            dir=str(run.directory.path),
            id=run_id,
            resume="allow",
            name=run.name,
            job_type=run.stage,
            config=run.config,
            # Command line, remote of the repository and console could hold what the configuration no longer does. Also
            # the console is ours to redirect.
            settings=wandb.Settings(console="off", disable_git=True, save_code=False, x_disable_meta=True),
        )

    def log(self, figures: Figures, step: int, unix_time: float) -> None:
        """Record the figures. Steps that W&B has seen are ignored there."""
        self._run.log(dict(figures), step=step)

    def close(self, *, succeeded: bool) -> None:
        """Send the rest."""
        self._run.finish(exit_code=0 if succeeded else 1)
