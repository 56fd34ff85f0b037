"""Train a parent and one step of its child, and write down what ran and what was read: ``CONFIGS.json OUTPUT.json``.

The output is ``{"called": [[path, function], ...], "read": {path: times}}`` of the child: functions of this package in
the order of their first call after training began, and files below the runs that were opened to be read before the
first step ended.
"""

import json
import os
import sys
from collections import Counter
from pathlib import Path
from types import FrameType
from typing import Any

from nemo_prolong.config.schema import RunConfig
from nemo_prolong.stages.run import run_stage

PACKAGE = str(Path(__file__).parents[2]) + "/"
BEGINS = ("nemo_prolong/callbacks/watchdog.py", "HangWatchdog.on_train_start")
ENDS = ("nemo_prolong/callbacks/watchdog.py", "HangWatchdog.on_step_end")


class Observer:
    """Sees every call and every file that is opened."""

    def __init__(self, root: str) -> None:
        self.root = root
        self.called: dict[tuple[str, str], None] = {}
        self.read: Counter[str] = Counter()
        self.has_begun = self.has_ended = False

    def profile(self, frame: FrameType, event: str, argument: Any) -> None:
        """See a call."""
        code = frame.f_code
        if event != "call" or self.has_ended or not code.co_filename.startswith(PACKAGE + "nemo_prolong/"):
            return
        function = code.co_filename.removeprefix(PACKAGE), code.co_qualname
        if self.has_begun:
            self.called.setdefault(function)
        self.has_begun |= function == BEGINS
        self.has_ended |= function == ENDS

    def audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        """See a file that is opened."""
        if event != "open" or self.has_ended or not isinstance(arguments[0], str | os.PathLike):
            return
        path, mode = os.fspath(arguments[0]), arguments[1] or "r"
        if path.startswith(self.root) and "r" in mode:
            self.read[os.path.relpath(path, self.root)] += 1


def main() -> None:
    """Train both, and observe the child."""
    parent, child = (RunConfig(**config) for config in json.loads(Path(sys.argv[1]).read_text()))
    run_stage(parent, [])
    observer = Observer(os.path.commonpath([child.run_dir, child.data.root]))
    sys.addaudithook(observer.audit)
    sys.setprofile(observer.profile)
    run_stage(child, [])
    sys.setprofile(None)
    Path(sys.argv[2]).write_text(json.dumps({"called": list(observer.called), "read": observer.read}))


if __name__ == "__main__":
    main()
