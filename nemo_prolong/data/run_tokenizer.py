"""The tokenizer of a run, found where the run left it and compared with what the run recorded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from nemo_prolong.data.tokenizer import TextEncoder
from nemo_prolong.errors import ProlongError
from nemo_prolong.records.checkpoint.model_description import ModelDescription
from nemo_prolong.records.stage_manifest import DataRecord


def run_tokenizer(description: ModelDescription, data: DataRecord, refuse: Callable[[str, str], ProlongError]) -> Path:
    """Return the directory of the tokenizer that a run was trained with.

    Args:
        description: ``model.json`` of its checkpoint.
        data: What ``stage.json`` says of its data.
        refuse: Makes the error from rule and remedy.

    Raises:
        ProlongError: What ``refuse`` makes, if the directory is gone or holds another tokenizer.
    """
    directory = description.tokenizer_directory
    started_in = f" ({data.working_directory})" if data.working_directory else ""
    remedy = f"Put the data directory back where it was, or run the command where the run was started{started_in}."
    if not directory.is_dir():
        rule = f"the tokenizer that it was trained with is not in {description.tokenizer}, seen from {Path.cwd()}."
        raise refuse(rule, remedy)
    expected = data.tokenizer_sha256
    if expected is None:
        return directory
    found = TextEncoder(directory, "tokenizers").sha256
    if found != expected:
        rule = (
            f"{directory} holds another tokenizer (SHA-256 {found[:12]}) than the run was trained with "
            f"({expected[:12]})."
        )
        raise refuse(rule, remedy)
    return directory
