"""The typed configuration of ``scripts/prepare_data.py``: sources of documents, and the rows to make of them."""

from __future__ import annotations

from datetime import date
from enum import StrEnum
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from nemo_prolong.config.schema import DataConfig, Fraction, Section, Size
from nemo_prolong.config.schema.base import Count, Name, RowTokens, Seed, Text, Token
from nemo_prolong.units import parse_size

INSTALLATION_CHAT = "chat"
"""Domain of an installation that is conversations."""


class SourceFormat(StrEnum):
    """How the documents of a source are stored."""

    AUTO = "auto"
    JSONL = "jsonl"
    PARQUET = "parquet"
    HUGGINGFACE = "huggingface"
    TEXT = "text"
    REPOSITORIES = "repositories"
    TOKENIZED_MDS = "tokenized_mds"
    PACKED_MDS = "packed_mds"
    INSTALLATION = "installation"


class SourceConfig(Section):
    """Documents of one domain, in one format."""

    domain: Text
    """What the documents are called in row sets, rows and reports."""
    path: Text = ""
    """File, directory, glob or ``s3://`` address; several sources may share a domain."""
    format: SourceFormat = SourceFormat.AUTO
    """auto looks at the path: JSON lines, Parquet, a ``datasets`` directory, MDS, or a tree of text files."""
    split: Literal["auto", "train", "validation"] = "auto"
    """auto holds out ``validation_fraction`` of the groups, by a hash of their names."""
    text_field: Name = "text"
    """Column that holds the text of a document."""
    messages_field: Name | None = None
    """Column that holds the messages of a conversation, ``role`` and ``content`` or ShareGPT's ``from`` and ``value``;
    set it to make this a source of conversations."""
    prompt_field: Name | None = None
    """Column that holds what is answered, as text or messages; with completion_field this is a source of conversations
    too."""
    completion_field: Name | None = None
    """Column that holds the answer, as text or messages, which alone is trained on."""
    tokens_field: Name | None = None
    """Tables and JSON lines: column of token ids, ``input_ids`` in most; set it to make this a source of tokens."""
    group_field: Name | None = None
    """Column that names what is held out together (a repository, a site); null makes every document its own group."""
    include: list[Name] = Field(default_factory=list)
    """Trees: take only files that match one of these patterns, such as ``*.md``; empty takes all text files."""
    on_bad_document: Literal["refuse", "drop"] = "refuse"
    """What to do with a document that is empty, no UTF-8, no JSON or lacks its column: stop, or count and leave out."""
    on_unknown_key: Literal["refuse", "drop"] = "refuse"
    """What to do with a key of a message that no common chat template reads: stop, or count and leave out."""
    ignore_fields: list[Name] = Field(default_factory=list)
    """Columns not to read although they say something of the documents, such as ``tools``, ``weight`` or ``labels``."""
    max_bytes: Size | None = None
    """Use only the first files up to this much input; null uses all. For format=installation: text of this domain."""

    @property
    def holds_conversations(self) -> bool:
        """Whether its documents are conversations, which are packed intact and trained on in part."""
        return (
            self.messages_field is not None
            or self.prompt_field is not None
            or (self.format is SourceFormat.INSTALLATION and self.domain == INSTALLATION_CHAT)
        )


class TokenizerConfig(Section):
    """The tokenizer of the documents."""

    path: Name | None = None
    """``transformers`` directory with a ``tokenizer.json``; null trains one on the sources (for the miniature)."""
    vocab_size: Annotated[int, Field(gt=0, le=2**24)] | None = None
    """Trained tokenizer: tokens, special tokens included."""
    train_bytes: Size | None = None
    """Trained tokenizer: text it is trained on, in equal parts from every domain."""
    bos_token: Token | None = None
    """Put before every text document; null takes the tokenizer's own."""
    eos_token: Token | None = None
    """Put after every text document; null takes ``<|end_of_text|>`` where there is one, else the tokenizer's own."""
    add_bos: bool = True
    """Begin documents with ``bos_token``."""
    add_eos: bool = True
    """End documents with ``eos_token``."""
    chat_template: Name | None = None
    """Jinja file whose ``{% generation %}`` blocks mark what is trained on; null takes Llama-3's, built in."""
    chat_date: date | None = None
    """What a chat template that asks for today's date is told, as 2024-07-26; null refuses such templates."""
    library: Literal["auto", "tokenizers", "fast"] = "auto"
    """tokenizers is the reference; fast is the quicker library; auto takes fast where it gives the same ids."""


class Packing(StrEnum):
    """How documents become rows."""

    CONCAT = "concat"
    SPLIT = "split"
    INTACT = "intact"
    BEST_FIT = "best_fit"


class RowSet(Section):
    """One directory of packed rows."""

    path: Name
    """Directory below ``output``."""
    domain: Name
    """Documents that go in; several domains joined by + give rows in turn."""
    seq_length: RowTokens
    """Tokens per row."""
    packing: Packing | None = None
    """concat, split, intact or best_fit; null takes split with ``document_length``, intact for conversations, else
    concat."""
    document_length: RowTokens | None = None
    """split: cut long documents into pieces of exactly this length and drop what is shorter."""
    max_rows: Count | None = None
    """Stop after this many rows."""
    split: Literal["train", "validation"] = "train"
    """validation holds documents that no training row contains."""


class PreparedStage(Section):
    """A stage that the rows are for; the data card compares what there is with what it takes."""

    data: DataConfig
    """The stage's data section."""
    tokens: Size
    """Tokens the stage trains on."""


class PrepareConfig(Section):
    """The configuration of ``scripts/prepare_data.py``."""

    output: Name
    """Directory to write: ``tokenizer/``, one MDS directory per row set, ``manifest.json``, the data card."""
    seed: Seed = 42
    """Seed of the order of documents and of what is held out."""
    workers: Annotated[int, Field(gt=0, le=4096)] | None = None
    """Processes; null takes one per core. Changes nothing in the result. No machine has 4096 cores to fill."""
    sources: list[SourceConfig] = Field(min_length=1)
    tokenizer: TokenizerConfig
    shuffle: bool = False
    """Draw the order of each domain's documents from the seed; false keeps the order of the sources."""
    validation_fraction: Fraction = 0.0
    """Share of the groups that are held out, in all domains at once."""
    row_sets: list[RowSet] = Field(min_length=1)
    compression: Literal["none", "zstd"] = "none"
    """zstd halves the directory; reading then needs a cache of the decompressed shards."""
    shard_bytes: Annotated[int, BeforeValidator(parse_size), Field(ge=1024, lt=2**32)] = 64 * 2**20
    """Largest shard. Its rows are found by 32-bit offsets. Smaller than 1K each row would be a file."""
    cache: Name | None = None
    """Directory for copies of remote and compressed shards; null takes one in ``$TMPDIR``."""
    stages: dict[Name, PreparedStage] = Field(default_factory=dict)
    """Stages that train on these rows, for the data card."""
