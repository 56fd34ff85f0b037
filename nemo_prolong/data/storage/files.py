"""What a listing gives."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class SourceFile:
    """One file of a source.

    Attributes:
        path: Local path or ``s3://`` address.
        name: Its name in messages and manifests: relative to the configured path, the same on every machine.
        num_bytes: Its size.
    """

    path: str
    name: str
    num_bytes: int
