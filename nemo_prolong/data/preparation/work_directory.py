"""The hidden directory in which a data directory is built: who may work in it, and what is already there.

It is ``.<name>.partial`` beside the output. It is kept when a preparation is killed, and the same configuration goes on
in it. It is gone when the output is in place. The output itself appears by one rename.
"""

from __future__ import annotations

import fcntl
import json
import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nemo_prolong.errors import DataError
from nemo_prolong.files import publish, write_json_atomically
from nemo_prolong.records.data_manifest import MANIFEST, DataManifest

log = logging.getLogger(__name__)

TOKENIZER = "tokenizer"


class WorkDirectory:
    """Paths of one preparation.

    Args:
        output: Directory to make.
    """

    def __init__(self, output: Path) -> None:
        self.output = output
        self.root = output.with_name(f".{output.name}.partial")
        self.data = self.root / "data"
        self.corpus = self.root / "corpus"
        self._plan = self.root / "plan.json"

    def unit(self, number: int) -> Path:
        """Return the directory of a unit's tokens."""
        return self.root / "units" / f"{number:06d}"

    def rows(self, row_set: str) -> Path:
        """Return the directory of a row set's plan."""
        return self.root / "rows" / row_set

    def entry(self, row_set: str, shard: int) -> Path:
        """Return the file that holds the index entry of a finished shard."""
        return self.root / "entries" / row_set / f"{shard:05d}.json"

    def forget_shards(self, row_set: str) -> None:
        """Have every shard of a row set written again."""
        shutil.rmtree(self.root / "entries" / row_set, ignore_errors=True)

    @contextmanager
    def locked(self, fingerprint: str) -> Iterator[None]:
        """Work in the directory alone.

        Args:
            fingerprint: Of everything that decides the result. Work of another fingerprint is thrown away.

        Raises:
            DataError: If another process works in it.
        """
        self.root.mkdir(parents=True, exist_ok=True)
        with (self.root / "lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise DataError(
                    f"output={self.output}",
                    f"another process is preparing it in {self.root}.",
                    "Wait for it, stop it, or set output to another directory.",
                ) from None
            self._continue_or_start(fingerprint)
            yield

    def _continue_or_start(self, fingerprint: str) -> None:
        if self._read_plan() == fingerprint:
            log.info("%s: going on where an earlier run stopped", self.output)
            return
        for entry in self.root.iterdir():
            if entry.name != "lock":
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        write_json_atomically(self._plan, {"fingerprint": fingerprint})

    def _read_plan(self) -> str | None:
        try:
            plan = json.loads(self._plan.read_text("utf-8"))
        except (OSError, ValueError):
            return None
        return plan.get("fingerprint") if isinstance(plan, dict) else None

    def publish(self) -> None:
        """Put the finished data directory in its place and remove the rest."""
        # In place of nothing or of an empty directory, as checked before.
        publish(self.data, self.output)
        shutil.rmtree(self.root, ignore_errors=True)


def existing_manifest(output: Path, fingerprint: str) -> DataManifest | None:
    """Return the manifest of ``output`` if it is what is asked for, None if nothing is there.

    Raises:
        DataError: If something else is there.
    """
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return None
    remedy = f"Remove {output}, or set output to another directory."
    try:
        found = json.loads((output / MANIFEST).read_text("utf-8"))
        same = found["fingerprint"] == fingerprint
        manifest = DataManifest.model_validate(found) if same else None
    except (OSError, ValueError, KeyError, TypeError):
        raise DataError(f"output={output}", "exists and is no complete data directory.", remedy) from None
    if manifest is None:
        raise DataError(
            f"output={output}",
            "holds data of another configuration, tokenizer or state of the sources, or conversations as an earlier "
            "version wrote them.",
            remedy,
        )
    missing = [path for path in manifest.row_sets if not (output / path / "index.json").is_file()]
    if missing:
        raise DataError(f"output={output}", f"lacks {', '.join(missing)}, which its manifest lists.", remedy)
    return manifest
