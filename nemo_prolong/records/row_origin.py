"""``origin.json`` of a row set: which tokenizer made its rows, and what stands around their documents.

``manifest.json`` of the data directory says so too, and stays behind where a row set is moved or copied by itself.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from nemo_prolong.errors import DataError
from nemo_prolong.files import write_json_atomically
from nemo_prolong.records.data_manifest import ChatFormat

ORIGIN = "origin.json"


class RowOrigin(BaseModel):
    """Where the tokens of a row set come from.

    Attributes:
        format: Of the file.
        tokenizer: The tokenizer as it was named, None where it was trained for the data directory.
        tokenizer_sha256: Hash of all that decides the ids of a text.
        vocab_size: One more than its highest token id.
        bos_token: What begins a document, or None.
        eos_token: What ends one, or None.
        chat: How conversations were written, None where the rows hold none or nothing says how.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    format: Literal[1] = 1
    tokenizer: str | None = None
    tokenizer_sha256: str
    vocab_size: int | None = None
    bos_token: str | None = None
    eos_token: str | None = None
    chat: ChatFormat | None = None

    @classmethod
    def parse(cls, content: bytes, where: str) -> RowOrigin:
        """Return what a file says.

        Args:
            content: Of the file.
            where: Its name, for messages.

        Raises:
            DataError: If it is damaged.
        """
        try:
            return cls.model_validate(json.loads(content))
        except (ValueError, ValidationError) as error:
            raise DataError(
                where, f"does not say where the rows come from ({str(error).splitlines()[0]}).", "Copy it again."
            ) from error

    def write(self, row_set: Path) -> None:
        """Write the file of a row set, whole or not at all."""
        write_json_atomically(row_set / ORIGIN, self.model_dump())

    @property
    def name(self) -> str:
        """The tokenizer in words."""
        size = "" if self.vocab_size is None else f" of {self.vocab_size:,} tokens"
        return f"{self.tokenizer or 'a tokenizer of their own'}{size} (SHA-256 {self.tokenizer_sha256[:12]})"
