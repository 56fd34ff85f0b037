"""Load a Hugging Face directory with plain transformers: local files, safetensors, and no code from the directory.

The only place that calls the model loader of transformers. It carries no types, so the types are given here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from transformers import AutoModelForCausalLM

from nemo_prolong.files import require_directory

_LOCAL: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}


class LoadedModel(NamedTuple):
    """A model in evaluation mode on the CPU, and what did not fit while it was loaded.

    Attributes:
        model: The model; untyped, as the attributes of a ``torch.nn.Module`` are.
        problems: Names of weights by kind of problem, such as ``missing_keys``; kinds without any are left out.
    """

    model: Any
    problems: dict[str, list[str]]


def load_model(directory: Path, dtype: torch.dtype | Literal["auto"]) -> LoadedModel:
    """Return the model of a directory.

    Args:
        directory: With ``config.json`` and safetensors.
        dtype: Of its weights and arithmetic; ``auto`` takes that of the files.

    Raises:
        FileNotFoundError: If there is no such directory.
    """
    require_directory(directory)
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        str(directory), dtype=dtype, use_safetensors=True, output_loading_info=True, **_LOCAL
    )
    model, report = loaded
    kinds = ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")
    return LoadedModel(model.eval(), {kind: sorted(map(str, report[kind])) for kind in kinds if report[kind]})
