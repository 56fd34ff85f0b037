"""The directory that is written: what may be replaced, and how a finished one takes its name.

Everything is written under a hidden name beside the output and renamed at the end, so whatever carries the output's
name is complete. Two exports into one output at the same time are not supported: they remove each other's files.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from nemo_prolong.errors import ExportError

MANIFEST_FILE = "export_manifest.json"

SOFTWARE = "nemo_prolong"
"""What ``export_manifest.json`` says wrote the directory."""


def check_output(output: Path, *, overwrite: bool) -> None:
    """Refuse an output that exists, unless it is an earlier export and may be overwritten.

    Raises:
        ExportError: With what stands in the way.
    """
    if not output.exists() and not output.is_symlink():
        return
    if output.is_dir() and not output.is_symlink() and not any(output.iterdir()):
        return
    what, elsewhere = f"output={output}", "name another output or remove it."
    if not overwrite:
        raise ExportError(
            what, "it already exists.", f"Set overwrite=true to replace an earlier export, or {elsewhere}"
        )
    files = None if output.is_symlink() else _exported_files(output)
    if files is None:
        raise ExportError(
            what, "it exists and is not an export of this software, so it is not replaced.", elsewhere.capitalize()
        )
    foreign = sorted(path.relative_to(output).as_posix() for path in output.rglob("*") if path.is_file())
    foreign = [name for name in foreign if name not in files]
    if foreign:
        raise ExportError(
            what,
            f"it holds files that the earlier export did not write: {', '.join(foreign[:3])}.",
            f"Move them out, or {elsewhere}",
        )


def _exported_files(output: Path) -> set[str] | None:
    """Return the files of an earlier export, or None if it is none."""
    try:
        manifest = json.loads((output / MANIFEST_FILE).read_text())
        return {MANIFEST_FILE, *manifest["files"]} if manifest["software"] == SOFTWARE else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


@contextlib.contextmanager
def working_directory(output: Path) -> Iterator[Path]:
    """Give an empty directory beside ``output`` that takes its name when the context ends well.

    An exception removes it. After a kill it lies there under its hidden name until the next export to this output.
    """
    directory, replaced = _beside(output, "exporting"), _beside(output, "replaced")
    if replaced.exists() and not output.exists():
        # Killed between the two renames below: the earlier export is still whole.
        replaced.rename(output)
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    try:
        yield directory
        _sync(directory)
    except BaseException:
        shutil.rmtree(directory, ignore_errors=True)
        raise
    if output.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        output.rename(replaced)
    directory.rename(output)
    _sync_one(output.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def _beside(output: Path, purpose: str) -> Path:
    return output.with_name(f".{output.name}.{purpose}")


def _sync(directory: Path) -> None:
    """Wait until the disk has every file and the directory's own entries."""
    for path in directory.iterdir():
        _sync_one(path)
    _sync_one(directory)


def _sync_one(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
