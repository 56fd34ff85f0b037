"""Let NeMo 2.7.3 and Megatron-core 0.15.3 train on a machine without a GPU: every patch of foreign code, in one place.

Both libraries call CUDA unconditionally on the training path. On CPU there is exactly one device and no stream, so each
call has an exact answer, and the arithmetic is untouched. On a machine with a GPU nothing of that is patched; only our
Adam goes in, and only where neither Transformer Engine nor apex brings theirs.

Each ``Patch`` says why and for which versions. ``tests/engine/test_cpu_patches.py`` leaves each one out in turn and
expects a training and resume run to fail: a patch that is no longer needed turns that test red.
"""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_VERSIONS = "nemo-toolkit 2.7.3, megatron-core 0.15.3"


@dataclass(frozen=True)
class Patch:
    """One change to foreign code.

    Attributes:
        name: Short name, unique.
        why: What calls it unconditionally, and what the CPU's answer is.
        apply: Makes the change in this process.
        versions: Library versions it was written for.
        after_import: True if it changes Megatron itself, whose import must come first.
        with_gpu: True if a machine with a GPU may need it too.
    """

    name: str
    why: str
    apply: Callable[[], None]
    versions: str = _VERSIONS
    after_import: bool = False
    with_gpu: bool = False


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


def _replace(owner: Any, name: str, value: Any) -> Callable[[], None]:
    """Return a function that sets an attribute."""
    return lambda: setattr(owner, name, value)


def _same(self: Any, *args: Any, **kwargs: Any) -> Any:
    """Return the tensor itself: it is on the only device there is."""
    return self


def _use_the_only_queue() -> None:
    """Make every stream the one queue of the CPU."""
    torch.cuda.Stream = _NoStream
    torch.cuda.stream = lambda stream: contextlib.nullcontext()
    torch.cuda.current_stream = lambda device=None: _NoStream()


def _use_the_default_generator() -> None:
    """Make the CPU's generator the one of the device."""
    torch.cuda.random.get_rng_state = lambda device=None: torch.get_rng_state()
    torch.cuda.default_generators = (torch.default_generator,)


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


def _install_group_step_adam() -> None:
    """Put our Adam where Megatron looks for apex's FusedAdam, unless it found a fused one and a GPU to run it on."""
    from nemo_prolong.ops.adam import GroupStepAdam

    optimizer = importlib.import_module("megatron.core.optimizer")
    if torch.cuda.is_available() and not optimizer.USING_PYTORCH_OPTIMIZER:
        return
    optimizer.Adam = GroupStepAdam  # type: ignore[attr-defined]
    optimizer.USING_PYTORCH_OPTIMIZER = False  # type: ignore[attr-defined]
    distributed = importlib.import_module("megatron.core.optimizer.distrib_optimizer")
    distributed.Adam = GroupStepAdam  # type: ignore[attr-defined]
    distributed.HAVE_APEX_OR_TE = True  # type: ignore[attr-defined]
    distributed.USING_APEX_OPTIMIZER = True  # type: ignore[attr-defined]


def patches() -> tuple[Patch, ...]:
    """Return every patch, in the order of application."""
    cuda = torch.cuda
    return (
        Patch(
            "current_device",
            "used as the device of new tensors everywhere; the CPU is device 0",
            _replace(cuda, "current_device", lambda: 0),
        ),
        Patch(
            "streams",
            "NeMo builds the DDP buffers on a side stream; a CPU has one queue",
            _use_the_only_queue,
        ),
        Patch(
            "synchronize",
            "called around pipeline exchanges and before a checkpoint is written; CPU work is already done",
            _replace(cuda, "synchronize", lambda device=None: None),
        ),
        Patch(
            "is_initialized",
            "NeMo's checkpoint reader asserts that CUDA is initialized",
            _replace(cuda, "is_initialized", lambda: True),
        ),
        Patch(
            "rng_state",
            "recomputation saves and restores the CUDA generator; on CPU the default generator is the device's",
            _use_the_default_generator,
        ),
        Patch(
            "tensor_cuda",
            "NeMo moves the loss to the GPU before it is logged; it is where it belongs",
            _replace(torch.Tensor, "cuda", _same),
        ),
        Patch(
            "device_literals",
            "device='cuda' and pin_memory=True are literals in both libraries; there is one device, unpinned",
            _enter_device_literals,
        ),
        Patch(
            "tensor_type",
            "the optimizer compares Tensor.type() with torch.cuda.FloatTensor to find the dtype",
            _replace(torch.Tensor, "type", _cuda_type_name),
        ),
        Patch(
            "group_step_adam",
            "torch's AdamW keeps `step` per parameter, and Megatron cannot read such a checkpoint back",
            _install_group_step_adam,
            after_import=True,
            with_gpu=True,
        ),
    )


def _avoid_the_compilers() -> None:
    """Keep Megatron from asking for the CUDA device that its functions would be compiled for."""
    if torch.version.cuda is not None:
        # Importing Megatron asks torch for the flags to compile kernels with. A CUDA build of torch derives them from
        # the GPUs it finds, with an IndexError where there are none. Nothing is compiled here: any value will do.
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "9.0")
    # The jit-fused functions of Megatron are compiled on first call, and the compiler asks for a CUDA device.
    importlib.import_module("torch._dynamo").config.disable = True  # type: ignore[attr-defined]


def prepare(without: str | None = None) -> None:
    """Apply the patches that this machine needs. Call once, before any model is built; a second call does nothing.

    Args:
        without: Name of a patch to leave out; only the tests use it.
    """
    if getattr(prepare, "done", False):
        return
    has_gpu = torch.cuda.is_available()
    if not has_gpu:
        _avoid_the_compilers()
    selected = [patch for patch in patches() if patch.name != without and (patch.with_gpu or not has_gpu)]
    for patch in selected:
        if not patch.after_import:
            patch.apply()
    importlib.import_module("megatron.core")
    for patch in selected:
        if patch.after_import:
            patch.apply()
    prepare.done = True  # type: ignore[attr-defined]
