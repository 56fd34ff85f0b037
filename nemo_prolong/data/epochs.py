"""How often a stage walks through each row set, said where a user sees it."""

from __future__ import annotations

import logging
from collections.abc import Mapping

log = logging.getLogger(__name__)

MAX_EPOCHS = 2.7
"""Most often that ProLong's own stages walk through one of their directories: 0.63B tokens of textbooks are drawn from
about 0.23B (sizes of the published data sets; the paper does not state it)."""


def log_epochs(epochs: Mapping[str, float]) -> None:
    """Log how often each row set is walked through, and warn of those that repeat more than the recipe's own do.

    Args:
        epochs: Row set to epochs.
    """
    log.info("epochs: %s", ", ".join(f"{path} {count:.2f}" for path, count in epochs.items()))
    repeated = {path: count for path, count in epochs.items() if count > MAX_EPOCHS}
    if repeated:
        log.warning(
            "%s: more than the %g epochs that the recipe's own data repeats at most; give more documents, or a smaller "
            "proportion.",
            ", ".join(f"{path} is walked through {count:.1f} times" for path, count in repeated.items()),
            MAX_EPOCHS,
        )
