"""Compare an FP8 directory with the verified bf16 directory it was made from; any difference refuses the export.

Every value must be the bf16 value rounded to the nearest FP8 number of its scale. Everything that is not quantized must
be equal to the bit. The two descriptions of the quantization must agree. TensorRT-LLM believes
``hf_quant_config.json``, others believe the copy inside ``config.json``, and no server compares them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from nemo_prolong.export.verify import mismatch
from nemo_prolong.weights.hf_model import load_model

QUANT_CONFIG_FILE = "hf_quant_config.json"

Dequantize = Callable[[Tensor, Tensor], Tensor]
"""An FP8 weight and its scale (float32 []) to the weight in float32: ``engine.fp8_export.dequantize``."""

_QUANTIZED = re.compile(r"model\.layers\.\d+\.(?:self_attn\.[qkvo]_proj|mlp\.(?:gate|up|down)_proj)\.weight")

# Half a step of FP8 relative to a value, with room for the bf16 arithmetic below; half a step of the subnormals.
_RELATIVE_ERROR = 2.0**-4 * (1.0 + 2.0**-7)
_SUBNORMAL_ERROR = 2.0**-10
# ModelOpt rounds the scale and the quotient to bf16, each by up to 2**-9 of it. That moves some quotients over the
# middle between two FP8 numbers.
_QUOTIENT_ERROR = 2.0**-8

PROBE_TOKENS = 512
"""Tokens on which the logits of both directories are compared."""


@dataclass(frozen=True)
class Quantization:
    """What a directory says about its numbers, in whichever of ModelOpt's two forms.

    Attributes:
        algorithm: Of the weights.
        kv_cache_algorithm: Of keys and values, or None.
        excluded: Modules that are not quantized.
    """

    algorithm: str | None
    kv_cache_algorithm: str | None
    excluded: frozenset[str]


def parse_quantization(config: dict[str, Any]) -> Quantization:
    """Read either form: the nested one of ``hf_quant_config.json``, the flat one inside ``config.json``."""
    if "quantization" in config:
        nested = config["quantization"]
        return Quantization(
            nested.get("quant_algo"), nested.get("kv_cache_quant_algo"), frozenset(nested.get("exclude_modules") or ())
        )
    scheme = config.get("kv_cache_scheme")
    is_fp8 = isinstance(scheme, dict) and (scheme.get("type"), scheme.get("num_bits")) == ("float", 8)
    return Quantization(config.get("quant_algo"), "FP8" if is_fp8 else None, frozenset(config.get("ignore") or ()))


def verify_quantization(directory: Path) -> None:
    """Check that both descriptions are there and say FP8 for weights, keys and values, and bf16 for the LM head.

    Raises:
        ExportError: If they do not.
    """
    expected = Quantization("FP8", "FP8", frozenset({"lm_head"}))
    file = json.loads((directory / QUANT_CONFIG_FILE).read_text(encoding="utf-8"))
    inline = json.loads((directory / "config.json").read_text(encoding="utf-8")).get("quantization_config") or {}
    for what, config in ((QUANT_CONFIG_FILE, file), ("config.json quantization_config", inline)):
        found = parse_quantization(config)
        if found != expected:
            raise mismatch(what, f"it says {found}, not {expected}")
    if inline.get("quant_method") != "modelopt":
        raise mismatch("config.json quantization_config", f"quant_method is {inline.get('quant_method')}, not modelopt")


def verify_weights(original: Path, quantized: Path, dequantize: Dequantize) -> int:
    """Check every tensor of an FP8 directory against its bf16 source.

    Args:
        original: Directory in bf16.
        quantized: Directory in FP8.
        dequantize: Reads an FP8 weight with its scale.

    Returns:
        How many matrices are in FP8.

    Raises:
        ExportError: Naming the first tensor that is missing, unknown or different.
    """
    theirs, ours = TensorFiles.of(original), TensorFiles.of(quantized)
    names = {name for name in theirs.names if _QUANTIZED.fullmatch(name)}
    expected = theirs.names | {scale for name in names for scale in _scales(name)}
    if ours.names != expected:
        raise mismatch("*.safetensors", f"tensors missing or too many: {', '.join(sorted(ours.names ^ expected)[:3])}")
    for name in sorted(theirs.names - names):
        if not same_bits(theirs.read(name), ours.read(name)):
            raise mismatch(name, "it is not quantized and yet not that of the bf16 directory")
    for name in sorted(names):
        _verify_matrix(name, theirs.read(name).float(), ours, dequantize)
    return len(names)


def _scales(weight: str) -> Iterator[str]:
    """Yield the names of the scales beside an FP8 weight."""
    module = weight.removesuffix(".weight")
    yield f"{module}.weight_scale"
    yield f"{module}.input_scale"
    for letter in "kv":
        if module.endswith(f"{letter}_proj"):
            yield f"{module}.{letter}_scale"


def same_bits(ours: Tensor, theirs: Tensor) -> bool:
    """Whether two tensors are bf16 and equal to the bit."""
    same = ours.dtype == theirs.dtype == torch.bfloat16 and ours.shape == theirs.shape
    return same and torch.equal(ours.view(torch.int16), theirs.view(torch.int16))


def _verify_matrix(name: str, original: Tensor, quantized: TensorFiles, dequantize: Dequantize) -> None:
    for scale_name in _scales(name):
        value = quantized.read(scale_name)
        if value.dtype != torch.float32 or value.numel() != 1 or not (value.isfinite() & (value > 0)).all():
            raise mismatch(scale_name, f"it is {value}, not one positive fp32 number")
    verify_rounding(name, original, quantized.read(name), quantized.read(f"{name}_scale"), dequantize)


def verify_rounding(name: str, original: Tensor, weight: Tensor, scale: Tensor, dequantize: Dequantize) -> None:
    """Check that FP8 values are the original ones rounded.

    Args:
        name: For the message.
        original: float32.
        weight: float8_e4m3fn, the same shape.
        scale: float32 [].
        dequantize: Reads ``weight`` with ``scale``.

    Raises:
        ExportError: If they are not.
    """
    if weight.dtype != torch.float8_e4m3fn or weight.shape != original.shape:
        raise mismatch(name, f"it is {weight.dtype} {list(weight.shape)}")
    subnormal = scale * _SUBNORMAL_ERROR + original.abs() * _QUOTIENT_ERROR
    allowed = torch.maximum(original.abs() * _RELATIVE_ERROR, subnormal)
    wrong = int((~((dequantize(weight, scale) - original).abs() <= allowed)).sum())
    if wrong:
        raise mismatch(name, f"{wrong} values are not those of the bf16 directory rounded to FP8")


class TensorFiles:
    """Safetensors files as one.

    Args:
        paths: The files.
    """

    def __init__(self, paths: Iterable[Path]) -> None:
        self._files: dict[str, Path] = {}
        for path in paths:
            with safe_open(path, framework="pt") as file:
                self._files.update(dict.fromkeys(file.keys(), path))

    @classmethod
    def of(cls, directory: Path) -> TensorFiles:
        """Return all of a directory."""
        return cls(sorted(directory.glob("*.safetensors")))

    @property
    def names(self) -> set[str]:
        """Names of all tensors."""
        return set(self._files)

    def read(self, name: str) -> Tensor:
        """Return one tensor."""
        with safe_open(self._files[name], framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
            return tensor


@torch.inference_mode()
def logit_difference(original: Path, quantized: Path, tokens: Tensor, dequantize: Dequantize) -> float:
    """Return the relative difference of the logits of the dequantized weights from those of the bf16 directory.

    Args:
        original: Directory in bf16.
        quantized: Directory in FP8.
        tokens: int64 [T], of which the first ``PROBE_TOKENS`` are taken.
        dequantize: As for ``verify_weights``.

    Returns:
        Norm of the difference by norm of the bf16 directory's logits, computed in fp32.
    """
    model, _ = load_model(original, torch.float32)
    prompt = tokens[None, :PROBE_TOKENS]
    before = model(prompt, use_cache=False).logits
    files = TensorFiles.of(quantized)
    for name, parameter in model.named_parameters():
        if _QUANTIZED.fullmatch(name):
            parameter.copy_(dequantize(files.read(name), files.read(f"{name}_scale")))
    after = model(prompt, use_cache=False).logits
    return float((after - before).norm() / before.norm())
