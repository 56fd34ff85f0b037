"""Rules of an evaluation."""

from __future__ import annotations

from nemo_prolong.config.schema import EvaluateConfig
from nemo_prolong.errors import ConfigError


def evaluate_findings(cfg: EvaluateConfig) -> list[ConfigError]:
    """Return every broken rule of an evaluation."""
    ascending = sorted(set(cfg.position_buckets))
    if cfg.position_buckets == ascending:
        return []
    buckets = ",".join(str(end) for end in cfg.position_buckets)
    fix = ",".join(str(end) for end in ascending)
    rule = "upper ends of the buckets must ascend."
    return [ConfigError(f"position_buckets=[{buckets}]", rule, f"Set position_buckets=[{fix}].")]
