"""Object stores through fsspec: which address is remote, how the store is opened, what is tried again, what is not."""

from __future__ import annotations

import errno
import functools
import logging
import os
import random
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from nemo_prolong.data.storage.disk import is_full
from nemo_prolong.errors import ConfigError, DataError

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

T = TypeVar("T")

log = logging.getLogger(__name__)
_SCHEME = re.compile(r"([a-z][a-z0-9+.-]*)://")
_ATTEMPTS = 5
_FIRST_DELAY_SECONDS = 0.5
_LONGEST_DELAY_SECONDS = 20.0
_SAID_CHARACTERS = 200
_CONNECT_TIMEOUT_SECONDS = 10
_READ_TIMEOUT_SECONDS = 60
# Its own generator: a retry must not move the generators that a training run seeds.
_RANDOM = random.SystemRandom()
# What s3fs gives for answers that no second request would change: bad requests, wrong regions, unknown operations.
_FINAL_ERRNOS = {errno.EINVAL, errno.ENOSYS, errno.EPERM, errno.ENAMETOOLONG, errno.EREMCHG}
# One per process and thread, as fsspec makes them. Kept for good: a forked child drops its parent's from fsspec's own
# cache, and closing one there would wait for a thread that the child does not have.
_OPENED: dict[int, AbstractFileSystem] = {}
_TRUE = {"1", "true", "yes", "on"}


def is_remote(path: str | Path) -> bool:
    """Return whether ``path`` is an address such as ``s3://bucket/key`` and no local path.

    Addresses are kept as ``str``: ``pathlib.Path`` would make one slash of the two.
    """
    return isinstance(path, str) and _SCHEME.match(path) is not None


def filesystem(url: str) -> AbstractFileSystem:
    """Return the file system of an address, with the settings that AWS tools take from the environment.

    Credentials, region and ``AWS_ENDPOINT_URL`` are read by botocore itself; ``AWS_REQUEST_PAYER=requester`` and
    ``AWS_NO_SIGN_REQUEST=yes`` are read here.

    Raises:
        DataError: If nothing installed reads the address's scheme.
    """
    import fsspec

    match = _SCHEME.match(url)
    assert match is not None, url
    scheme = match[1]
    _survive_forks()
    try:
        opened = fsspec.filesystem(scheme, **(_s3_options() if scheme in ("s3", "s3a") else {}))
    except (ImportError, ValueError) as error:
        raise DataError(
            url,
            f"nothing that is installed reads {scheme}:// ({error}).",
            f"Use s3:// or a local copy, or install the fsspec package for {scheme}.",
        ) from error
    return _OPENED.setdefault(id(opened), opened)


@functools.cache
def _survive_forks() -> None:
    """Let forked processes, such as a loader's workers, start fsspec's thread anew; they would wait for ever."""
    from fsspec.asyn import reset_lock

    os.register_at_fork(after_in_child=reset_lock)


def _s3_options() -> dict[str, Any]:
    return {
        "anon": os.environ.get("AWS_NO_SIGN_REQUEST", "").lower() in _TRUE,
        "requester_pays": os.environ.get("AWS_REQUEST_PAYER", "").lower() == "requester",
        # A listing is wanted as it is now, and one of a million keys would stay in memory.
        "use_listings_cache": False,
        "config_kwargs": {
            "connect_timeout": _CONNECT_TIMEOUT_SECONDS,
            "read_timeout": _READ_TIMEOUT_SECONDS,
            # Tried again in one place only (with_retries): the attempts of nested layers would multiply.
            "retries": {"total_max_attempts": 1, "mode": "standard"},
        },
    }


def with_retries(url: str, operation: Callable[[], T]) -> T:
    """Return what ``operation`` returns, trying again where the connection or the store failed for the moment.

    Delays double from half a second, drawn between half and all of it, so that many workers do not return at once.

    Args:
        url: The address, for messages.
        operation: Reads from the store; must be safe to repeat.

    Raises:
        DataError: If the address does not exist, is refused, or failed ``AWS_MAX_ATTEMPTS`` times (5 by default).
        OSError: If the local disk is full.
    """
    attempts = _attempts()
    for attempt in range(1, attempts + 1):
        try:
            return operation()
        except _store_errors() as error:
            if is_full(error):
                raise
            final = _final_answer(url, error)
            if final is not None:
                raise final from error
            if attempt == attempts:
                raise _gave_up(url, attempts, error) from error
            delay_seconds = _delay_seconds(attempt)
            log.warning(
                "%s: attempt %d of %d failed (%s); next in %.1f s", url, attempt, attempts, said(error), delay_seconds
            )
            time.sleep(delay_seconds)
    raise AssertionError("the loop returns or raises")


def _attempts() -> int:
    text = os.environ.get("AWS_MAX_ATTEMPTS", str(_ATTEMPTS))
    if not text.isdecimal() or int(text) < 1:
        raise ConfigError(
            f"AWS_MAX_ATTEMPTS={text}", "is no whole number above 0.", f"Set AWS_MAX_ATTEMPTS={_ATTEMPTS}."
        )
    return int(text)


def _delay_seconds(attempt: int) -> float:
    longest = min(_FIRST_DELAY_SECONDS * 2 ** (attempt - 1), _LONGEST_DELAY_SECONDS)
    return _RANDOM.uniform(longest / 2, longest)


def _store_errors() -> tuple[type[Exception], ...]:
    from aiohttp import ClientError as HttpError
    from botocore.exceptions import BotoCoreError, ClientError

    return (OSError, HttpError, BotoCoreError, ClientError)


def _final_answer(url: str, error: Exception) -> DataError | None:
    """Return the error to raise where another attempt would give the same answer, else None."""
    from botocore import exceptions as boto

    if isinstance(error, FileNotFoundError):
        return DataError(
            url,
            f"is not in the store ({said(error)}).",
            "Check bucket and key; where the store is not Amazon's, AWS_ENDPOINT_URL.",
        )
    if isinstance(error, PermissionError | boto.NoCredentialsError | boto.PartialCredentialsError):
        return _denied(url, error)
    if isinstance(error, boto.ParamValidationError | boto.ProfileNotFound | boto.NoRegionError):
        return DataError(url, f"cannot be asked for ({said(error)}).", "Correct the address or the AWS settings.")
    if isinstance(error, OSError) and error.errno in _FINAL_ERRNOS:
        return DataError(url, f"is refused by the store ({said(error)}).", "Correct the address, or the AWS region.")
    return None


def _denied(url: str, error: Exception) -> DataError:
    return DataError(
        url,
        f"may not be read with the credentials of this environment ({said(error)}).",
        "Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE; where the reader pays for the transfer also "
        "AWS_REQUEST_PAYER=requester; for a public bucket AWS_NO_SIGN_REQUEST=yes.",
    )


def _gave_up(url: str, attempts: int, error: Exception) -> DataError:
    return DataError(
        url,
        f"could not be read in {attempts} attempts; the last ended with: {said(error)}.",
        "Check the network and AWS_ENDPOINT_URL, or be more patient with AWS_MAX_ATTEMPTS=10.",
    )


def said(error: Exception) -> str:
    """Return the words of an error on one line and without the full stop, or its type where it has none."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else error
    return " ".join(str(text).split())[:_SAID_CHARACTERS].rstrip(".") or type(error).__name__
