"""Compare an exported directory with the checkpoint it was made from; any difference refuses the export.

First the files: configuration, tokenizer, and every tensor read back from disk and joined again to Megatron's form,
equal to the bit. Then, in ``logits.py``, the model that plain transformers makes of them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from nemo_prolong.errors import ExportError
from nemo_prolong.export.hf_config import generation_config, load_tokenizer, model_config, special_tokens
from nemo_prolong.export.names import Piece, pieces
from nemo_prolong.export.source import Source
from nemo_prolong.export.writer import INDEX_FILE

PROBE_TEXT = "def f(x):\n\treturn x ** 2  # 12,345 \u00e4\u00f6\u00fc <|eot_id|>\n"
"""Text that two different tokenizers are unlikely to cut alike."""


def mismatch(what: str, found: str) -> ExportError:
    """Return the refusal of an export that is not equal to its source."""
    return ExportError(
        what,
        f"the export does not equal the model: {found}.",
        "Nothing was written. Run the export again; if it fails again, please report it with export.log.",
    )


def verify_configuration(
    source: Source, tokenizer: PreTrainedTokenizerBase, directory: Path, dtype: torch.dtype
) -> None:
    """Check the JSON files and the tokenizer on disk.

    Raises:
        ExportError: Naming the first key that differs.
    """
    special = special_tokens(tokenizer, source.model.vocab_size)
    expected = {
        "config.json": model_config(source, special, dtype),
        "generation_config.json": generation_config(special),
    }
    for name, values in expected.items():
        found = json.loads((directory / name).read_text(encoding="utf-8"))
        for key in sorted(values.keys() | found.keys()):
            if found.get(key) != values.get(key) or (key in found) != (key in values):
                raise mismatch(
                    f"{name} {key}={found.get(key)}", f"the checkpoint and its manifest say {values.get(key)}"
                )
    _verify_tokenizer(tokenizer, load_tokenizer(directory))


def _verify_tokenizer(source: PreTrainedTokenizerBase, exported: PreTrainedTokenizerBase) -> None:
    checks = {
        "vocabulary": (source.get_vocab(), exported.get_vocab()),
        "special tokens": (source.special_tokens_map, exported.special_tokens_map),
        "chat template": (source.chat_template, exported.chat_template),
        "cut of a probe text": (source(PROBE_TEXT)["input_ids"], exported(PROBE_TEXT)["input_ids"]),
    }
    for what, (ours, theirs) in checks.items():
        if ours != theirs:
            raise mismatch("tokenizer", f"its {what} is not that of {source.name_or_path}")


def verify_tensors(source: Source, directory: Path, dtype: torch.dtype) -> int:
    """Check that the files hold every tensor once, where the index says, with the bits of the checkpoint.

    Returns:
        How many Hugging Face tensors were compared.

    Raises:
        ExportError: Naming the first tensor that differs.
    """
    index = json.loads((directory / INDEX_FILE).read_text(encoding="utf-8"))
    weight_map: dict[str, str] = index["weight_map"]
    all_pieces = list(pieces(source.model))
    expected = {name for piece in all_pieces for name in piece.names}
    _verify_index(directory, index, expected, dtype)
    for piece in all_pieces:
        parts = [_read_tensor(directory / weight_map[name], name) for name in piece.names]
        _verify_piece(source, piece, parts, dtype)
    return len(expected)


def _verify_index(directory: Path, index: dict[str, Any], expected: set[str], dtype: torch.dtype) -> None:
    """Check that index and files agree with each other and hold the tensors of the model."""
    found: dict[str, str] = {}
    elements = 0
    for path in sorted(directory.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():
                    if name in found:
                        raise mismatch(f"{path.name} {name}", f"{found[name]} holds it too")
                    found[name] = path.name
                    elements += torch.Size(file.get_slice(name).get_shape()).numel()
        except SafetensorError as error:
            raise mismatch(path.name, f"the file cannot be read back ({error})") from error
    if found.keys() != expected:
        raise mismatch(
            "*.safetensors", f"tensors missing or too many: {', '.join(sorted(found.keys() ^ expected)[:3])}"
        )
    if index["weight_map"] != found:
        raise mismatch(INDEX_FILE, "it does not say where the tensors are")
    if index["metadata"]["total_size"] != elements * dtype.itemsize:
        raise mismatch(INDEX_FILE, f"total_size is not {elements * dtype.itemsize}")


def _read_tensor(path: Path, name: str) -> Tensor:
    with safe_open(path, framework="pt") as file:
        return file.get_tensor(name)


def _verify_piece(source: Source, piece: Piece, parts: list[Tensor], dtype: torch.dtype) -> None:
    """Check the parts of one Megatron tensor, joined again."""
    for name, part, shape in zip(piece.names, parts, piece.shapes, strict=True):
        if part.shape != shape or part.dtype != dtype:
            raise mismatch(name, f"it is {list(part.shape)} {part.dtype}, not {list(shape)} {dtype}")
    joined = piece.rule.join(parts, source.model)
    original = source.read(piece)[: joined.shape[0]].to(dtype)
    # As integers: equal bits, where a comparison of floats takes 0.0 for -0.0 and no NaN for itself.
    integer = torch.int16 if dtype.itemsize == 2 else torch.int32
    differing = int((joined.view(integer) != original.contiguous().view(integer)).sum())
    if differing:
        where = piece.rule.megatron if piece.layer is None else f"{piece.rule.megatron} of layer {piece.layer}"
        raise mismatch(", ".join(piece.names), f"{differing} values differ from {where}")
