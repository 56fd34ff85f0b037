"""What an installed Transformer Engine can do for packed rows."""

from __future__ import annotations

from packaging.version import Version

from nemo_prolong.engine.te.backend import installed_version
from nemo_prolong.errors import ConfigError

_EXCHANGES_MASKED_ROWS_SINCE = {"p2p": "2.0", "a2a": "2.10", "all_gather": "2.18", "a2a+p2p": "2.19"}
"""First release whose context parallelism takes document masks (``thd``) with each exchange."""


def check_attention(context_parallel_size: int, cp_comm_type: str, version: str | None = None) -> None:
    """Refuse an exchange that this Transformer Engine would die on at the first row.

    Args:
        context_parallel_size: Ranks that share a row; one exchanges nothing.
        cp_comm_type: The exchange.
        version: Version of Transformer Engine, by default the installed one.

    Raises:
        ConfigError: If this version has no such exchange for rows with document masks.
    """
    found = version or installed_version()
    since = _EXCHANGES_MASKED_ROWS_SINCE[cp_comm_type]
    if context_parallel_size == 1 or found is None or Version(found) >= Version(since):
        return
    raise ConfigError(
        f"parallelism.cp_comm_type={cp_comm_type}",
        f"Transformer Engine {found} cannot exchange rows with document masks by {cp_comm_type}; {since} is the first.",
        "Set parallelism.cp_comm_type=p2p.",
    )
