"""Import everything the recipe stands on and print its versions as JSON; a missing or wrong version is exit code 1.

Needs no GPU, so it runs while an image is built:

    python docker/smoke.py --lock requirements/gpu-py312.lock --expect python=3.12 --expect transformer_engine=2.9

``make setup`` ends with it too, which also compiles the bytecode of all that it imports.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import platform
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from packaging.version import Version

MODULES = {
    "datasets": "datasets",
    "hydra": "hydra-core",
    "lightning": "lightning",
    "megatron.core": "megatron-core",
    "modelopt": "nvidia-modelopt",
    "nemo": "nemo-toolkit",
    "nemo_run": "nemo-run",
    "numpy": "numpy",
    "omegaconf": "omegaconf",
    "psutil": "psutil",
    "pydantic": "pydantic",
    "safetensors": "safetensors",
    "tokenizers": "tokenizers",
    "transformers": "transformers",
}
"""Module whose ``__version__`` is compared -> the name under which the lock pins it."""

USED = {
    "nemo.collections.llm": ("LlamaModel", "LlamaConfig", "Llama3Config8B"),
    "nemo.lightning": ("MegatronStrategy", "Trainer"),
    "nemo.lightning.pytorch.optim": ("MegatronOptimizerModule",),
    "megatron.core.dist_checkpointing.strategies.torch": ("TorchDistSaveShardedStrategy",),
    "modelopt.torch.opt": (),
    "transformers.models.llama.modeling_llama": ("LlamaForCausalLM",),
}
"""What the engine and the export take from where. NeMo hides a failed import of these until they are used."""


def locked_versions(lock: Path) -> dict[str, str]:
    """Return name -> version of every pin in a lock file."""
    return dict(re.findall(r"^([a-z0-9.-]+)==([^ ;]+)", lock.read_text(), flags=re.MULTILINE))


def installed_version(module: str) -> str:
    """Return the version that ``module`` carries, ``missing`` where it cannot be imported, and why."""
    if module == "python":
        return platform.python_version()
    try:
        return str(getattr(importlib.import_module(module), "__version__", "unknown"))
    except Exception as error:  # an extension module can fail with anything, and that is the finding
        return f"missing ({type(error).__name__}: {error})"


def matches(version: str, wanted: str) -> bool:
    """Whether ``version`` is ``wanted`` or a release below it (``2.9.0+abc`` for ``2.9``)."""
    return re.match(re.escape(wanted) + r"(?![0-9])", version) is not None


def is_at_least(version: str, minimum: str) -> bool:
    """Whether ``version`` is a version and not below ``minimum``."""
    return not version.startswith("missing") and Version(version) >= Version(minimum)


def missing_names() -> list[str]:
    """Return one complaint for each thing of ``USED`` that is not there."""
    complaints = []
    for module, names in USED.items():
        try:
            loaded = importlib.import_module(module)
        except Exception as error:  # as above
            complaints.append(f"{module} cannot be imported: {type(error).__name__}: {error}")
            continue
        complaints += [f"{module} has no {name}" for name in names if not hasattr(loaded, name)]
    return complaints


def inspect(exact: dict[str, str], minimum: dict[str, str]) -> tuple[dict[str, str], list[str]]:
    """Compare what is installed with what is wanted.

    Args:
        exact: Module -> version, or the first numbers of one.
        minimum: Module -> lowest version.

    Returns:
        Module -> version that was found, and the complaints.
    """
    found = {module: installed_version(module) for module in sorted({*exact, *minimum})}
    problems = [f"{m} is {found[m]}, not {want}" for m, want in exact.items() if not matches(found[m], want)]
    problems += [f"{m} is {found[m]}, below {low}" for m, low in minimum.items() if not is_at_least(found[m], low)]
    return found, problems + missing_names()


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the parsed command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lock", type=Path, required=True, help="lock whose versions must be the installed ones")
    parser.add_argument("--expect", action="append", default=[], metavar="MODULE=VERSION", help="also this version")
    parser.add_argument("--at-least", action="append", default=[], metavar="MODULE=VERSION", help="also a lower bound")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the versions; return the exit code."""
    options = parse_arguments(arguments)
    locked = locked_versions(options.lock)
    exact = {module: locked[name] for module, name in MODULES.items()}
    exact |= dict(item.split("=", 1) for item in options.expect)
    minimum = dict(item.split("=", 1) for item in options.at_least)
    with contextlib.redirect_stdout(sys.stderr):  # the libraries talk while they are imported
        found, problems = inspect(exact, minimum)
    print(json.dumps({"versions": found, "problems": problems}, indent=2))
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
