"""Read files by path or address: what the other rooms of the data use.

A path is local, or an address that fsspec knows. ``s3://`` is the one that is tested. Settings come from the
environment, as for AWS's own tools. Nothing here is cached except by :func:`local_copy`.
"""

from __future__ import annotations

from pathlib import Path

from nemo_prolong.data.storage.cache import ShardCache
from nemo_prolong.data.storage.files import SourceFile
from nemo_prolong.data.storage.listing import list_files
from nemo_prolong.data.storage.stores import filesystem, is_remote, with_retries
from nemo_prolong.data.storage.transfer import download
from nemo_prolong.errors import DataError

__all__ = ["download", "is_remote", "list_files", "local_copy", "read_bytes"]


def read_bytes(path: str | Path) -> bytes:
    """Return the content of a small file, local or remote.

    Raises:
        DataError: If it is missing, refused or unreachable.
    """
    if isinstance(path, str) and is_remote(path):
        store = filesystem(path)
        content: bytes = with_retries(path, lambda: store.cat_file(path))
        return content
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise DataError(f"{path}", f"cannot be read ({error.strerror}).", "Check the path.") from error


def local_copy(file: SourceFile, cache: Path | None = None) -> Path:
    """Return a local path with the content of ``file``: its own, or of a copy that is downloaded once.

    Args:
        file: A file as :func:`list_files` gave it.
        cache: Directory of the copies; None takes the default of :class:`ShardCache`.

    Raises:
        DataError: If the file cannot be had, has another size than when it was listed, or the disk is full.
    """
    if not is_remote(file.path):
        return Path(file.path)
    return (ShardCache(cache) if cache else ShardCache()).get(file.path, file.num_bytes, {})
