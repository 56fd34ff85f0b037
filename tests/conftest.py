"""Environment of every test: set before torch is imported, inherited by the processes that tests start."""

import os
from pathlib import Path

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
