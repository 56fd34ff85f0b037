"""Variables of the process that choose other kernels than the configuration are refused before anything is built."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest

from nemo_prolong.config.rules.attention import Platform
from nemo_prolong.config.schema import RunConfig
from nemo_prolong.engine.te import environment
from nemo_prolong.engine.te.environment import environment_findings, forbid_unfused_kernels, forget_kernels

H100 = Platform((2, 9), (9, 0), cudnn=(9, 19), cuda=(13, 0))
NAMES = ("NVTE_FLASH_ATTN", "NVTE_FUSED_ATTN", "NVTE_UNFUSED_ATTN", "NVTE_ALLOW_NONDETERMINISTIC_ALGO")


@pytest.fixture(autouse=True)
def on_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "current_platform", lambda: H100)
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)


def stage(make_config: Callable[..., Any], attention: str = "auto", deterministic: bool = False) -> RunConfig:
    return make_config(
        precision={"compute": "bf16", "attention": attention}, train={"train_iters": 1, "deterministic": deterministic}
    )


@pytest.mark.parametrize(
    ("variable", "attention", "message"),
    [
        (
            "NVTE_FUSED_ATTN",
            "auto",
            "NVTE_FUSED_ATTN=0: takes away kernels that precision.attention=auto allows. Unset NVTE_FUSED_ATTN, and "
            "set precision.attention=flash.",
        ),
        (
            "NVTE_FLASH_ATTN",
            "flash",
            "NVTE_FLASH_ATTN=0: takes away kernels that precision.attention=flash allows. Unset NVTE_FLASH_ATTN, and "
            "set precision.attention=cudnn.",
        ),
        (
            "NVTE_ALLOW_NONDETERMINISTIC_ALGO",
            "cudnn",
            "NVTE_ALLOW_NONDETERMINISTIC_ALGO=0: asks Transformer Engine for deterministic kernels, and "
            "train.deterministic=false does not. Unset NVTE_ALLOW_NONDETERMINISTIC_ALGO, or set "
            "train.deterministic=true.",
        ),
    ],
)
def test_a_variable_that_says_otherwise_is_refused(
    make_config: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, variable: str, attention: str, message: str
) -> None:
    cfg = stage(make_config, attention)
    assert environment_findings(cfg) == []
    monkeypatch.setenv(variable, "0")
    assert [str(error) for error in environment_findings(cfg)] == [message]
    monkeypatch.setenv(variable, "1")
    assert environment_findings(cfg) == []


@pytest.mark.parametrize(
    ("variable", "attention", "deterministic"),
    [
        ("NVTE_FUSED_ATTN", "flash", False),
        ("NVTE_FLASH_ATTN", "cudnn", False),
        ("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "flash", True),
    ],
)
def test_a_variable_that_agrees_passes(
    make_config: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    variable: str,
    attention: str,
    deterministic: bool,
) -> None:
    monkeypatch.setenv(variable, "0")
    assert environment_findings(stage(make_config, attention, deterministic)) == []


def test_the_torch_backend_reads_none_of_them(make_config: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        monkeypatch.setenv(name, "0")
    assert environment_findings(make_config(precision={"compute": "fp32"})) == []


def test_a_second_model_of_a_process_may_choose_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        monkeypatch.setenv(name, "1")
    forget_kernels()
    assert [name in os.environ for name in NAMES] == [False, False, False, True]
    forbid_unfused_kernels()
    assert os.environ["NVTE_UNFUSED_ATTN"] == "0"
