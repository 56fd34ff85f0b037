"""What is known of the tokenizer of stored rows, and the refusal of another one.

A row set carries ``origin.json``. Without it, the manifest of the data directory that lists the row set is asked. The
rows that ProLong published have neither.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from pydantic import ValidationError

from nemo_prolong.data.mds.index import read_beside, read_index
from nemo_prolong.data.row_sets import manifest_above
from nemo_prolong.data.storage.stores import is_remote
from nemo_prolong.errors import DataError
from nemo_prolong.records.data_manifest import MANIFEST
from nemo_prolong.records.row_origin import ORIGIN, RowOrigin

_LEVELS = 3
"""A row set lies so many directories below its data directory at most."""


def row_origins(directory: str | Path, judged: Path | None = None) -> dict[str, RowOrigin]:
    """Return what is known of the rows of an MDS directory, by the file that says it.

    Args:
        directory: A row set, or a tree of them. At an address only the row set's own ``origin.json`` is looked for.
        judged: A data directory whose manifest the caller has judged, so that it is not read again.

    Raises:
        DataError: If the directory has no index, or a file that says it is damaged.
    """
    if is_remote(directory):
        content = read_beside(directory, ORIGIN)
        where = f"{directory}/{ORIGIN}"
        return {} if content is None else {where: RowOrigin.parse(content, where)}
    manifests = {} if judged is None else {judged.resolve(): _ManifestOrigin(frozenset(), None)}
    found = [_origin_of(place, manifests) for place in _places(Path(directory))]
    return dict(one for one in found if one is not None)


def require_tokenizer(
    origins: Mapping[str, RowOrigin], tokenizer: str | Path, sha256: str, what: str, remedy: str
) -> None:
    """Refuse rows that another tokenizer made.

    Args:
        origins: What is known of the rows.
        tokenizer: Name of the tokenizer they are to be read with.
        sha256: Its hash.
        what: What was set, for the message.
        remedy: What to set instead.

    Raises:
        DataError: Naming both tokenizers.
    """
    for where, origin in origins.items():
        if origin.tokenizer_sha256 != sha256:
            rule = f"the rows were made with {origin.name}, as {where} says, and not with {tokenizer} ({sha256[:12]})."
            raise DataError(what, rule, remedy)


def _places(directory: Path) -> list[Path]:
    """Return the directory and those below it that its shards are in."""
    shards = {str(PurePosixPath(shard.raw.name).parent) for shard in read_index(directory).shards}
    return [directory / name for name in sorted({".", *shards})]


def _origin_of(place: Path, manifests: dict[Path, _ManifestOrigin]) -> tuple[str, RowOrigin] | None:
    """Return the file that says where the rows of a directory come from, and what it says; None if none does."""
    path = place / ORIGIN
    if path.is_file():
        return str(path), RowOrigin.parse(path.read_bytes(), str(path))
    place = place.resolve()
    for root in place.parents[:_LEVELS]:
        if root not in manifests:
            manifests[root] = _ManifestOrigin.of(root)
        known = manifests[root]
        if known.origin is not None and place.relative_to(root).as_posix() in known.row_sets:
            return str(root / MANIFEST), known.origin
    return None


@dataclass(frozen=True)
class _ManifestOrigin:
    """What the manifest of a data directory says of its row sets.

    Attributes:
        row_sets: Their paths below it.
        origin: What they have in common; None where there is no manifest, or an old one that does not say it.
    """

    row_sets: frozenset[str]
    origin: RowOrigin | None

    @classmethod
    def of(cls, root: Path) -> _ManifestOrigin:
        manifest = manifest_above(root)
        if manifest is None or not isinstance(manifest.get("tokenizer_sha256"), str):
            return cls(frozenset(), None)
        described = {name: manifest.get(name) for name in RowOrigin.model_fields if name not in ("format", "tokenizer")}
        tokenizer = str(root / str(manifest.get("tokenizer", "tokenizer")))
        try:
            origin = RowOrigin.model_validate({**described, "tokenizer": tokenizer})
        except ValidationError as error:
            rule = f"does not say what its rows were made with ({str(error).splitlines()[0]})."
            raise DataError(f"{root / MANIFEST}", rule, "Prepare the data again.") from error
        return cls(frozenset(manifest["row_sets"]), origin)
