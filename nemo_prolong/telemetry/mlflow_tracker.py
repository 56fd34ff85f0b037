"""MLflow, with a tracking server or with a directory or database of its own."""

from __future__ import annotations

from typing import Any

from nemo_prolong.config.schema import MlflowConfig
from nemo_prolong.telemetry.tracker import Figures, TrackedRun

_MOST_PARAMS = 100
"""Parameters that the server takes in one request."""

_LONGEST_PARAM = 500
"""Characters that every server takes as the value of a parameter."""


class MlflowTracker:
    """One MLflow run per run directory. A resumed run continues it.

    Its client names the run in every call, because MLflow's active run belongs to one thread of a process.

    Args:
        cfg: Where it goes.
        run: The run.
    """

    def __init__(self, cfg: MlflowConfig, run: TrackedRun) -> None:
        from mlflow import MlflowClient

        self._client = MlflowClient(tracking_uri=cfg.tracking_uri)
        self._run_id, is_new = run.id_of("mlflow", lambda: self._create(cfg.experiment, run))
        if is_new:
            self._log_params(run.config)
        else:
            self._client.update_run(self._run_id, status="RUNNING")

    def _create(self, experiment: str, run: TrackedRun) -> str:
        found = self._client.get_experiment_by_name(experiment)
        experiment_id = found.experiment_id if found else self._client.create_experiment(experiment)
        created = self._client.create_run(experiment_id, run_name=run.name, tags={"stage": run.stage})
        run_id: str = created.info.run_id
        return run_id

    def _log_params(self, config: dict[str, Any]) -> None:
        from mlflow.entities import Param

        params = [Param(key, str(value)[:_LONGEST_PARAM]) for key, value in flattened(config).items()]
        for begin in range(0, len(params), _MOST_PARAMS):
            self._client.log_batch(self._run_id, params=params[begin : begin + _MOST_PARAMS])

    def log(self, figures: Figures, step: int, unix_time: float) -> None:
        """Send the figures of a step in one request."""
        from mlflow.entities import Metric

        milliseconds = int(1000 * unix_time)
        metrics = [Metric(name, value, milliseconds, step) for name, value in figures.items()]
        self._client.log_batch(self._run_id, metrics=metrics)

    def close(self, *, succeeded: bool) -> None:
        """Say how the run ended."""
        self._client.set_terminated(self._run_id, status="FINISHED" if succeeded else "FAILED")


def flattened(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested sections as one level with dotted keys.

    >>> flattened({"train": {"train_iters": 5}, "seed": 42})
    {'train.train_iters': 5, 'seed': 42}
    """
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, dict):
            flat.update(flattened(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat
