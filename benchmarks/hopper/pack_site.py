"""Pack wheels into one archive for a GPU machine without a network: ``visit.sh`` unpacks it there.

    python -m benchmarks.hopper.pack_site ARCHIVE.tar.xz FOLDER... [--without PATTERN...]

One archive of everything is smaller than the wheels, each of which is compressed on its own.
"""

from __future__ import annotations

import argparse
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path

from nemo_prolong.errors import DataError
from nemo_prolong.units import format_bytes

# What a wheel may bring besides its packages: commands and shared files, which nothing here needs.
_LEFT_OUT = (".data/scripts/", ".data/data/", ".data/headers/")


def unpack(wheel: Path, site: Path, without: Sequence[str]) -> None:
    """Unpack the packages of a wheel into a folder.

    Args:
        wheel: The wheel.
        site: The folder.
        without: Patterns of files to leave out, such as ``tests/*``.

    Raises:
        DataError: If the wheel keeps packages where only an installer finds them.
    """
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if any(part in name for part in _LEFT_OUT) or any(fnmatch(name, pattern) for pattern in without):
                continue
            if ".data/" in name:
                raise DataError(str(wheel), f"{name} has to be installed.", "Name a wheel without such files.")
            archive.extract(name, site)


def pack(archive: Path, folders: Sequence[Path], without: Sequence[str] = ()) -> int:
    """Write the packages of all wheels in some folders to an archive, and return its size in bytes.

    Raises:
        DataError: If a folder has no wheels.
    """
    with tempfile.TemporaryDirectory() as directory:
        for folder in folders:
            wheels = sorted(folder.glob("*.whl"))
            if not wheels:
                raise DataError(str(folder), "there are no wheels in it.", "Download some with pip download.")
            for wheel in wheels:
                unpack(wheel, Path(directory), without)
        with tarfile.open(archive, "w:xz", preset=6) as packed:
            packed.add(directory, arcname=".", filter=_without_owner)
    return archive.stat().st_size


def _without_owner(entry: tarfile.TarInfo) -> tarfile.TarInfo:
    entry.uid = entry.gid = entry.mtime = 0
    entry.uname = entry.gname = ""
    return entry


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.hopper.pack_site", description="Pack wheels.")
    parser.add_argument("archive", type=Path, help="what to write, a .tar.xz")
    parser.add_argument("folders", type=Path, nargs="+", help="where the wheels are")
    parser.add_argument("--without", action="append", default=[], help="files to leave out, such as 'tests/*'")
    arguments = parser.parse_args()
    try:
        size_bytes = pack(arguments.archive, arguments.folders, arguments.without)
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    print(f"{arguments.archive}: {format_bytes(size_bytes)}")


if __name__ == "__main__":
    main()
