"""The versions that the recipe is for: what the default image brings, and how far others may differ.

One table for everything that checks versions before a stage needs them: ``docker/smoke.py`` while the image is built,
``scripts/doctor.py`` on the machine. What the locks under ``requirements/`` pin is compared with the lock and is not
here. The tested versions are those of ``nvcr.io/nvidia/pytorch:25.11-py3``, with the cuDNN of
``requirements/image.lock``. They are taken from public projects that build on this image, because NVIDIA's own notes
were not at hand. Needs no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from packaging.version import InvalidVersion, Version


@dataclass(frozen=True)
class VersionBounds:
    """What may be installed of one component.

    Attributes:
        title: How people write its name.
        tested: The release in the default image, without NVIDIA's local part.
        minimum: The lowest that may be used; None where only the tested one is known.
        below: The first that may not be used again; None where there is no such release.
        required: Whether a stage on a GPU cannot run without it.
        reason: Why the bounds are there, or what is lost without the component. One or two sentences.
    """

    title: str
    tested: str
    minimum: str | None
    below: str | None
    required: bool
    reason: str

    @property
    def range(self) -> str:
        """The bounds as a specifier, such as ``>=2.9.0a0,<2.10``; empty where there are none."""
        bounds = [f">={self.minimum}" if self.minimum else "", f"<{self.below}" if self.below else ""]
        return ",".join(bound for bound in bounds if bound)

    def problem(self, found: str | None) -> str | None:
        """Return what is wrong with an installed version, or None.

        Args:
            found: The version as the component says it, local part included; None where it is not installed.

        Returns:
            A sentence of what was found and of the rule, then the reason.
        """
        if found is None:
            return f"{self.title} is not there. {self.reason}" if self.required else None
        try:
            version = Version(found)
        except InvalidVersion:
            return f"{self.title} says its version is {found!r}, which is none. {self.reason}"
        if self.minimum and version < Version(self.minimum):
            return f"{self.title} is {found}, below {self.minimum}. {self.reason}"
        if self.below and version >= Version(self.below):
            return f"{self.title} is {found}, not below {self.below}. {self.reason}"
        return None

    def is_tested(self, found: str) -> bool:
        """Whether ``found`` is the release of the default image, whatever its local part."""
        return Version(found).public == Version(self.tested).public


TESTED_VERSIONS: Mapping[str, VersionBounds] = MappingProxyType(
    {
        "python": VersionBounds(
            title="Python",
            tested="3.12.3",
            minimum="3.12",
            below="3.13",
            required=True,
            reason="requirements/gpu-py312.lock is for 3.12.",
        ),
        "torch": VersionBounds(
            title="torch",
            tested="2.10.0a0",
            # NVIDIA builds torch before its release, as 2.10.0a0+COMMIT.nv25.11: below 2.10 by the rules of versions.
            minimum="2.10.0a0",
            below=None,
            required=True,
            reason="pyproject.toml asks for it. Before 2.10 weights_only can be bypassed (CVE-2026-24747).",
        ),
        "cuda": VersionBounds(
            title="CUDA",
            tested="13.0",
            minimum="12.1",
            below="14",
            required=True,
            reason="Transformer Engine 2.9 asks for 12.1 and later. The cuDNN of the image is the build for CUDA 13.",
        ),
        "cudnn": VersionBounds(
            title="cuDNN",
            tested="9.19.0",
            minimum="9.18.0",
            below="10",
            required=True,
            reason="Before 9.18 the backward pass of attention over documents reads memory it never wrote on Hopper, "
            "and gradients of keys and values become NaN (Transformer Engine issue 2186).",
        ),
        "nccl": VersionBounds(
            title="NCCL",
            tested="2.28.8",
            minimum="2.27.5",
            below="3",
            required=True,
            reason="torch 2.10 was released with 2.27.5 for CUDA 12 and 2.28.9 for CUDA 13.",
        ),
        "transformer_engine": VersionBounds(
            title="Transformer Engine",
            tested="2.9.0",
            minimum="2.9.0a0",
            below="2.10",
            required=True,
            reason="Megatron-core 0.15.3 asks for 2.9, and the layers of the te backend are written for it.",
        ),
        "apex": VersionBounds(
            title="apex",
            tested="0.1",
            minimum=None,
            below=None,
            required=False,
            reason="Transformer Engine has what is used of it.",
        ),
        "flash_attn": VersionBounds(
            title="flash-attn",
            tested="2.7.4.post1",
            minimum="2.1.1",
            below=None,
            required=False,
            reason="Without it attention runs on cuDNN alone. Transformer Engine 2.9 takes 2.1.1 and later.",
        ),
        "driver": VersionBounds(
            title="NVIDIA driver",
            tested="580",
            minimum="580",
            below=None,
            required=True,
            reason="CUDA 13 asks for branch 580. Older branches of data-centre GPUs need NVIDIA's compatibility "
            "libraries, which the entrypoint of the base image sets up.",
        ),
    }
)
"""Component -> its bounds. The keys are the names of the modules where there is one."""


def cudnn_release(number: int) -> str:
    """Return cuDNN's release from the number that its library gives: 91900 is 9.19.0."""
    return f"{number // 10000}.{number // 100 % 100}.{number % 100}"
