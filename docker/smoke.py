"""Import everything the recipe stands on and print its versions as JSON; a missing or wrong version is exit code 1.

Needs no GPU, so it runs while an image is built, and in a container under the uid that will train there:

    python docker/smoke.py --lock requirements/gpu-py312.lock --image

``--image`` looks at what an image brings besides the lock: torch, CUDA, cuDNN, NCCL, Transformer Engine, apex and
flash-attn against ``nemo_prolong.config.tested_versions``, one cuDNN and not a mixture, and caches that can be written.
``make setup`` ends with this program too, which also compiles the bytecode of all that it imports.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import importlib
import importlib.metadata
import json
import os
import platform
import re
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

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


CACHES = (
    "HOME",
    "HF_HOME",
    "MPLCONFIGDIR",
    "NEMO_CACHE_DIR",
    "NEMO_HOME",
    "NEMORUN_HOME",
    "TORCHINDUCTOR_CACHE_DIR",
    "TORCH_EXTENSIONS_DIR",
    "TRITON_CACHE_DIR",
    "XDG_CACHE_HOME",
)
"""Variables that name a folder in which some library writes, whoever runs it."""


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


def inspect(exact: dict[str, str]) -> tuple[dict[str, Any], list[str]]:
    """Compare what is installed with what is wanted.

    Args:
        exact: Module -> version, or the first numbers of one.

    Returns:
        Module -> version that was found, and the complaints.
    """
    found = {module: installed_version(module) for module in sorted(exact)}
    problems = [f"{m} is {found[m]}, not {want}" for m, want in exact.items() if not matches(found[m], want)]
    return found, problems + missing_names()


def image_versions() -> dict[str, str | None]:
    """Return component of ``tested_versions`` -> version, None where it is not there. The driver is the machine's."""
    import torch

    from nemo_prolong.config.tested_versions import cudnn_release

    cudnn = torch.backends.cudnn.version()
    has_nccl = torch.distributed.is_available() and torch.distributed.is_nccl_available()
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": cudnn_release(cudnn) if cudnn else None,
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if has_nccl else None,
        "transformer_engine": distribution_version("transformer-engine"),
        "apex": distribution_version("apex"),
        "flash_attn": distribution_version("flash-attn"),
    }


def distribution_version(name: str) -> str | None:
    """Return the version that an installed distribution carries, or None."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def image_problems(found: dict[str, str | None]) -> list[str]:
    """Return what is wrong with the versions of an image, with its cuDNN and with its caches."""
    from nemo_prolong.config.tested_versions import TESTED_VERSIONS

    outside = [TESTED_VERSIONS[name].problem(version) for name, version in found.items()]
    problems = [problem for problem in outside if problem]
    if found["transformer_engine"]:
        loaded = installed_version("transformer_engine.pytorch")
        problems += [f"transformer_engine.pytorch is {loaded}"] if loaded.startswith("missing") else []
    return problems + mixed_cudnn(loaded_cudnn()) + unwritable_caches(os.environ)


def loaded_cudnn() -> list[Path]:
    """Return the libraries of cuDNN in this process, after one of those that it loads by itself on a GPU."""
    with contextlib.suppress(OSError):
        ctypes.CDLL("libcudnn_graph.so.9")
    mapped = re.findall(r"(/\S+/libcudnn\S*)", Path("/proc/self/maps").read_text())
    return [Path(name) for name in sorted(set(mapped))]


def mixed_cudnn(libraries: Sequence[Path]) -> list[str]:
    """Return a complaint where cuDNN was loaded from several folders, which are several releases."""
    folders = sorted({str(library.parent) for library in libraries})
    return [f"cuDNN is loaded from {' and '.join(folders)}. Its libraries must be of one release."] * (len(folders) > 1)


def unwritable_caches(environment: Any) -> list[str]:
    """Return a complaint for each folder of ``CACHES`` in which this uid cannot make a file."""
    problems = []
    for name in CACHES:
        if name not in environment:
            problems.append(f"{name} is not set, and its library would choose a folder itself")
            continue
        try:
            Path(environment[name]).mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=environment[name]).close()
        except OSError as error:
            problems.append(f"{name}={environment[name]} cannot be written by uid {os.getuid()}: {error.strerror}")
    return problems


def untested(found: dict[str, str | None]) -> list[str]:
    """Return the components that are within their bounds but not of the release that was tested."""
    from nemo_prolong.config.tested_versions import TESTED_VERSIONS

    bounds = {name: TESTED_VERSIONS[name] for name, version in found.items() if version}
    return [
        f"{bound.title} is {found[name]}; tested is {bound.tested}"
        for name, bound in bounds.items()
        if not bound.problem(found[name]) and not bound.is_tested(found[name])
    ]


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the parsed command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lock", type=Path, required=True, help="lock whose versions must be the installed ones")
    parser.add_argument("--expect", action="append", default=[], metavar="MODULE=VERSION", help="also this version")
    parser.add_argument("--image", action="store_true", help="also what an image brings itself")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the versions; return the exit code."""
    options = parse_arguments(arguments)
    locked = locked_versions(options.lock)
    exact = {module: locked[name] for module, name in MODULES.items()}
    exact |= dict(item.split("=", 1) for item in options.expect)
    with contextlib.redirect_stdout(sys.stderr):  # the libraries talk while they are imported
        found, problems = inspect(exact)
        image = image_versions() if options.image else {}
        problems += image_problems(image) if options.image else []
    report = {"versions": found | image, "untested": untested(image), "problems": problems}
    print(json.dumps(report, indent=2))
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
