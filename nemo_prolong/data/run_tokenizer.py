"""The tokenizer of a model, compared with what its run recorded and with what is known of rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from nemo_prolong.data.row_origins import require_tokenizer
from nemo_prolong.data.tokenizer import TextEncoder
from nemo_prolong.data.tokenizer.saved import TOKENIZER_FILE
from nemo_prolong.errors import ProlongError
from nemo_prolong.records.checkpoint.model_description import ModelDescription
from nemo_prolong.records.row_origin import RowOrigin
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


def require_rows_of(tokenizer: Path, name: str, row_sets: Mapping[str, Mapping[str, RowOrigin]], remedy: str) -> None:
    """Refuse rows that another tokenizer made.

    Args:
        tokenizer: Directory of the tokenizer. Where it has no ``tokenizer.json``, nothing can be compared.
        name: What it is called in messages.
        row_sets: What is known of the rows, by what was set.
        remedy: What to set instead.

    Raises:
        DataError: Naming both tokenizers.
    """
    if not any(row_sets.values()) or not (tokenizer / TOKENIZER_FILE).is_file():
        return
    sha256 = TextEncoder(tokenizer, "tokenizers").sha256
    for what, origins in row_sets.items():
        require_tokenizer(origins, name, sha256, what, remedy)
