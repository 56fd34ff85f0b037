"""Compare an exported directory with the checkpoint it was made from; any difference refuses the export.

First the files: configuration, tokenizer, and every tensor read back from disk and joined again to Megatron's form,
equal to the bit. Then, in ``logits.py``, the model that plain transformers makes of them.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from safetensors import SafetensorError, safe_open
from transformers import GenerationConfig, PreTrainedTokenizerBase

from nemo_prolong.errors import CheckpointError, ExportError
from nemo_prolong.export.hf_config import (
    CHAT_TEMPLATE_FILE,
    chat_template,
    configuration_files,
    copied_files,
    load_tokenizer,
    special_tokens,
)
from nemo_prolong.export.safetensors_file import SAFETENSORS_DTYPES
from nemo_prolong.export.source import ExportSource
from nemo_prolong.export.writer import INDEX_FILE
from nemo_prolong.weights.hf_directory import HuggingFaceDirectory
from nemo_prolong.weights.hf_reader import HuggingFaceReader
from nemo_prolong.weights.names import Piece, Shape, pieces

PROBE_TEXT = "def f(x):\n\treturn x ** 2  # 12,345 \u00e4\u00f6\u00fc <|eot_id|>\n"
"""Text that two different tokenizers are unlikely to cut alike."""

PROBE_CHAT = [
    {"role": "user", "content": " What is 12 * 3? "},
    {"role": "assistant", "content": "36."},
    {"role": "user", "content": "And 12 * 4?"},
]


def mismatch(what: str, found: str) -> ExportError:
    """Return the refusal of an export that is not equal to its source."""
    return ExportError(
        what,
        f"the export does not equal the model: {found}.",
        "Nothing was written. Run the export again; if it fails again, please report it with export.log.",
    )


def verify_configuration(
    source: ExportSource, tokenizer: PreTrainedTokenizerBase, directory: Path, dtype: torch.dtype
) -> None:
    """Check the JSON files and the tokenizer on disk, and that nothing else lies there.

    Raises:
        ExportError: Naming the first file or key that differs.
    """
    expected = configuration_files(source, tokenizer, dtype)
    for name, values in expected.items():
        found = _read_json(directory / name)
        for key in sorted(values.keys() | found.keys()):
            if found.get(key) != values.get(key) or (key in found) != (key in values):
                raise mismatch(
                    f"{name} {key}={found.get(key)}", f"the checkpoint and its manifest say {values.get(key)}"
                )
    copied = copied_files(source)
    for name in copied:
        if not _same_bytes(source.tokenizer / name, directory / name):
            raise mismatch(name, f"it is not that of {source.tokenizer}")
    allowed = {*expected, *copied, CHAT_TEMPLATE_FILE, INDEX_FILE}
    foreign = sorted(path.name for path in directory.iterdir() if path.name not in allowed)
    foreign = [name for name in foreign if not name.endswith(".safetensors")]
    if foreign:
        raise mismatch(", ".join(foreign), "the export wrote no such file")
    _verify_tokenizer(tokenizer, load_tokenizer(directory))
    _verify_generation(list(special_tokens(source, tokenizer).stop_ids), directory)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return content
    except (OSError, ValueError) as error:
        raise mismatch(path.name, f"it cannot be read back ({error})") from error


def _same_bytes(ours: Path, theirs: Path) -> bool:
    return theirs.is_file() and ours.read_bytes() == theirs.read_bytes()


def _verify_tokenizer(source: PreTrainedTokenizerBase, exported: PreTrainedTokenizerBase) -> None:
    checks = {
        "vocabulary": (source.get_vocab(), exported.get_vocab()),
        "special tokens": (source.special_tokens_map, exported.special_tokens_map),
        "chat template": (chat_template(source), chat_template(exported)),
        "cut of a probe text": (source(PROBE_TEXT)["input_ids"], exported(PROBE_TEXT)["input_ids"]),
        "ids of a conversation": (_chat_ids(source), _chat_ids(exported)),
    }
    for what, (ours, theirs) in checks.items():
        if ours != theirs:
            raise mismatch("tokenizer", f"its {what} is not that of {source.name_or_path}")


def _verify_generation(stop_ids: list[int], directory: Path) -> None:
    """Check what transformers makes of ``generation_config.json``, which it fills up with values of its own."""
    found = GenerationConfig.from_pretrained(str(directory), local_files_only=True).eos_token_id
    if found != stop_ids:
        raise mismatch(
            f"generation_config.json eos_token_id={found}", f"transformers reads another list than {stop_ids}"
        )


def _chat_ids(tokenizer: PreTrainedTokenizerBase) -> object:
    """Return the ids of a conversation as a server makes them, or why there are none."""
    if tokenizer.chat_template is None:
        return None
    try:
        return tokenizer.apply_chat_template(PROBE_CHAT, add_generation_prompt=True, return_dict=False)
    # Several templates without a default one; a template that takes other conversations only.
    except (ValueError, TemplateError) as error:
        return f"{type(error).__name__}: {error}"


def verify_tensors(source: ExportSource, directory: Path, dtype: torch.dtype) -> int:
    """Check that the files hold every tensor once, where the index says, with the bits of the checkpoint.

    The tensors are read as a stage that starts from the directory reads them.

    Returns:
        How many Hugging Face tensors were compared.

    Raises:
        ExportError: Naming the first tensor that differs.
    """
    index = _read_json(directory / INDEX_FILE)
    all_pieces = list(pieces(source.model))
    expected = {name: shape for piece in all_pieces for name, shape in zip(piece.names, piece.shapes, strict=True)}
    _verify_index(directory, index, expected, dtype)
    reader = HuggingFaceReader(_open_directory(directory), source.model)
    for piece in all_pieces:
        _verify_piece(source, piece, reader, dtype)
    return len(expected)


def _open_directory(directory: Path) -> HuggingFaceDirectory:
    try:
        return HuggingFaceDirectory(directory)
    except CheckpointError as error:
        raise mismatch(directory.name, error.rule.rstrip(".")) from error


def _verify_index(directory: Path, index: dict[str, Any], expected: dict[str, Shape], dtype: torch.dtype) -> None:
    """Check that index and files agree with each other and hold the tensors of the model."""
    found: dict[str, str] = {}
    for path in sorted(directory.glob("*.safetensors")):
        for name, shape, kind in _headers(path):
            if name in found:
                raise mismatch(f"{path.name} {name}", f"{found[name]} holds it too")
            found[name] = path.name
            if name in expected and (shape, kind) != (expected[name], SAFETENSORS_DTYPES[dtype]):
                raise mismatch(
                    name, f"it is {list(shape)} {kind}, not {list(expected[name])} {SAFETENSORS_DTYPES[dtype]}"
                )
    if found.keys() != expected.keys():
        raise mismatch(
            "*.safetensors", f"tensors missing or too many: {', '.join(sorted(found.keys() ^ expected.keys())[:3])}"
        )
    if index["weight_map"] != found:
        raise mismatch(INDEX_FILE, "it does not say where the tensors are")
    size = sum(map(math.prod, expected.values())) * dtype.itemsize
    if index["metadata"]["total_size"] != size:
        raise mismatch(INDEX_FILE, f"total_size is not {size}")


def _headers(path: Path) -> list[tuple[str, Shape, str]]:
    """Return name, shape and dtype of every tensor in a file."""
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}
            return [(name, tuple(part.get_shape()), part.get_dtype()) for name, part in slices.items()]
    except SafetensorError as error:
        raise mismatch(path.name, f"the file cannot be read back ({error})") from error


def _verify_piece(source: ExportSource, piece: Piece, reader: HuggingFaceReader, dtype: torch.dtype) -> None:
    """Compare one Megatron tensor, the padding of a vocabulary left out."""
    original = source.read(piece)[: sum(shape[0] for shape in piece.shapes)].to(dtype)
    read_back = torch.empty_like(original)
    reader.fill(read_back, piece.rule.megatron, piece.layer)
    # As integers: equal bits, where a comparison of floats takes 0.0 for -0.0 and no NaN for itself.
    integer = torch.int16 if dtype.itemsize == 2 else torch.int32
    differing = int((read_back.view(integer) != original.view(integer)).sum())
    if differing:
        where = piece.rule.megatron if piece.layer is None else f"{piece.rule.megatron} of layer {piece.layer}"
        raise mismatch(", ".join(piece.names), f"{differing} values differ from {where}")
