"""The bound on FP8 values admits every bf16 number as ModelOpt rounds it, and no neighbour that is clearly another."""

from __future__ import annotations

import pytest
import torch
from modelopt.torch.quantization.qtensor import FP8QTensor

from nemo_prolong.engine.fp8_export import dequantize
from nemo_prolong.errors import ExportError
from nemo_prolong.export.serving.quantized import verify_rounding

LARGEST = 448.0
SCALES = [1.0, 2.332414876e-4, 7.1e-5, 3.3e-3, 3.61e-3, 1.7]


def all_values(scale: float) -> torch.Tensor:
    """Return every bf16 number that FP8 of this scale can hold, bf16 [N]."""
    numbers = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    return numbers[numbers.isfinite() & (numbers.float().abs() <= LARGEST * scale)]


@pytest.mark.parametrize("scale", SCALES)
def test_every_bf16_number_passes_as_modelopt_rounds_it(scale: float) -> None:
    values, scales = all_values(scale), torch.tensor(scale)
    quantized, _ = FP8QTensor.quantize(values, scales=scales)
    verify_rounding("weight", values.float(), quantized._quantized_data, scales, dequantize)


@pytest.mark.parametrize("scale", SCALES)
def test_the_next_fp8_number_is_refused_where_a_value_is_near_its_own(scale: float) -> None:
    codes = torch.arange(1, 126, dtype=torch.uint8)
    own, following = (code.view(torch.float8_e4m3fn) for code in (codes, codes + 1))
    for value, found in zip(dequantize(own, torch.tensor(scale)), following, strict=True):
        with pytest.raises(ExportError, match="1 values are not those of the bf16 directory rounded to FP8"):
            verify_rounding("weight", value[None], found[None], torch.tensor(scale), dequantize)
