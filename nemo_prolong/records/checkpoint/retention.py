"""Which checkpoints are kept, how one gets its name and how one goes."""

from __future__ import annotations

import logging
import re
import secrets
import shutil
from collections.abc import Collection
from pathlib import Path

from nemo_prolong.errors import CheckpointError
from nemo_prolong.files import publish, sync
from nemo_prolong.records.checkpoint.manifest import checkpoint_directory, listed_steps, step_of
from nemo_prolong.records.checkpoint.verify import check_listing

log = logging.getLogger(__name__)

_LEFTOVER = re.compile(r"step_\d{8}\.(writing|deleting).*")


def publish_checkpoint(temporary: Path, final: Path) -> None:
    """Give a complete checkpoint its name. One that has the name already was refused, and goes."""
    if final.exists():
        delete_checkpoint(final)
    publish(temporary, final)
    # The first save of a run made that directory.
    sync(final.parents[1])


def delete_checkpoint(checkpoint: Path) -> None:
    """Delete a checkpoint. From the first moment on its name stands for a whole one or for none."""
    doomed = checkpoint.with_name(f"{checkpoint.name}.deleting-{secrets.token_hex(4)}")
    checkpoint.rename(doomed)
    sync(doomed.parent)
    shutil.rmtree(doomed)


def remove_leftovers(run_dir: Path) -> list[str]:
    """Delete what killed saves and killed deletions left, and return the names.

    What cannot be deleted stays until the next start, with a warning. It is in nobody's way.
    """
    removed = []
    for path in sorted((run_dir / "checkpoints").glob("*")):
        if not _LEFTOVER.fullmatch(path.name):
            continue
        try:
            shutil.rmtree(path)
        except OSError as error:
            log.warning("a leftover of a killed save could not be deleted: %s", error)
        else:
            removed.append(path.name)
    return removed


def superseded(
    run_dir: Path, newest: Path, keep_last: int, keep_every_steps: int | None, refused: Collection[int] = ()
) -> list[Path]:
    """Return the checkpoints that may be deleted now that ``newest`` is on disk.

    Kept are the ``keep_last`` newest complete ones up to ``newest`` and every ``keep_every_steps``-th. Steps after
    ``newest`` are not touched.

    Args:
        run_dir: Run directory.
        newest: The checkpoint that was saved last.
        keep_last: How many complete ones are kept.
        keep_every_steps: Multiples of it are kept too. With None no others are.
        refused: Steps of checkpoints that are known to be damaged. Files and sizes may not show it, and in place of a
            good one none of them is kept.

    Raises:
        CheckpointError: If ``newest`` is not complete. Then nothing may be deleted.
    """
    check_listing(newest)
    before = [checkpoint_directory(run_dir, step) for step in listed_steps(run_dir) if step < step_of(newest)]
    good = [path for path in reversed(before) if step_of(path) not in refused and _is_complete(path)]
    kept = [newest, *good][:keep_last]
    return [
        path for path in before if path not in kept and not (keep_every_steps and step_of(path) % keep_every_steps == 0)
    ]


def _is_complete(checkpoint: Path) -> bool:
    try:
        check_listing(checkpoint)
    except CheckpointError:
        return False
    return True
