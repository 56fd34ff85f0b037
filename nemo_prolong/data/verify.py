"""Check sizes, hashes and rows of a data directory against its indexes and its manifest, all of them or a sample."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from nemo_prolong.data.mds import MdsReader
from nemo_prolong.data.mds.index import ShardEntry
from nemo_prolong.data.row_sets import known_facts, open_row_set, read_manifest
from nemo_prolong.data.storage.stores import is_remote
from nemo_prolong.data.stored_row import TOKENS, StoredRow
from nemo_prolong.errors import DataError
from nemo_prolong.files import digest_file
from nemo_prolong.text import counted


def verify(directory: str | Path) -> Iterator[str | DataError]:
    """Check every size, hash and row of a data directory or a row set.

    Args:
        directory: A data directory, or one row set.

    Yields:
        An error for everything that is wrong, and a line for each row set that is whole.

    Raises:
        DataError: If the directory is neither.
    """
    manifest = read_manifest(directory)
    if manifest is None:
        yield from _verify_row_set(open_row_set(directory), known_facts(directory).row_set)
        return
    for path, entry in manifest["row_sets"].items():
        try:
            reader = MdsReader(Path(directory) / path)
        except DataError as error:
            yield error
        else:
            yield from _verify_row_set(reader, entry)


@dataclass(frozen=True)
class DataSample:
    """What a look at a sample of some row sets has seen.

    Attributes:
        shards: All shards, whose sizes were compared.
        hashed: Shards whose hashes were compared too.
        cached_bytes: What the uncompressed copies of remote and compressed shards take in the cache.
    """

    shards: int
    hashed: int
    cached_bytes: int


def verify_sample(
    root: str, paths: Sequence[str], most_bytes: int, chooser: random.Random, most_seconds: float = math.inf
) -> DataSample:
    """Compare the sizes of all shards of some row sets, and the hash of one shard of each.

    Of rows at an address only the indexes are read.

    Args:
        root: Data directory or address.
        paths: Row sets below it.
        most_bytes: No more shards are hashed after so many bytes.
        chooser: Draws the shard of a row set.
        most_seconds: No more shards are hashed after so long.

    Raises:
        DataError: For the first thing that is wrong.
    """
    shards = hashed = cached_bytes = read_bytes = 0
    started = time.monotonic()
    for path in paths:
        reader = MdsReader(f"{root.rstrip('/')}/{path}")
        shards += len(reader.shards)
        cached_bytes += sum(shard.raw.num_bytes for shard in reader.shards if _is_cached(reader, shard))
        if is_remote(reader.directory) or not reader.shards:
            continue
        shard = chooser.choice(reader.shards)
        read_bytes += (shard.packed or shard.raw).num_bytes
        if read_bytes <= most_bytes and time.monotonic() - started < most_seconds:
            hashed += _check_shard(reader, shard, known_facts(reader.directory).row_set)
    return DataSample(shards, hashed, cached_bytes)


def _is_cached(reader: MdsReader, shard: ShardEntry) -> bool:
    """Whether training reads a copy of the shard: it is remote, or there in compressed form only."""
    return is_remote(reader.directory) or not Path(reader.directory, shard.raw.name).is_file()


def _check_shard(reader: MdsReader, shard: ShardEntry, entry: dict[str, Any]) -> bool:
    """Compare the hash of one shard with the manifest's, failing that the index's; return whether either has one."""
    file = shard.packed or shard.raw
    in_manifest = entry.get("shards", {}).get(file.name, {}).get("sha256")
    expected = in_manifest or file.hashes.get("sha256")
    path = Path(reader.directory, file.name)
    if expected is None or not path.is_file():
        return False
    found = digest_file(path).sha256
    if found != expected:
        raise _changed(reader, file.name, found, f"{'the manifest' if in_manifest else 'its index'} says {expected}")
    return True


def _verify_row_set(reader: MdsReader, entry: dict[str, Any]) -> Iterator[str | DataError]:
    problems = 0
    # Other MDS directories than those of tokens have no such rows.
    check_row = _check_row if TOKENS in reader.columns else None
    for error in chain(reader.verify(check_row), _differences(reader, entry)):
        problems += 1
        yield error
    if not problems:
        words = f"whole, {counted(len(reader), 'row')} in {counted(len(reader.shards), 'shard')}"
        yield f"{reader.directory}: {words}" + (", as in the manifest" if entry.get("shards") else "")


def _check_row(columns: dict[str, Any], where: str) -> None:
    StoredRow.of(columns).checked(where)


def _differences(reader: MdsReader, entry: dict[str, Any]) -> Iterator[DataError]:
    """Yield where a row set is not what the manifest says; without a manifest there is nothing to compare."""
    known = entry.get("shards")
    if not known:
        return
    files = {(shard.packed or shard.raw).name: shard for shard in reader.shards}
    if files.keys() != known.keys() or len(reader) != entry.get("rows"):
        yield DataError(
            f"{reader.directory}/index.json",
            f"lists {counted(len(reader), 'row')} in {counted(len(files), 'shard')}, "
            f"the manifest {entry.get('rows')} in {len(known)}.",
            "Copy or prepare the row set again.",
        )
    for name in sorted(files.keys() & known.keys()):
        found, expected = _shard_sha256(reader, files[name]), known[name].get("sha256")
        if found != expected:
            yield _changed(reader, name, found, f"the manifest says {expected}")


def _changed(reader: MdsReader, name: str, found: str, promised: str) -> DataError:
    return DataError(
        f"{reader.directory}/{name}",
        f"has the SHA-256 {found}, {promised}.",
        "The shard was changed or damaged: copy or prepare it again.",
    )


def _shard_sha256(reader: MdsReader, shard: ShardEntry) -> str:
    """Return the hash of a shard's file: that of the index, which was compared, unless a cached copy was."""
    if shard.packed is None and "sha256" in shard.raw.hashes:
        return shard.raw.hashes["sha256"]
    return digest_file(Path(reader.directory, (shard.packed or shard.raw).name)).sha256
