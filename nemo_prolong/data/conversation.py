"""A conversation between a reader of sources and the encoder of chats: all that a chat template may see of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Message = Mapping[str, Any]
"""``role``, ``content`` and whatever else the template reads, such as ``tool_calls``."""


@dataclass(frozen=True)
class Conversation:
    """The messages of a conversation and what stands beside them.

    Attributes:
        messages: In order.
        trained: Which messages may be targets, one value each. None leaves that to the template.
        variables: What the template sees beside the messages, such as ``tools``.
    """

    messages: Sequence[Message]
    trained: tuple[bool, ...] | None = None
    variables: Mapping[str, Any] = field(default_factory=dict)

    def texts(self) -> Iterator[str]:
        """Yield every string in it but the names of keys."""
        yield from _texts(self.messages)
        yield from _texts(self.variables)

    @property
    def characters(self) -> int:
        """Characters of all its strings."""
        return sum(map(len, self.texts()))


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _texts(item)
    elif isinstance(value, Sequence):
        for item in value:
            yield from _texts(item)
