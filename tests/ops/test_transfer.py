"""Copies to a device: pinned for CUDA, and plain elsewhere."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nemo_prolong.ops.transfer import to_device


class FakeTensor:
    """Notes what is asked of a tensor."""

    def __init__(self, device: str) -> None:
        self.device = torch.device(device)
        self.calls: list[Any] = []

    def pin_memory(self) -> FakeTensor:
        self.calls.append("pin_memory")
        return self

    def to(self, device: torch.device, *, non_blocking: bool) -> FakeTensor:
        self.calls.append((str(device), non_blocking))
        return self


@pytest.mark.parametrize(
    ("held", "wanted", "pinned"),
    [("cpu", "cuda:1", True), ("cpu", "cpu", False), ("cpu", "meta", False), ("cuda:1", "cuda:1", False)],
)
def test_only_copies_from_the_host_to_cuda_are_pinned(held: str, wanted: str, pinned: bool) -> None:
    tensor: Any = FakeTensor(held)
    assert to_device(tensor, torch.device(wanted)) is tensor
    assert tensor.calls == [*(["pin_memory"] if pinned else []), (wanted, True)]


def test_on_a_cpu_a_tensor_is_itself() -> None:
    tensor = torch.arange(3)
    assert to_device(tensor, torch.device("cpu")) is tensor
