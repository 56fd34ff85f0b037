"""Load a tokenizer with plain transformers: local files, and no code from the directory.

The only place that calls the tokenizer loader of transformers, which imports torch.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from nemo_prolong.data.tokenizer.saved import SavedTokenizer, TokenizerProblem, copy_tokenizer
from nemo_prolong.files import require_directory


def load_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a directory, whichever version of transformers wrote it.

    A broken one raises whatever its library raises.

    Raises:
        FileNotFoundError: If there is no such directory.
    """
    require_directory(directory)
    saved = SavedTokenizer.read(directory)
    if not saved.translated:
        return _load(directory)
    with tempfile.TemporaryDirectory() as translated:
        copy_tokenizer(saved, Path(translated))
        tokenizer = _load(Path(translated))
    tokenizer.name_or_path = str(directory)
    return tokenizer


def _load(directory: Path) -> PreTrainedTokenizerBase:
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
        str(directory), local_files_only=True, trust_remote_code=False
    )
    return tokenizer


def loading_problem(directory: Path) -> TokenizerProblem | None:
    """Return why transformers cannot load a tokenizer as a fast one, or None."""
    try:
        tokenizer = load_tokenizer(directory)
    # A broken tokenizer.json makes the tokenizers library raise a bare Exception.
    except Exception as error:
        return TokenizerProblem(
            f"transformers cannot load it: {' '.join(str(error).split())}",
            "Save it again with a version of transformers that has its class, as a fast tokenizer.",
        )
    if not tokenizer.is_fast:
        return TokenizerProblem(
            f"transformers has no fast form of its class {type(tokenizer).__name__}, so tokenizer.json is not used.",
            "Set tokenizer_class to PreTrainedTokenizerFast in tokenizer_config.json, if tokenizer.json is all of it.",
        )
    return None
