"""The errors a user can cause, one exit code each.

Every message has three parts: what was set (``path=value``), the rule it broke, and the remedy with a concrete value.
Internal invariants are asserted instead; they are bugs of ours and keep their traceback.
"""

from __future__ import annotations

from typing import ClassVar

EXIT_PREEMPTED = 75
"""Exit code of a run that was asked to stop and saved its state first (``EX_TEMPFAIL``: run the same command again)."""


EXIT_INTERRUPTED = 130
"""Exit code after Ctrl-C: what a shell gives a command that SIGINT ends."""


EXIT_HUNG = 76
"""Exit code of a rank that made no progress for ``faults.hang_seconds``: the launcher may start all ranks anew."""


EXIT_NO_GO = 7
"""Exit code of ``scripts/doctor.py`` where it found something that a stage would die of."""


class ProlongError(Exception):
    """Base of every error that is the user's to fix; printed without a traceback.

    Args:
        what: The setting or file as the user wrote it, e.g. ``seq_length=1000``.
        rule: The rule it breaks, one sentence.
        remedy: What to set, type or install instead.
    """

    exit_code: ClassVar[int] = 1
    of_one_rank: ClassVar[bool] = False
    """Whether a rank other than the first prints it too. The first may not have found it."""

    def __init__(self, what: str, rule: str, remedy: str) -> None:
        self.what = what
        self.rule = rule
        self.remedy = remedy
        super().__init__(f"{what}: {rule} {remedy}")

    def __reduce__(self) -> tuple[type[ProlongError], tuple[str, str, str]]:
        # Exceptions are pickled by their message alone, which is one argument too few when a worker process raises.
        return type(self), (self.what, self.rule, self.remedy)


class ConfigError(ProlongError):
    """A setting is unknown, of the wrong type, or in conflict with another one."""

    exit_code = 2


class LauncherError(ConfigError):
    """What a launcher says about this process is incomplete or contradicts itself."""

    of_one_rank = True


class DataError(ProlongError):
    """A data directory is missing, empty, unreadable or not what the configuration says."""

    exit_code = 3


class CheckpointError(ProlongError):
    """A run or checkpoint directory is missing, incomplete, foreign or already taken."""

    exit_code = 4


class ExportError(ProlongError):
    """A model cannot be exported, or its export does not equal the model."""

    exit_code = 5


class TrainingError(ProlongError):
    """Training itself goes wrong: too many steps in a row would have harmed the model."""

    exit_code = 6
