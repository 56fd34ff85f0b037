"""A Hugging Face directory as the parent of a stage (``parent=hf:DIR``), judged before NeMo is imported."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer

from nemo_prolong.config.addresses import HF_PREFIX, tokenizer_directory
from nemo_prolong.config.schema import RunConfig
from nemo_prolong.data.tokenizer.saved import TOKENIZER_FILE
from nemo_prolong.errors import CheckpointError, DataError
from nemo_prolong.records.locations import working_directory
from nemo_prolong.records.stage_manifest import ParentRecord
from nemo_prolong.weights.hf_directory import HuggingFaceDirectory


def check_hugging_face_parent(cfg: RunConfig, *, weights: bool, hashed: bool = True) -> ParentRecord:
    """Return what is recorded of the directory after checking that the stage can start from it.

    Args:
        cfg: The stage, with ``parent=hf:DIR``.
        weights: Also check the tensors and hash the files, which one rank does when the stage begins.
        hashed: With false the files are not hashed, which reads only their headers.

    Raises:
        CheckpointError: If the directory is no Llama in safetensors, or not whole.
        ConfigError: If its model is not the one configured.
        DataError: If the rows were made with another tokenizer than the model's.
    """
    assert cfg.parent is not None
    directory = HuggingFaceDirectory(Path(cfg.parent.removeprefix(HF_PREFIX)))
    directory.check_fields(cfg.model)
    if weights:
        directory.check_tensors(cfg.model)
        check_same_tokens(cfg, directory.path / TOKENIZER_FILE)
    return ParentRecord(
        path=cfg.parent,
        step=0,
        transition=cfg.transition,
        sha256=directory.sha256() if weights and hashed else None,
        context_length=directory.context_length,
        rotary_base=directory.rotary_base,
        stop_token_ids=directory.stop_token_ids,
        working_directory=working_directory(),
        grown_vocab_rows=cfg.model.vocab_size - directory.vocab_size,
        wrappers=list(directory.wrappers),
    )


def check_same_tokens(cfg: RunConfig, theirs: Path) -> None:
    """Refuse rows whose ids mean other tokens than the model learned.

    Args:
        cfg: The stage, with a parent.
        theirs: ``tokenizer.json`` of the parent. A directory may come without one.

    Raises:
        CheckpointError: If it cannot be read.
        DataError: If a token has another id in the data's tokenizer.
    """
    if not theirs.is_file():
        return
    ours = tokenizer_directory(cfg.data) / TOKENIZER_FILE
    found, expected = _vocabulary(ours), _vocabulary(theirs)
    differing = sorted((id_, token) for token, id_ in expected.items() if found.get(token) != id_)
    if differing:
        id_, token = differing[0]
        raise DataError(
            f"data.tokenizer={cfg.data.tokenizer}",
            f"{len(differing)} tokens of {cfg.parent} have other ids in {ours.parent}: "
            f"{token!r} is {id_} there and {found.get(token, 'missing')} here.",
            "Prepare the data with the tokenizer of the model that the stage starts from.",
        )


def _vocabulary(path: Path) -> dict[str, int]:
    try:
        vocabulary: dict[str, int] = Tokenizer.from_file(str(path)).get_vocab(with_added_tokens=True)
    # The library raises a bare Exception for a file it cannot read.
    except Exception as error:
        raise CheckpointError(str(path), f"the tokenizer cannot be loaded ({error}).", "Restore the file.") from error
    return vocabulary
