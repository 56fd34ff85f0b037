"""One file from a store to the local disk, whole or not at all."""

from __future__ import annotations

import os
import threading
from pathlib import Path

from nemo_prolong.data.storage.disk import writing_to
from nemo_prolong.data.storage.stores import filesystem, with_retries
from nemo_prolong.errors import DataError
from nemo_prolong.files import publish, sync


def download(url: str, destination: str | Path, num_bytes: int | None = None) -> Path:
    """Copy a remote file to ``destination``, which appears complete or not at all.

    Args:
        url: Address such as ``s3://bucket/key``.
        destination: Local file; replaced if it exists.
        num_bytes: Size it must have; None takes the store's word.

    Returns:
        ``destination``.

    Raises:
        DataError: If the file is missing, refused, unreachable or of another size, or the disk is full.
    """
    destination = Path(destination)
    partial = destination.with_name(f".{destination.name}.{os.getpid()}-{threading.get_ident()}.partial")
    with writing_to(destination.parent, num_bytes):
        try:
            fetch(url, partial, num_bytes)
            publish(partial, destination)
        finally:
            partial.unlink(missing_ok=True)
    return destination


def fetch(url: str, path: Path, num_bytes: int | None) -> None:
    """Copy a remote file over ``path`` and sync it; ``path`` is for the caller to publish or remove.

    Raises:
        DataError: If the file is missing, refused, unreachable or of another size than ``num_bytes``.
        OSError: If ``path`` cannot be written.
    """
    # Made here: an error of the local disk would pass for one of the store below.
    path.write_bytes(b"")
    with_retries(url, lambda: _transfer(url, path, num_bytes))
    received = path.stat().st_size
    if num_bytes is not None and received != num_bytes:
        raise DataError(
            url,
            f"has {received} bytes in the store, {num_bytes} were expected.",
            "Use the index or listing that belongs to the file, or copy the file there again.",
        )
    sync(path)


def _transfer(url: str, path: Path, num_bytes: int | None) -> None:
    from fsspec.callbacks import Callback

    progress = Callback()
    filesystem(url).get_file(url, str(path), callback=progress)
    received = path.stat().st_size
    announced = num_bytes if progress.size is None else progress.size
    if announced is not None and received < announced:
        raise ConnectionError(f"the connection ended after {received} of {announced} bytes")
