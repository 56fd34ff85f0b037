"""One record (a JSON object, a table row) to one document: which fields it needs and what they must hold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nemo_prolong.config.schema.prepare import SourceConfig
from nemo_prolong.data.conversation import Conversation, Message
from nemo_prolong.data.sources.base import Document
from nemo_prolong.data.sources.rejection import BadDocument

_NAMED_FIELDS = 12
"""Fields that an error lists at most."""
_KINDS = {
    type(None): "null",
    bool: "a truth value",
    int: "a number",
    float: "a number",
    str: "text",
    bytes: "bytes",
    list: "a list",
    dict: "an object",
}


@dataclass(frozen=True)
class Fields:
    """Names of the fields that make a document.

    Attributes:
        text: Field of the text; unused where there are messages.
        messages: Field of the conversation, or None.
        group: Field of the group, or None.
    """

    text: str
    messages: str | None
    group: str | None

    @classmethod
    def of(cls, source: SourceConfig) -> Fields:
        """Return the fields that ``source`` names."""
        return cls(source.text_field, source.messages_field, source.group_field)

    @property
    def content(self) -> str:
        """Field of what the document says."""
        return self.messages or self.text

    @property
    def names(self) -> list[str]:
        """Every field that is read, without repetition."""
        return list(dict.fromkeys(name for name in (self.content, self.group) if name is not None))

    def document(self, record: Any, key: str) -> Document:
        """Return the document of ``record``.

        Args:
            record: What the file holds; a mapping if it is right.
            key: Key of the document, and its group where there is no field for it.

        Raises:
            BadDocument: If the record has no such field, one of another type, or nothing in it.
        """
        if not isinstance(record, Mapping):
            raise BadDocument(
                "wrong_type", f"holds {kind_of(record)}, not an object.", "Write one object per document."
            )
        group = key if self.group is None else _group(field_of(record, self.group), self.group)
        value = field_of(record, self.content)
        if self.messages is not None:
            return Document(key, group, conversation=Conversation(_messages(value, self.messages)))
        if not isinstance(value, str):
            rule = f"has {kind_of(value)} in its field {self.text!r}, not text."
            raise BadDocument("wrong_type", rule, "Name the field of the text: text_field=...")
        if not value:
            raise BadDocument("empty_document", f"has no text in its field {self.text!r}.", "Remove it.")
        return Document(key, group, pieces=(value,))


def field_of(record: Mapping[str, Any], name: str) -> Any:
    """Return a field of a record.

    Raises:
        BadDocument: If there is none of this name; the message lists those there are.
    """
    try:
        return record[name]
    except KeyError:
        rule = f"has no field {name!r}; its fields are {listed(record)}."
        raise BadDocument("missing_field", rule, "Name the right field in the source.") from None


def listed(names: Any) -> str:
    """Return names for a message, the first few of many."""
    names = [str(name) for name in names]
    shown = ", ".join(names[:_NAMED_FIELDS]) or "none"
    return shown if len(names) <= _NAMED_FIELDS else f"{shown} and {len(names) - _NAMED_FIELDS} more"


def kind_of(value: Any) -> str:
    """Return what a value is, in the words of a message."""
    return _KINDS.get(type(value), f"a {type(value).__name__}")


def check_encodable(document: Document) -> None:
    r"""Check that text has no lone surrogates, which JSON can write (``"\ud800"``) and UTF-8 cannot.

    Args:
        document: A document whose pieces are a sequence.

    Raises:
        BadDocument: If it has.
    """
    texts = [document.group, *(document.pieces or ())]
    texts += document.conversation.texts() if document.conversation else ()
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            rule = f"has half of a surrogate pair, {text[error.start]!a}, as character {error.start} of a text."
            raise BadDocument("invalid_utf8", rule, "Write whole characters.") from error


def _group(value: Any, name: str) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int):
        rule = f"has {kind_of(value)} in its field {name!r}, which is to name its group."
        raise BadDocument("wrong_type", rule, "Name a field that holds text or whole numbers: group_field=...")
    return str(value)


def _messages(value: Any, name: str) -> list[Message]:
    if not isinstance(value, list):
        rule = f"has {kind_of(value)} in its field {name!r}, not a list of messages."
        raise BadDocument("wrong_type", rule, "Name the field of the messages: messages_field=...")
    if not value:
        raise BadDocument("empty_document", f"has no message in its field {name!r}.", "Remove it.")
    return [_message(message, number) for number, message in enumerate(value)]


def _message(message: Any, number: int) -> dict[str, str]:
    if not isinstance(message, Mapping):
        rule = f"has {kind_of(message)} as message {number}, not an object with role and content."
        raise BadDocument("wrong_type", rule, "Write messages as {role, content}.")
    for part in ("role", "content"):
        if part not in message:
            rule = f"has no {part!r} in message {number}, only {listed(message)}."
            raise BadDocument("missing_field", rule, "Write messages as {role, content}.")
        if not isinstance(message[part], str):
            rule = f"has {kind_of(message[part])} as {part!r} of message {number}, not text."
            raise BadDocument("wrong_type", rule, "Write role and content as text.")
    return {"role": message["role"], "content": message["content"]}
