"""Which backend a model is built with, decided without importing Transformer Engine."""

from __future__ import annotations

import sys

import pytest
import torch

from nemo_prolong.config.schema import KernelBackend, PrecisionConfig
from nemo_prolong.engine.te import backend
from nemo_prolong.errors import ConfigError

AUTO, TORCH, TE = KernelBackend.AUTO, KernelBackend.TORCH, KernelBackend.TE


@pytest.fixture
def machine(monkeypatch):
    """Make this process believe in a GPU and in a release of Transformer Engine, or in neither."""

    def pretend(gpu: bool, version: str | None) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
        monkeypatch.setattr(backend, "installed_version", lambda: version)

    return pretend


@pytest.mark.parametrize(
    ("gpu", "version", "compute", "asked", "expected"),
    [
        (True, "2.9.0+70f53666", "bf16", AUTO, TE),
        (True, "2.9.0", "fp32", AUTO, TORCH),
        (True, None, "bf16", AUTO, TORCH),
        (False, "2.9.0", "bf16", AUTO, TORCH),
        (False, None, "fp32", AUTO, TORCH),
        (True, "2.9.0", "fp8", AUTO, TE),
        (True, "2.9.0", "bf16", TORCH, TORCH),
        (True, "2.9.0", "bf16", TE, TE),
    ],
)
def test_auto_takes_transformer_engine_where_it_can_compute(machine, gpu, version, compute, asked, expected):
    machine(gpu, version)
    assert backend.resolve_backend(PrecisionConfig(compute=compute, backend=asked)) is expected


@pytest.mark.parametrize(("compute", "asked"), [("bf16", TE), ("fp8", AUTO), ("fp8_attention", TE)])
def test_a_missing_transformer_engine_is_named_with_the_remedy(machine, compute, asked):
    machine(True, None)
    with pytest.raises(ConfigError) as error:
        backend.resolve_backend(PrecisionConfig(compute=compute, backend=asked))
    assert str(error.value) == (
        f"precision.compute={compute} precision.backend={asked}: Transformer Engine is not installed here. "
        "Set precision=bf16 precision.backend=torch, or run in the container of the Dockerfile."
    )


def test_this_environment_has_none_and_nothing_imports_it():
    assert backend.installed_version() is None
    assert "transformer_engine" not in sys.modules
