"""Kill exports with SIGKILL at given moments and repeat their command: ``kill_program.py SPEC.json``.

The specification is ``{"command": [arguments of scripts/export.py], "exports": directory, "scenarios": [{"name": str,
"point": str, "earlier": directory or null}], "result": path}``. Every export is scripts/export.py in a fork of this
process, so that torch and transformers are imported once.
"""

import json
import os
import runpy
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

SCRIPT = Path(__file__).parents[2] / "scripts" / "export.py"
BLOCKS_OF_HALF_A_FILE = 6


def main() -> None:
    """Run every scenario and write what was seen."""
    from nemo_prolong.export import assemble  # noqa: F401 - imported here for all forks

    spec = json.loads(Path(sys.argv[1]).read_text())
    seen = {scenario["name"]: kill_and_repeat(spec, **scenario) for scenario in spec["scenarios"]}
    Path(spec["result"]).write_text(json.dumps(seen))


def kill_and_repeat(spec: dict[str, Any], name: str, point: str, earlier: str | None) -> dict[str, Any]:
    """Kill one export, keep a copy of what it leaves, and repeat its command."""
    parent = Path(spec["exports"]) / name
    parent.mkdir()
    if earlier is not None:
        shutil.copytree(earlier, parent / "hf")
    killed = export(spec["command"], parent, point)
    shutil.copytree(parent, parent.with_name(f"{name}.left"))
    return {"killed": killed, "repeated": export(spec["command"], parent)}


def export(command: list[str], parent: Path, point: str | None = None) -> int:
    """Run the script in a fork and return its exit code, negative for a signal."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    status = 1
    with (parent.with_name(f"{parent.name}.log")).open("a") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        try:
            if point is not None:
                POINTS[point]()
            sys.argv = [str(SCRIPT), *command, f"output={parent / 'hf'}"]
            runpy.run_path(str(SCRIPT), run_name="__main__")
            status = 0
        except SystemExit as refusal:
            status = refusal.code
        finally:
            os._exit(status)


def die() -> None:
    """End this process with all its threads: no handler runs, nothing is flushed."""
    os.kill(os.getpid(), signal.SIGKILL)


def replace(module: Any, name: str, around: Callable[..., Any]) -> None:
    """Put ``around(original, *args, **kwargs)`` in the place of a function."""
    original = getattr(module, name)
    setattr(module, name, lambda *args, **kwargs: around(original, *args, **kwargs))


def in_a_file() -> None:
    """Die in the middle of a file of weights, while other threads write theirs."""
    from nemo_prolong.export import writer

    blocks = iter(range(BLOCKS_OF_HALF_A_FILE))

    def die_after_some(original: Callable[..., Any], *args: Any) -> Any:
        for block in original(*args):
            if next(blocks, None) is None:
                die()
            yield block

    replace(writer, "_blocks", die_after_some)


def before_the_manifest() -> None:
    """Die when everything but the manifest is written."""
    from nemo_prolong.export import assemble

    replace(assemble, "write_manifest", lambda original, *args: die())


def before_the_rename() -> None:
    """Die when everything is on the disk and nothing has been renamed."""
    from nemo_prolong.export import output

    replace(output, "publish", lambda original, *args, **kwargs: die())


def after_rename(number: int) -> None:
    """Die after one of the renames of directories; the first of two moves an earlier export away."""
    renames = iter(range(1, number + 1))

    def rename_and_die(original: Callable[..., Any], *args: Any) -> None:
        original(*args)
        if Path(args[0]).name in ("hf", ".hf.exporting") and next(renames) == number:
            die()

    replace(Path, "rename", rename_and_die)
    replace(os, "replace", rename_and_die)


def in_the_removal() -> None:
    """Die when one file of the earlier export is gone."""

    def remove_one_and_die(original: Callable[..., Any], path: Path, **kwargs: Any) -> None:
        if path.name == ".hf.replaced" and path.exists():
            next(path.glob("*.safetensors")).unlink()
            die()
        original(path, **kwargs)

    replace(shutil, "rmtree", remove_one_and_die)


POINTS: dict[str, Callable[[], None]] = {
    "in a file": in_a_file,
    "before the manifest": before_the_manifest,
    "before the rename": before_the_rename,
    "after the first rename": lambda: after_rename(1),
    "after the second rename": lambda: after_rename(2),
    "in the removal": in_the_removal,
}


if __name__ == "__main__":
    main()
