"""Where metrics go besides ``metrics.jsonl``."""

from __future__ import annotations

from typing import Literal

from nemo_prolong.config.schema.base import Name, Section


class WandbConfig(Section):
    """Weights & Biases. The key comes from ``WANDB_API_KEY`` or ``wandb login``."""

    project: Name = "nemo_prolong"
    """Project the runs belong to."""
    entity: Name | None = None
    """User or team; null is the default one of the key."""
    mode: Literal["online", "offline"] = "online"
    """offline writes under ``<run>/wandb``, for ``wandb sync`` later."""


class MlflowConfig(Section):
    """MLflow. Credentials come from ``MLFLOW_TRACKING_TOKEN``, or user name and password likewise."""

    tracking_uri: Name
    """Address of a server, a database or a directory: ``http://HOST:5000``, ``sqlite:///runs.db``, ``file:mlruns``."""
    experiment: Name = "nemo_prolong"
    """Experiment the runs belong to."""


class TrackerConfig(Section):
    """Where metrics go besides ``metrics.jsonl``."""

    tensorboard: bool = False
    """Write TensorBoard events under ``<run>/tensorboard``."""
    wandb: WandbConfig | None = None
    """Send them to Weights & Biases; needs the package wandb."""
    mlflow: MlflowConfig | None = None
    """Send them to MLflow; needs the package mlflow."""
