"""Be one rank of a stage under a launcher that starts failed ranks again: ``restart_program.py CASE.json``.

The case is one of ``fault_program.py``. Its fault happens once: ranks that were started again are spared.
"""

import json
import os
import sys
from pathlib import Path

from tests.engine.fault_program import train


def main() -> None:
    """Run the case."""
    case = json.loads(Path(sys.argv[1]).read_text())
    if os.environ["TORCHELASTIC_RESTART_COUNT"] != "0":
        case["fault"] = None
    train(case, int(os.environ["RANK"]))


if __name__ == "__main__":
    main()
