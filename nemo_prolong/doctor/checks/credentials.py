"""Whether the tokens are there that a stage will be asked for. Their names are looked at, their values are not kept."""

from __future__ import annotations

import netrc
from collections.abc import Iterator, Mapping
from pathlib import Path

from nemo_prolong.config.schema import RunConfig
from nemo_prolong.doctor.finding import Finding, good, warning

_WANDB_HOST = "api.wandb.ai"
_AWS_SOURCES = (
    "AWS_ACCESS_KEY_ID",
    "AWS_PROFILE",
    "AWS_NO_SIGN_REQUEST",
    "AWS_WEB_IDENTITY_TOKEN_FILE",
    "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
    "AWS_CONTAINER_CREDENTIALS_FULL_URI",
    "~/.aws/credentials",
)
_MLFLOW_SOURCES = ("MLFLOW_TRACKING_TOKEN", "MLFLOW_TRACKING_USERNAME", "~/.mlflow/credentials")
_HF_SOURCES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "~/.cache/huggingface/token")

_FILES = ("~/.aws/credentials", "~/.mlflow/credentials", "~/.cache/huggingface/token")


def known_sources(environment: Mapping[str, str], home: Path) -> frozenset[str]:
    """Return the names of variables that are set and of files that exist, of those that hold tokens.

    Args:
        environment: Variables of the process.
        home: Directory of the user.
    """
    names = {*_AWS_SOURCES, *_MLFLOW_SOURCES, *_HF_SOURCES, "WANDB_API_KEY"}
    found = {name for name in names if environment.get(name)}
    found |= {file for file in _FILES if (home / file.removeprefix("~/")).is_file()}
    if _has_login(home / ".netrc", _WANDB_HOST):
        found.add("~/.netrc")
    return frozenset(found)


def credential_findings(cfg: RunConfig, sources: frozenset[str]) -> list[Finding]:
    """Return a finding for every token that the stage needs, by its name.

    Args:
        cfg: The stage.
        sources: Of ``known_sources``.
    """
    return [_finding(*wanted, sources) for wanted in _wanted(cfg)]


def _wanted(cfg: RunConfig) -> Iterator[tuple[str, tuple[str, ...], str, str]]:
    """Yield what a stage needs: its name, where it may come from, why, and how to set it."""
    wandb, mlflow, root = cfg.tracker.wandb, cfg.tracker.mlflow, cfg.data.root
    if wandb is not None and wandb.mode == "online":
        yield (
            "Weights & Biases",
            ("WANDB_API_KEY", "~/.netrc"),
            "Training goes on without it, and its metrics are in metrics.jsonl alone.",
            "Set WANDB_API_KEY in the environment of the job, run wandb login, or set tracker.wandb.mode=offline.",
        )
    if mlflow is not None and mlflow.tracking_uri.startswith("http"):
        yield (
            "MLflow",
            _MLFLOW_SOURCES,
            "A server that asks for one gets no metrics. Training goes on without it.",
            "Set MLFLOW_TRACKING_TOKEN in the environment of the job, unless the server is open.",
        )
    if root.startswith(("s3://", "s3a://")):
        yield (
            "S3",
            _AWS_SOURCES,
            "Shards cannot be read unless the machine itself may read the bucket (an instance role).",
            "Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE, or for a public bucket AWS_NO_SIGN_REQUEST.",
        )
    if root.startswith("hf://"):
        yield (
            "Hugging Face",
            _HF_SOURCES,
            "Private and gated data sets are refused, and public ones are rationed.",
            "Set HF_TOKEN in the environment of the job.",
        )


def _finding(service: str, accepted: tuple[str, ...], why: str, remedy: str, sources: frozenset[str]) -> Finding:
    present = [name for name in accepted if name in sources]
    if present:
        return good("credentials", f"{service}: {present[0]} is there.")
    return warning("credentials", f"{service}: no token ({', '.join(accepted)}).", why, remedy)


def _has_login(path: Path, host: str) -> bool:
    try:
        return host in netrc.netrc(str(path)).hosts
    except (OSError, netrc.NetrcParseError):
        return False
