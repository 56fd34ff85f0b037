"""Environment of every test: set before torch is imported, inherited by the processes that tests start."""

import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

# One thread each: tests start up to four processes on two cores, and sums keep their order.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# A test that reaches for the Hub fails at once and says so.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Programs that tests start import ``tests.support`` from wherever they run.
_ROOT = Path(__file__).parents[1]
os.environ["PYTHONPATH"] = os.pathsep.join([str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])

# How long an example takes says how busy the machine is.
settings.register_profile("prolong", deadline=None)
settings.load_profile("prolong")

# What takes longest starts first, so that no worker is left alone with it at the end.
_LONGEST_FIRST = ("engine", "export", "stages", "compatibility", "gpu_check", "data")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the directories that train before the others."""

    def place(item: pytest.Item) -> int:
        room = item.path.relative_to(_ROOT / "tests").parts[0]
        return _LONGEST_FIRST.index(room) if room in _LONGEST_FIRST else len(_LONGEST_FIRST)

    items.sort(key=place)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Give a directory, whose tests share what is expensive to make, to one worker; ``tests/engine`` file by file."""
    from xdist.scheduler import LoadScopeScheduling

    engine = _ROOT / "tests" / "engine"
    trained = {file.name for file in engine.glob("test_*.py") if "one_rank_runs" in file.read_text()}

    class ByDirectory(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = Path(nodeid.partition("::")[0])
            return file.name if file.parent.name == "engine" and file.name not in trained else str(file.parent)

    return ByDirectory(config, log)
