"""One directory of many small shards that tests copy."""

import shutil
from pathlib import Path

import pytest

from tests.support.mds_examples import SMALL_COLUMNS, numbered_row, write


@pytest.fixture(scope="session")
def many_shards_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """500 rows in 46 shards."""
    directory = tmp_path_factory.mktemp("many") / "rows"
    return write(directory, [numbered_row(n) for n in range(500)], SMALL_COLUMNS, shard_bytes=800, hashes=())


@pytest.fixture
def many_shards(many_shards_once: Path, tmp_path: Path) -> Path:
    """A copy to damage, without hashes: damage is to be found by what the format itself says."""
    return Path(shutil.copytree(many_shards_once, tmp_path / "rows"))


@pytest.fixture(autouse=True)
def cache_directory(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Keep the default cache of shards out of the home directory; return it."""
    home = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(home))
    return home / "nemo_prolong" / "shards"
