"""The mutants that no test has to notice, each with its reason."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from tests.mutants.session import SURVIVED, Outcome

Key = tuple[str, str, str, str]
KINDS = ("equivalent", "accepted")


@dataclass(frozen=True)
class Survivors:
    """What ``survivors.toml`` lists.

    Attributes:
        kinds: By mutant: ``equivalent`` does the same as the original, ``accepted`` is not worth a test.
    """

    kinds: dict[Key, str]

    @classmethod
    def read(cls, path: Path) -> Survivors:
        """Read the file. An entry has a reason and one of the kinds."""
        kinds: dict[Key, str] = {}
        for file, entries in tomllib.loads(path.read_text()).items():
            for entry in entries:
                assert entry["kind"] in KINDS and entry["reason"].endswith("."), f"no kind or reason: {entry}"
                for change in entry["changes"]:
                    key = (file, entry["function"], entry["line"], change)
                    assert key not in kinds, f"listed twice: {key}"
                    kinds[key] = entry["kind"]
        return cls(kinds)

    def kind(self, key: Key) -> str | None:
        """Return what a survivor is listed as."""
        return self.kinds.get(key)

    def stale(self, outcomes: Iterable[Outcome]) -> list[Key]:
        """Return the entries of the files that were tried that are no survivors."""
        outcomes = list(outcomes)
        files = {outcome.key[0] for outcome in outcomes}
        survived = {outcome.key for outcome in outcomes if outcome.status == SURVIVED}
        return [key for key in self.kinds if key[0] in files and key not in survived]
