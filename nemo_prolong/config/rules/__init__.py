"""Rules between fields: pure functions from a typed configuration to the errors in it.

Nothing here looks at a file, a device or an environment variable, so every rule holds on a login node as on the
cluster. Whether a parent, a data directory or a run directory exists is the business of ``stages``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import Any

from nemo_prolong.config.findings import raise_all
from nemo_prolong.config.rules.attention import Platform
from nemo_prolong.config.rules.constraints import constraint_findings
from nemo_prolong.config.rules.evaluate import evaluate_findings
from nemo_prolong.config.rules.memory import memory_findings
from nemo_prolong.config.rules.overlap import overlap_findings
from nemo_prolong.config.rules.prepare import PREPARE_RULES
from nemo_prolong.config.rules.ranks import check_world, ranks_to_start
from nemo_prolong.config.rules.run import RUN_RULES
from nemo_prolong.config.schema import EvaluateConfig, RunConfig, Section
from nemo_prolong.config.schema.base import MissingValueError
from nemo_prolong.config.schema.prepare import PrepareConfig
from nemo_prolong.errors import ConfigError

_RULES: dict[type[Section], Sequence[Callable[[Any], Iterable[ConfigError]]]] = {
    RunConfig: RUN_RULES,
    PrepareConfig: PREPARE_RULES,
    EvaluateConfig: (evaluate_findings,),
}

__all__ = ["check", "check_platform", "check_world", "findings", "platform_findings", "ranks_to_start"]


def check(cfg: Section) -> None:
    """Check a whole configuration.

    Raises:
        ConfigError: If any rule is broken; all broken rules in one message.
    """
    raise_all(findings(cfg))


def check_platform(cfg: RunConfig, platform: Platform) -> None:
    """Check a stage against the versions and the device it is about to run on.

    Args:
        cfg: A checked configuration.
        platform: What was found at start-up.

    Raises:
        ConfigError: If something the stage needs does not exist there; all reasons in one message.
    """
    raise_all(platform_findings(cfg, platform))


def platform_findings(cfg: RunConfig, platform: Platform) -> list[ConfigError]:
    """Return everything that a stage needs and a platform does not have.

    Args:
        cfg: A checked configuration.
        platform: What was found.
    """
    return [*constraint_findings(cfg, platform), *memory_findings(cfg, platform), *overlap_findings(cfg, platform)]


def findings(cfg: Section) -> list[ConfigError]:
    """Return every broken rule of a configuration of any script; sections without cross-field rules have none.

    A rule that needs a missing value of an incomplete configuration cannot be judged, and is left out.
    """
    found: list[ConfigError] = []
    for rule in next((rules for schema, rules in _RULES.items() if isinstance(cfg, schema)), ()):
        with suppress(MissingValueError):
            found += rule(cfg)
    return found
