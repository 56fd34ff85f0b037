"""The directory that is written: what may be replaced, and how a finished one takes its name.

Everything is written under a hidden name beside the output and renamed at the end, so whatever carries the output's
name is complete. Two exports into one output at the same time are not supported: they remove each other's files.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from nemo_prolong.errors import ExportError
from nemo_prolong.files import publish, restore_replaced, sync
from nemo_prolong.records.export_manifest import MANIFEST_FILE, SOFTWARE, ExportManifest


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
        manifest = ExportManifest.read(output)
    except (OSError, ValueError):
        return None
    return {MANIFEST_FILE, *manifest.files} if manifest.software == SOFTWARE else None


@contextlib.contextmanager
def working_directory(output: Path) -> Iterator[Path]:
    """Give an empty directory beside ``output`` that takes its name when the context ends well.

    An exception removes it. After a kill it lies there under its hidden name until the next export to this output.
    """
    directory, replaced = _beside(output, "exporting"), _beside(output, "replaced")
    restore_replaced(output, replaced)
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    try:
        yield directory
        for path in [*directory.iterdir(), directory]:
            sync(path)
    except BaseException:
        shutil.rmtree(directory, ignore_errors=True)
        raise
    publish(directory, output, replaced=replaced)


def _beside(output: Path, purpose: str) -> Path:
    return output.with_name(f".{output.name}.{purpose}")
