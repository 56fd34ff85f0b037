"""Ranks that end together: the error of one rank is raised on all, wherever they are.

A rank that leaves alone leaves the others in a collective. Under gloo they get a broken connection, under NCCL they
wait. So a rank says why it leaves at the store where the ranks met, and leaves when the others know. Nothing is sent
while all is well. Each rank looks at the store once a second.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch.distributed import Store

from nemo_prolong import errors
from nemo_prolong.config.ending import explained_os_error
from nemo_prolong.errors import CheckpointError, ProlongError

log = logging.getLogger(__name__)

_POLL_SECONDS = 1.0
_KNOWN_SECONDS = 15.0
"""How long a rank that leaves waits for the others to know. One that was killed never will."""
_STUCK_SECONDS = 15.0
"""How long a rank that knows may stay in a collective, after which its process is ended. Under gloo it gets out when
the other rank is gone."""


@contextmanager
def ending_together(store: Store, rank: int, world_size: int) -> Iterator[None]:
    """Raise the error that the block raises on this rank on all ranks, with its message and its exit code.

    Args:
        store: Of ``open_store``. This is entered once for each store.
        rank: This rank.
        world_size: Number of ranks.

    Raises:
        ProlongError: On every rank, if the block raised one on any rank, or the operating system refused something
            there. It is the first.
    """
    if world_size == 1:
        yield
        return
    ending = _Ending(store, rank, world_size)
    ending.watch()
    try:
        yield
    except ProlongError as error:
        raise ending.agree(error) from error
    except Exception as error:
        # What a collective raises where the other rank is gone, or a full disk of this one.
        explained = explained_os_error(error, CheckpointError) if isinstance(error, OSError) else None
        told = ending.told() or explained
        if told is None:
            raise
        raise ending.agree(told) from error
    finally:
        ending.over.set()


class _Ending:
    """What one rank knows of the end of all."""

    def __init__(self, store: Store, rank: int, world_size: int) -> None:
        self.over = threading.Event()
        # A connection of its own: the other one may be waiting for a rank that never comes.
        self._store = store.clone()  # type: ignore[attr-defined] # missing in torch's stubs
        self._rank = rank
        self._world_size = world_size
        self._told: ProlongError | None = None

    def watch(self) -> None:
        """Look at the store from a thread until the block is over."""
        threading.Thread(target=self._watch, name="ending", daemon=True).start()

    def told(self) -> ProlongError | None:
        """Return the error that a rank has told the others, if any."""
        if self._told is None and self._reachable(lambda: self._store.check(["ending/error"])):
            self._told = _unpacked(self._store.get("ending/error"))
        return self._told

    def agree(self, error: ProlongError) -> ProlongError:
        """Tell the others, wait until they know, and return the error that all ranks raise."""
        self._outlive_launcher()
        self._reachable(lambda: self._store.compare_set("ending/error", "", _packed(error)))
        error = self.told() or error
        self._acknowledge()
        others = [f"ending/known/{rank}" for rank in range(self._world_size)]
        deadline = time.monotonic() + _KNOWN_SECONDS
        while time.monotonic() < deadline and self._reachable(lambda: not self._store.check(others)):
            time.sleep(0.05)
        return error

    def _watch(self) -> None:
        while not self.over.wait(_POLL_SECONDS):
            error = self.told()
            if error is not None:
                self._acknowledge()
                if not self.over.wait(_STUCK_SECONDS):
                    # The main thread is in a call that no exception reaches.
                    if self._rank == 0:
                        log.error("%s", error)
                    os._exit(error.exit_code)

    def _acknowledge(self) -> None:
        self._reachable(lambda: self._store.set(f"ending/known/{self._rank}", ""))

    @staticmethod
    def _reachable(ask: Callable[[], object]) -> bool:
        """Return whether the answer is yes; no where the store is gone with the rank that keeps it."""
        try:
            return bool(ask())
        except RuntimeError:
            return False

    @staticmethod
    def _outlive_launcher() -> None:
        """Let the message be printed: torchrun sends SIGTERM to the ranks that are left when the first one ends."""
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _packed(error: ProlongError) -> str:
    kind = next(kind for kind in type(error).__mro__ if kind.__module__ == errors.__name__)
    return json.dumps([kind.__name__, str(error), error.what, error.rule, error.remedy])


def _unpacked(packed: bytes) -> ProlongError:
    name, message, *parts = json.loads(packed)
    error: ProlongError = getattr(errors, name)(*parts)
    # Several findings have one message, and its parts are those of the first.
    error.args = (message,)
    return error
