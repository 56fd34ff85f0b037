"""What ends the texts that a stage's model generates: known before it trains, and handed down from stage to stage."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import cached_property

from nemo_prolong.config.addresses import tokenizer_directory
from nemo_prolong.config.schema import RunConfig
from nemo_prolong.data.tokenizer import TextEncoder
from nemo_prolong.data.tokenizer.stop_tokens import chat_stop_ids, check_own_template, older_stop_ids
from nemo_prolong.records.data_manifest import ChatFormat, DataManifestFile
from nemo_prolong.records.stage_manifest import ParentRecord, StageManifest

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StopTokens:
    """What ends a text.

    Attributes:
        stop_token_ids: The end of a document, then what ended the parent's texts, then the end of a turn.
        chat: Format of the conversations that the model was trained on last, None where there were none.
    """

    stop_token_ids: tuple[int, ...] = ()
    chat: ChatFormat | None = None


UNKNOWN_STOP_TOKENS = StopTokens()
"""Of a run whose manifest says it already, and of ranks that write none."""


def find_stop_tokens(
    cfg: RunConfig, data: DataManifestFile, parent: StageManifest | None, record: ParentRecord | None
) -> StopTokens:
    """Return what ends the texts of a stage that begins.

    Args:
        cfg: The stage.
        data: Manifest of its data directory.
        parent: Manifest of the run it starts from, None where it starts from no run.
        record: What it takes from its parent.

    Raises:
        DataError: If generation could not be stopped where the conversations end a turn.
    """
    found = _StageData(cfg, data)
    found.check_chat()
    inherited = list(record.stop_token_ids) if record is not None else []
    if parent is not None and parent.stop_token_ids is None:
        inherited = older_stop_ids(found.encoder)
        log.info("%s does not say what ends its texts; by its tokenizer it is %s", parent.name, inherited)
    chat = found.chat or (parent.chat if parent is not None else None)
    ids = [*found.document_end_ids, *inherited, *found.turn_end_ids]
    return StopTokens(tuple(dict.fromkeys(ids)), chat)


def check_chat(cfg: RunConfig, data: DataManifestFile) -> None:
    """Refuse conversations at whose ends generation could not be stopped, long before the model is exported.

    Raises:
        DataError: If the end of a turn is no token of its own, or the tokenizer's own chat template ends turns with
            another.
    """
    _StageData(cfg, data).check_chat()


class _StageData:
    """The tokens at which the data of a stage ends documents and turns. Its tokenizer is loaded when it is needed."""

    def __init__(self, cfg: RunConfig, data: DataManifestFile) -> None:
        self._cfg = cfg
        self._data = data
        self.chat = data.chat if cfg.data.apply_instruct_masks else None

    @cached_property
    def encoder(self) -> TextEncoder:
        """The tokenizer of the rows."""
        return TextEncoder(tokenizer_directory(self._cfg.data), "tokenizers")

    @property
    def document_end_ids(self) -> list[int]:
        """The end of a document; empty where the data directory does not say."""
        token = self._data.eos_token
        return [] if token is None else [self.encoder.special_id(token)]

    @property
    def turn_end_ids(self) -> list[int]:
        """The end of a turn, if the stage trains on answers. Data of earlier versions does not say how it ends."""
        if self.chat is not None:
            return chat_stop_ids(self.chat, self.encoder)
        return older_stop_ids(self.encoder) if self._cfg.data.apply_instruct_masks else []

    def check_chat(self) -> None:
        """See the function of this name."""
        if self.chat is None:
            return
        check_own_template(self.encoder, self.chat, chat_stop_ids(self.chat, self.encoder))
