"""What an accelerator can do at most, which is the denominator of MFU.

The peaks are those of NVIDIA's data sheets, without sparsity. Where a sheet prints the number with sparsity, half of
it. The names are the ones that the driver reports.
"""

from __future__ import annotations

import re
from typing import NamedTuple

TFLOPS = 1e12


class DensePeak(NamedTuple):
    """FLOPs per second by number format, or None where the device has none of it or its sheet gives no number.

    Attributes:
        fp32: Outside tensor cores. torch computes fp32 matrix products there unless told otherwise.
        bf16: Tensor cores.
        fp8: Tensor cores.
    """

    fp32: float | None
    bf16: float | None
    fp8: float | None


_H100_SXM = DensePeak(67 * TFLOPS, 989.4 * TFLOPS, 1978.9 * TFLOPS)
_H100_PCIE = DensePeak(51 * TFLOPS, 756.5 * TFLOPS, 1513 * TFLOPS)
_H100_NVL = DensePeak(60 * TFLOPS, 835.5 * TFLOPS, 1670.5 * TFLOPS)
_A100 = DensePeak(19.5 * TFLOPS, 312 * TFLOPS, None)

_PEAKS: tuple[tuple[str, DensePeak], ...] = (
    # The first pattern that is found counts, so a form factor stands before the name it belongs to.
    (r"\bH[18]00 PCIe\b", _H100_PCIE),
    (r"\bH[12]00 NVL\b", _H100_NVL),
    (r"\bG?H[128]00\b", _H100_SXM),
    (r"\bH20\b", DensePeak(44 * TFLOPS, 148 * TFLOPS, 296 * TFLOPS)),
    (r"\bA[18]00\b", _A100),
    (r"\bGB200\b", DensePeak(None, 2500 * TFLOPS, 5000 * TFLOPS)),
    (r"\bB200\b", DensePeak(None, 2250 * TFLOPS, 4500 * TFLOPS)),
    (r"\bL40S\b", DensePeak(91.6 * TFLOPS, 362 * TFLOPS, 733 * TFLOPS)),
)

_FORMATS = {"fp32": "fp32", "bf16": "bf16", "fp8": "fp8", "fp8_attention": "fp8"}


def dense_peak_flops_per_second(device_name: str, compute: str) -> float | None:
    """Return the dense peak of a device, or None where it is not known.

    Args:
        device_name: As ``torch.cuda.get_device_name`` gives it.
        compute: ``precision.compute``. Under both FP8 precisions the peak is that of FP8, although attention or parts
            of it run in BF16.

    >>> dense_peak_flops_per_second("NVIDIA H100 80GB HBM3", "bf16") / 1e12
    989.4
    """
    for pattern, peak in _PEAKS:
        if re.search(pattern, device_name):
            value: float | None = getattr(peak, _FORMATS[compute])
            return value
    return None
