"""Installed versions against those that are tested, what falls back without a package, and what that costs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from packaging.requirements import Requirement
from packaging.version import InvalidVersion

from nemo_prolong.config.rules import platform_findings
from nemo_prolong.config.rules.constraints import resolve_backend
from nemo_prolong.config.schema import KernelBackend, RunConfig
from nemo_prolong.config.tested_versions import TESTED_VERSIONS
from nemo_prolong.doctor import needs
from nemo_prolong.doctor.facts import Machine
from nemo_prolong.doctor.finding import Finding, good, no_go, refused, warning

_FP8_CAPABILITY = (8, 9)
"""First compute capability whose tensor cores have FP8 (Ada; Hopper is 9.0)."""

_JUDGED_ELSEWHERE = ("transformer_engine", "flash_attn")
"""Components whose absence is a choice: ``fallback_findings`` says what it costs."""


def version_findings(machine: Machine, cfg: RunConfig | None) -> list[Finding]:
    """Return where installed versions are not those that this package asks for, or was tested with.

    What a GPU needs is looked at where there is one.
    """
    found = list(_pinned(machine))
    if machine.gpus:
        found += _components(machine, cfg)
    if any(finding.name == "versions" for finding in found):
        return found
    return [good("versions", _summary(machine)), *found]


def kernel_findings(machine: Machine, cfg: RunConfig) -> list[Finding]:
    """Return the rules of the configuration that the stage breaks on this machine. Without a GPU nothing is judged."""
    if not machine.gpus and needs.needs_gpus(cfg):
        return []
    broken = platform_findings(cfg, needs.platform_of(machine))
    kind = resolve_backend(cfg.precision, needs.platform_of(machine)).value
    found = [refused("kernels", error) for error in broken]
    return found or [good("kernels", f"precision={cfg.precision.compute} runs here with the {kind} backend.")]


def fallback_findings(machine: Machine, cfg: RunConfig | None) -> list[Finding]:
    """Return what runs in place of something that is missing, and what it costs. Without a GPU nothing is missing."""
    if not machine.gpus:
        return []
    found = [*_transformer_engine(machine, cfg), *_flash_attn(machine, cfg), *_fp8(machine, cfg)]
    return found or [good("fallbacks", "nothing that is missing is replaced by something slower.")]


def components(machine: Machine) -> dict[str, str | None]:
    """Return the version of each component of ``TESTED_VERSIONS``; one that is not known is left out."""
    versions: dict[str, str | None] = {name: machine.packages.get(name) for name in _PACKAGES}
    versions["python"] = machine.python
    if machine.nvidia is not None:
        versions["driver"] = machine.nvidia.driver
    if machine.torch is not None:
        releases = {"cuda": machine.torch.cuda, "cudnn": machine.torch.cudnn, "nccl": machine.torch.nccl}
        versions |= {name: ".".join(map(str, release)) for name, release in releases.items() if release}
    return versions


_PACKAGES = ("torch", "transformer_engine", "apex", "flash_attn")


def _pinned(machine: Machine) -> Iterator[Finding]:
    differing, missing = _against(machine.requirements, machine.packages)
    if differing or missing:
        yield warning(
            "versions",
            f"{', '.join([*differing, *missing])}.",
            "This package is tested with the versions that it asks for; NeMo and Megatron-core break with others.",
            "Install the lock: make setup on a CPU, requirements/gpu-py312.lock in an image (docs/environment.md).",
        )


def _against(requirements: Mapping[str, str], packages: Mapping[str, str | None]) -> tuple[list[str], list[str]]:
    """Return the packages that are installed in a version that is not asked for, and those that are not installed."""
    differing, missing = [], []
    for name, text in requirements.items():
        requirement, version = Requirement(text), packages.get(name)
        if version is None:
            missing.append(f"{name} is not installed")
        elif not _fits(requirement, version):
            differing.append(f"{name} is {version}, and {requirement.specifier} is asked for")
    return differing, missing


def _fits(requirement: Requirement, version: str) -> bool:
    try:
        return requirement.specifier.contains(version, prereleases=True)
    except InvalidVersion:
        return False


def _components(machine: Machine, cfg: RunConfig | None) -> Iterator[Finding]:
    stops = cfg is not None and needs.needs_gpus(cfg)
    for name, version in components(machine).items():
        bounds = TESTED_VERSIONS[name]
        if version is None and name in _JUDGED_ELSEWHERE:
            continue
        problem = bounds.problem(version)
        if problem is None:
            continue
        # The compatibility libraries of an image make older drivers do, which CUDA itself decides.
        level = no_go if stops and bounds.required and name != "driver" else warning
        yield level(
            "versions",
            problem,
            f"The tested version is {bounds.tested}.",
            f"Use an image with {bounds.title} {bounds.range or bounds.tested} (docs/environment.md).",
        )


def _summary(machine: Machine) -> str:
    names = ("nemo-toolkit", "megatron-core", *_PACKAGES)
    known = {**{name: machine.packages.get(name) for name in names}, **components(machine)}
    return f"{', '.join(f'{name} {version}' for name, version in known.items() if version)}."


def _transformer_engine(machine: Machine, cfg: RunConfig | None) -> Iterator[Finding]:
    if machine.packages.get("transformer_engine") is not None:
        return
    if cfg is not None and resolve_backend(cfg.precision, needs.platform_of(machine)) is not KernelBackend.TORCH:
        # Asked for by name, so its absence is among the kernels.
        return
    fused = "" if machine.packages.get("apex") else " Without apex too, Adam and the sums of gradients are not fused."
    yield warning(
        "fallbacks",
        "Transformer Engine is not installed, so torch's kernels run.",
        "By arithmetic the full-size stages take about twice as long, FP8 cannot run, and activations cannot be "
        f"offloaded.{fused}",
        "Use the image of the Dockerfile, which has Transformer Engine 2.9.",
    )


def _flash_attn(machine: Machine, cfg: RunConfig | None) -> Iterator[Finding]:
    if machine.packages.get("transformer_engine") is None or machine.packages.get("flash_attn") is not None:
        return
    if cfg is not None and not needs.needs_gpus(cfg):
        return
    yield warning(
        "fallbacks",
        "flash-attn is not installed, so Transformer Engine's attention is cuDNN's alone.",
        "On Hopper cuDNN is what it prefers anyway. What is lost is the choice, and train.deterministic=true with "
        "packed rows, whose memory grows with the square of a row in cuDNN.",
        "Install flash-attn in the image if you need either.",
    )


def _fp8(machine: Machine, cfg: RunConfig | None) -> Iterator[Finding]:
    capability = min(gpu.compute_capability for gpu in machine.gpus)
    if capability >= _FP8_CAPABILITY or (cfg is not None and cfg.precision.compute.startswith("fp8")):
        # A stage in FP8 is refused by the rules of the kernels, with the reason.
        return
    yield warning(
        "fallbacks",
        f"the GPUs have compute capability {'.'.join(map(str, capability))}, and FP8 needs 8.9.",
        "precision=fp8 is refused, so matrix products run at half the peak of a Hopper GPU or less.",
        "Use H100 or H200 for precision=fp8; precision=bf16 runs here.",
    )
