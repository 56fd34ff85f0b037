"""What an accelerator can do at most. The dense BF16 peak is the denominator of MFU, whatever format computes.

The peaks are those of NVIDIA's data sheets, without sparsity. Where a sheet prints the number with sparsity, half of
it. The names are the ones that the driver reports.
"""

from __future__ import annotations

import re
from typing import Literal, NamedTuple

from nemo_prolong.plan.flops import CONVENTION

TFLOPS = 1e12

MFU_CONVENTION = f"model FLOPs over the dense BF16 peak of the device, in every precision; {CONVENTION}"
"""What MFU is, in the words that tables and reports print."""


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


def dense_peak_flops_per_second(device_name: str, number_format: Literal["fp32", "bf16", "fp8"]) -> float | None:
    """Return the dense peak of a device, or None where it is not known.

    Args:
        device_name: As ``torch.cuda.get_device_name`` gives it.
        number_format: Of the matrix products.

    >>> dense_peak_flops_per_second("NVIDIA H100 80GB HBM3", "bf16") / 1e12
    989.4
    """
    for pattern, peak in _PEAKS:
        if re.search(pattern, device_name):
            value: float | None = getattr(peak, number_format)
            return value
    return None
