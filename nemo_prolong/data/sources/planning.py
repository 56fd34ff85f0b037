"""Files and parts of files to units of about one size: many enough to share out, large enough for a process each."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from nemo_prolong.data.sources.base import Unit
from nemo_prolong.data.storage.files import SourceFile

UNIT_BYTES = 64 * 2**20
"""Input of a unit. A constant: the units of a source must not depend on who reads them."""


def units_of_groups(groups: Iterable[Sequence[SourceFile]], unit_bytes: int) -> Iterator[Unit]:
    """Yield units of whole groups of files (the files of a repository, or single files), in order."""
    files: list[SourceFile] = []
    size_bytes = 0
    for group in groups:
        group_bytes = sum(file.num_bytes for file in group)
        if files and size_bytes + group_bytes > unit_bytes:
            yield Unit(tuple(files), num_bytes=size_bytes)
            files, size_bytes = [], 0
        files += group
        size_bytes += group_bytes
    if files:
        yield Unit(tuple(files), num_bytes=size_bytes)


def units_of_parts(file: SourceFile, part_bytes: Sequence[int], unit_bytes: int) -> Iterator[Unit]:
    """Yield units of consecutive parts of one file (row groups, record batches).

    Args:
        file: The file.
        part_bytes: Size of each part.
        unit_bytes: Largest unit, unless one part is larger.
    """
    start, size_bytes = 0, 0
    for part, num_bytes in enumerate(part_bytes):
        if part > start and size_bytes + num_bytes > unit_bytes:
            yield Unit((file,), start, part, size_bytes)
            start, size_bytes = part, 0
        size_bytes += num_bytes
    yield Unit((file,), start, len(part_bytes), size_bytes)
