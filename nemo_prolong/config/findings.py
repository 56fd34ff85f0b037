"""Several configuration errors as one.

A user who made three mistakes wants to hear of three. The loader and the checks collect ``ConfigError`` objects and
raise them together, one line each.
"""

from __future__ import annotations

from collections.abc import Sequence

from nemo_prolong.errors import ConfigError


class ConfigErrors(ConfigError):
    """More than one configuration error; ``what``, ``rule`` and ``remedy`` are those of the first.

    Args:
        errors: At least two errors, in the order in which they are printed.
    """

    def __init__(self, errors: Sequence[ConfigError]) -> None:
        self.errors = tuple(errors)
        first = self.errors[0]
        super().__init__(first.what, first.rule, first.remedy)

    def __reduce__(self) -> tuple[type[ConfigErrors], tuple[tuple[ConfigError, ...]]]:  # type: ignore[override]
        # One from a process of a pool is all of them too.
        return type(self), (self.errors,)

    def __str__(self) -> str:
        """Return the messages, one line each."""
        return "\n".join(str(error) for error in self.errors)


class NothingGivenError(ConfigError):
    """Nothing is set where one of several keys must be; ``--cfg`` prints such a configuration as it is."""


def raise_all(errors: Sequence[ConfigError]) -> None:
    """Raise ``errors`` as one exception; do nothing when there are none.

    Raises:
        ConfigError: The only error, or all of them as ``ConfigErrors``.
    """
    if len(errors) == 1:
        raise errors[0]
    if errors:
        raise ConfigErrors(errors)
