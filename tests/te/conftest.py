"""Transformer Engine without a GPU: modules can be built and called up to their first kernel."""

from __future__ import annotations

import os
from types import SimpleNamespace

# Megatron's jit-fused functions would be compiled for CUDA; torch wants to know for which GPU.
os.environ["TORCHDYNAMO_DISABLE"] = "1"
os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "9.0")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
import transformer_engine.pytorch

from nemo_prolong.engine.patches import prepare
from tests.support.te_layouts import leave

prepare()
assert transformer_engine.pytorch and not torch.cuda.is_available(), "these tests are for machines without a GPU"
# Its modules assert a GPU when they are built, and ask which one. After prepare(), which does nothing with a GPU.
torch.cuda.is_available = lambda: True
# Without a driver torch cannot ask cuDNN for its version.
torch.backends.cudnn.version = lambda: None
torch.cuda.get_device_properties = lambda device=None: SimpleNamespace(major=9, minor=0)


@pytest.fixture(autouse=True)
def no_groups_left():
    """Leave the process groups that a test formed."""
    yield
    leave()
