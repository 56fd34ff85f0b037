"""One record (a JSON object, a table row) to one document: which fields it needs and what they must hold."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any

from nemo_prolong.config.schema.prepare import SourceConfig
from nemo_prolong.data.conversation import Conversation
from nemo_prolong.data.sources.base import Document, Unread
from nemo_prolong.data.sources.messages import MessageReader, Weighted, pair, said, with_system
from nemo_prolong.data.sources.rejection import BadDocument, kind_of, listed, printable
from nemo_prolong.data.sources.strict_json import check_encodable
from nemo_prolong.data.sources.template_values import DOCUMENTS, TEMPLATE_KWARGS, TOOLS, variables_of
from nemo_prolong.data.sources.token_columns import TOKEN_COLUMNS, tokens_of
from nemo_prolong.data.sources.training_weights import WEIGHT_KEYS, weight_of

SYSTEM = "system"
_BESIDE_MESSAGES = (SYSTEM, TOOLS, DOCUMENTS, TEMPLATE_KWARGS, *WEIGHT_KEYS)
"""Fields that are read beside messages, where a record has them."""
_COUNTED_NAMES = 200
"""Names of unread fields that a unit counts; a corpus may use keys as if they were values."""
OTHER_NAMES = "(further names)"
_Content = dict[str, Any]
"""What a document is made of, as arguments of ``Document``."""


class RecordReader:
    """Reads the records of one unit.

    Args:
        source: Names the fields.
        unread: Counts what is not read.

    Attributes:
        contents: Fields of what a document says.
        beside: Fields that are read where there are any.
    """

    def __init__(self, source: SourceConfig, unread: Unread) -> None:
        self.contents, beside = _fields(source)
        ignored = set(source.ignore_fields)
        self.beside = tuple(name for name in beside if name not in ignored and name not in self.contents)
        self._source = source
        self._group_field = source.group_field
        self._unread = unread.columns
        self._messages = MessageReader(source.on_unknown_key == "drop", unread.keys)
        named = self.contents if source.group_field is None else (*self.contents, source.group_field)
        self._needed = tuple(dict.fromkeys(named))
        self._read = {part for name in self._needed for part in (name, root_of(name))} | set(self.beside)

        self._content = self._reader()

    @property
    def needed(self) -> tuple[str, ...]:
        """Fields that every record has."""
        return self._needed

    def document(self, record: Any, key: str) -> Document:
        """Return the document of ``record``.

        Args:
            record: What the file holds; a mapping if it is right.
            key: Key of the document, and its group where there is no field for it.

        Raises:
            BadDocument: If the record has no such field, one of another type, or nothing in it.
        """
        if type(record) is not dict:  # tables and parsers give nothing else
            raise BadDocument(
                "wrong_type", f"holds {kind_of(record)}, not an object.", "Write one object per document."
            )
        group = key if self._group_field is None else _group(field_of(record, self._group_field), self._group_field)
        content = self._content(record)
        read, unread = self._read, self._unread
        for name, value in record.items():
            if name not in read and value is not None:
                if name in unread:
                    unread[name] += 1
                else:
                    self._count_new(name)
        return Document(key, group, **content)

    def is_unread(self, name: str) -> bool:
        """Return whether a field is left unread."""
        return name not in self._read

    def _count_new(self, name: str) -> None:
        # A corpus may use keys as if they were values.
        self._unread[printable(name) if len(self._unread) < _COUNTED_NAMES else OTHER_NAMES] += 1

    def _reader(self) -> Callable[[dict[str, Any]], _Content]:
        """Return what makes a document of a record, chosen once."""
        source = self._source
        if source.tokens_field is not None:
            return partial(self._tokens, source.tokens_field)
        if source.prompt_field is not None and source.completion_field is not None:
            return partial(self._conversation, partial(self._pair, source.prompt_field, source.completion_field))
        if source.messages_field is not None:
            return partial(self._conversation, partial(self._listed, source.messages_field))
        return partial(_text, source.text_field)

    def _beside(self, record: Mapping[str, Any]) -> dict[str, Any]:
        return {name: record[name] for name in self.beside if name in record and record[name] is not None}

    def _tokens(self, name: str, record: dict[str, Any]) -> _Content:
        ids, mask = tokens_of(field_of(record, name), self._beside(record), name)
        return {"input_ids": ids, "mask": mask}

    def _conversation(self, said_in: Callable[[dict[str, Any]], Weighted], record: dict[str, Any]) -> _Content:
        read, beside = said_in(record), self._beside(record)
        if not beside:
            return {"conversation": Conversation(read.messages, read.trained)}
        if weight_of(beside, "its fields") is False:
            rule = "has a weight of 0 beside its messages, so nothing of it is to be learned."
            raise BadDocument("bad_weight", rule, "Remove it.")
        read = with_system(beside.get(SYSTEM), read)
        return {"conversation": Conversation(read.messages, read.trained, variables_of(beside))}

    def _listed(self, name: str, record: dict[str, Any]) -> Weighted:
        return self._messages.read(field_of(record, name), name)

    def _pair(self, prompt: str, completion: str, record: dict[str, Any]) -> Weighted:
        return pair(self._side(record, prompt, "user"), self._side(record, completion, "assistant"))

    def _side(self, record: Mapping[str, Any], name: str, role: str) -> Weighted:
        """Return one side of a pair: messages, or a text, which is one message."""
        value = field_of(record, name)
        if not isinstance(value, str):
            return self._messages.read(value, name)
        if not value:
            raise BadDocument("empty_document", f"has no text in its field {name!r}.", "Remove it.")
        return said(role, value)


def field_of(record: Mapping[str, Any], name: str) -> Any:
    """Return a field of a record; ``a.b`` is the field ``b`` in the object ``a``, if no field is called so.

    Raises:
        BadDocument: If there is none of this name; the message lists those there are.
    """
    if name in record:
        return record[name]
    head, dot, rest = name.partition(".")
    if dot and isinstance(record.get(head), Mapping):
        return field_of(record[head], rest)
    rule = f"has no field {name!r}; its fields are {listed(record)}."
    raise BadDocument("missing_field", rule, "Name the right field in the source.")


def root_of(name: str) -> str:
    """Return the field of the record that holds ``a.b``, which is ``a``."""
    return name.partition(".")[0]


def check_document(document: Document) -> None:
    r"""Check that its text has no lone surrogates, which JSON can write (``"\ud800"``) and UTF-8 cannot.

    Args:
        document: A document whose pieces are a sequence. Keys of objects in it are checked where they are read.

    Raises:
        BadDocument: If it has.
    """
    check_encodable(document.group)
    for text in document.pieces or ():
        check_encodable(text)
    for text in document.conversation.texts() if document.conversation else ():
        check_encodable(text)


def _fields(source: SourceConfig) -> tuple[tuple[str, ...], Collection[str]]:
    """Return the fields of what documents say, and those that are read beside them."""
    if source.tokens_field is not None:
        return (source.tokens_field,), TOKEN_COLUMNS
    if source.prompt_field is not None and source.completion_field is not None:
        return (source.prompt_field, source.completion_field), _BESIDE_MESSAGES
    if source.messages_field is not None:
        return (source.messages_field,), _BESIDE_MESSAGES
    return (source.text_field,), ()


def _text(name: str, record: dict[str, Any]) -> _Content:
    value = field_of(record, name)
    if not isinstance(value, str):
        rule = f"has {kind_of(value)} in its field {name!r}, not text."
        raise BadDocument("wrong_type", rule, "Name the field of the text: text_field=...")
    if not value:
        raise BadDocument("empty_document", f"has no text in its field {name!r}.", "Remove it.")
    return {"pieces": (value,)}


def _group(value: Any, name: str) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int):
        rule = f"has {kind_of(value)} in its field {name!r}, which is to name its group."
        raise BadDocument("wrong_type", rule, "Name a field that holds text or whole numbers: group_field=...")
    return str(value)
