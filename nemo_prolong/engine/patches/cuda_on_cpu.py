"""What CUDA answers on a machine without a GPU, so that NeMo and Megatron train there.

Both libraries call CUDA unconditionally on the training path. On CPU there is exactly one device and no stream, so each
call has an exact answer, and the arithmetic is untouched. On a machine with a GPU nothing of this is applied.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from nemo_prolong.engine.patches.patch import BOTH, MEGATRON, NEMO, Patch, replace


class _NoStream:
    """The one queue of a CPU: work is done when the call returns, so there is nothing to wait for."""

    cuda_stream = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def wait_stream(self, stream: Any) -> None:
        """Return at once: all earlier work is done."""

    def wait_event(self, event: Any) -> None:
        """Return at once: all earlier work is done."""

    def synchronize(self) -> None:
        """Return at once: all earlier work is done."""

    def record_event(self, event: Any = None) -> _NoStream:
        """Return an event that has already happened."""
        return self


def _is_cuda(device: Any) -> bool:
    """Whether ``device`` names a GPU; an int does, since ``torch.cuda.current_device`` returns one."""
    if isinstance(device, bool):
        return False
    return isinstance(device, int) or (isinstance(device, str | torch.device) and str(device).startswith("cuda"))


class _DeviceLiterals(TorchFunctionMode):
    """Answer ``device="cuda"``, integer devices and ``pin_memory=True`` with the CPU.

    The ``torch.device`` constructor is left alone: process groups are made for a "cuda" device type.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.device:
            return func(*args, **kwargs)
        if "device" in kwargs and _is_cuda(kwargs["device"]):
            kwargs["device"] = "cpu"
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        if func is torch.Tensor.to and len(args) > 1 and _is_cuda(args[1]):
            args = (args[0], "cpu", *args[2:])
        return func(*args, **kwargs)


def _same(self: Any, *args: Any, **kwargs: Any) -> Any:
    """Return the tensor itself: it is on the only device there is."""
    return self


def _use_the_only_queue() -> None:
    """Make every stream the one queue of the CPU."""
    replace(torch.cuda, "Stream", _NoStream)()
    replace(torch.cuda, "stream", lambda stream: contextlib.nullcontext())()
    replace(torch.cuda, "current_stream", lambda device=None: _NoStream())()


def _use_the_default_generator() -> None:
    """Make the CPU's generator the one of the device."""
    replace(torch.cuda.random, "get_rng_state", lambda device=None: torch.get_rng_state())()
    replace(torch.cuda, "default_generators", (torch.default_generator,))()


def _enter_device_literals() -> None:
    """Install the function mode for the rest of the process; it is per thread, as is the training loop."""
    contextlib.ExitStack().enter_context(_DeviceLiterals())


_tensor_type = torch.Tensor.type


def _cuda_type_name(self: torch.Tensor, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
    """Return the type name Megatron compares with (``torch.cuda.FloatTensor``) when asked for the name."""
    if dtype is not None:
        return _tensor_type(self, dtype, *args, **kwargs)
    # Under the function mode torch looks the method up by name, and comes through here a second time.
    name = _tensor_type(self)
    return name if name.startswith("torch.cuda.") else name.replace("torch.", "torch.cuda.", 1)


PATCHES = (
    Patch(
        "current_device",
        "used as the device of new tensors everywhere; the CPU is device 0",
        replace(torch.cuda, "current_device", lambda: 0),
        BOTH,
    ),
    Patch(
        "streams",
        "NeMo builds the DDP buffers on a side stream; a CPU has one queue",
        _use_the_only_queue,
        BOTH,
    ),
    Patch(
        "synchronize",
        "called around pipeline exchanges and before a checkpoint is written; CPU work is already done",
        replace(torch.cuda, "synchronize", lambda device=None: None),
        MEGATRON,
    ),
    Patch(
        "is_initialized",
        "NeMo's checkpoint reader asserts that CUDA is initialized",
        replace(torch.cuda, "is_initialized", lambda: True),
        NEMO,
    ),
    Patch(
        "rng_state",
        "recomputation saves and restores the CUDA generator; on CPU the default generator is the device's",
        _use_the_default_generator,
        MEGATRON,
    ),
    Patch(
        "tensor_cuda",
        "Megatron moves a tied embedding to the GPU before the pipeline stages agree on it; it is where it belongs",
        replace(torch.Tensor, "cuda", _same),
        MEGATRON,
    ),
    Patch(
        "device_literals",
        "device='cuda' and pin_memory=True are literals in both libraries; there is one device, unpinned",
        _enter_device_literals,
        BOTH,
    ),
    Patch(
        "tensor_type",
        "the optimizer compares Tensor.type() with torch.cuda.FloatTensor to find the dtype",
        replace(torch.Tensor, "type", _cuda_type_name),
        MEGATRON,
    ),
)
