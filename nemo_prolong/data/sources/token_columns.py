"""Token ids that come with columns about them: which tokens are targets, which are padding, where documents begin.

Whatever of this a record says is followed, or the record is refused. The columns are those that TRL, transformers,
Together and Megatron write. ``mask[i]`` and ``labels[i]`` are about token ``i``, not about the one after it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nemo_prolong.data.sources.rejection import BadDocument

INPUT_IDS = "input_ids"
MASKS = ("mask", "loss_mask", "completion_mask", "assistant_masks")
"""1 on tokens that are targets."""
LABELS, ATTENTION_MASK, POSITION_IDS = "labels", "attention_mask", "position_ids"
LENGTHS = ("length", "num_tokens")
PACKED = ("seq_lengths", "cu_seqlens")
"""Columns of rows that hold several documents."""
TOKEN_COLUMNS = (*MASKS, LABELS, ATTENTION_MASK, POSITION_IDS, *LENGTHS, *PACKED)
"""Columns that are read beside token ids, where there are any."""
IGNORED_LABEL = -100
"""The label of torch's and transformers' losses for a token that is no target."""
_REMEDY = "Write the row again."

Integers = NDArray[np.integer[Any]]
Spans = Sequence[tuple[int, int]]


def tokens_of(value: Any, beside: Mapping[str, Any], name: str = INPUT_IDS) -> tuple[Integers, Integers | None]:
    """Return the tokens of a document, integers [T], without padding, and its mask, uint8 [T], or None.

    Args:
        value: The tokens.
        beside: Those of ``TOKEN_COLUMNS`` that the record has.
        name: Column of the tokens.

    Raises:
        BadDocument: If the tokens are none, there are several documents, or the columns contradict each other.
    """
    ids = checked_ids(value, name)
    mask = mask_of(ids, beside)
    kept = _without_padding(beside.get(ATTENTION_MASK), len(ids))
    check_length(beside, len(ids), kept.stop - kept.start)
    ids = ids[kept]
    check_bounds(beside, [(0, len(ids))])
    check_positions(beside, [(0, len(ids))], kept)
    return ids, None if mask is None else mask[kept]


def checked_ids(value: Any, name: str = INPUT_IDS) -> Integers:
    """Return token ids, integers [T] with T > 0.

    Raises:
        BadDocument: If they are none.
    """
    ids = np.asarray(value)
    if ids.shape == (0,):
        raise BadDocument("empty_document", f"has no token in its {name}.", "Remove it.")
    if ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer):
        rule = f"has {name} of shape {list(ids.shape)} and type {ids.dtype}, not integers [tokens]."
        raise BadDocument("wrong_type", rule, _REMEDY)
    return ids


def mask_of(ids: Integers, beside: Mapping[str, Any]) -> Integers | None:
    """Return which tokens are targets, uint8 [T]; None where no column says.

    Args:
        ids: The tokens, [T].
        beside: Masks of 0 and 1, and labels, which are the tokens or -100.

    Raises:
        BadDocument: If a column is not about these tokens, or two of them say different things.
    """
    found = {column: _checked_mask(beside[column], column, len(ids)) for column in MASKS if column in beside}
    if LABELS in beside:
        found[LABELS] = _mask_of_labels(beside[LABELS], ids)
    if not found:
        return None
    (first, mask), *others = found.items()
    for column, other in others:
        if not np.array_equal(mask, other):
            place = int(np.flatnonzero(mask != other)[0])
            rule = f"has {first} and {column} that differ at token {place} in whether it is a target."
            raise BadDocument(
                "contradiction", rule, f"Keep one of them, or leave one unread: ignore_fields=[{column}]."
            )
    return mask


def check_length(beside: Mapping[str, Any], *lengths: int) -> None:
    """Check that columns that count the tokens give one of ``lengths``, with padding or without it.

    Raises:
        BadDocument: If one does not.
    """
    for column in LENGTHS:
        if column in beside and beside[column] not in lengths:
            rule = f"says {column}={beside[column]} and has {lengths[-1]} tokens."
            raise BadDocument("wrong_length", rule, _REMEDY)


def check_unpadded(beside: Mapping[str, Any], num_tokens: int) -> None:
    """Check that no token of a packed row is padding.

    Raises:
        BadDocument: If one is.
    """
    kept = _without_padding(beside.get(ATTENTION_MASK), num_tokens)
    if kept != slice(0, num_tokens):
        rule = f"has padding in a packed row, by its {ATTENTION_MASK}."
        raise BadDocument("bad_mask", rule, "Write rows without padding.")


def check_bounds(beside: Mapping[str, Any], spans: Spans) -> None:
    """Check that columns that count the documents of a row count those that are read.

    Args:
        beside: May have ``cu_seqlens``, where documents begin and end, and ``seq_lengths``, their lengths.
        spans: (start, end) of the documents.

    Raises:
        BadDocument: If they count others.
    """
    bounds, lengths = [0, *(stop for _, stop in spans)], [stop - start for start, stop in spans]
    for column in PACKED:
        if column in beside and np.asarray(beside[column]).reshape(-1).tolist() not in (bounds, lengths):
            rule = f"holds other documents by its {column} than the {len(spans)} that are read."
            raise BadDocument("bad_spans", rule, _one_document(column))


def check_positions(beside: Mapping[str, Any], spans: Spans, kept: slice = slice(None)) -> None:
    """Check that positions count from 0 in every document, as training counts them.

    Args:
        beside: May have ``position_ids``.
        spans: (start, end) of the documents, counted in what is kept.
        kept: Tokens of the row that are no padding.

    Raises:
        BadDocument: If they do not.
    """
    if POSITION_IDS not in beside:
        return
    expected = np.concatenate([np.arange(stop - start) for start, stop in spans])
    if not np.array_equal(np.asarray(beside[POSITION_IDS]).reshape(-1)[kept], expected):
        rule = f"has {POSITION_IDS} that do not count every document from 0, and {len(spans)} are read."
        raise BadDocument("bad_spans", rule, _one_document(POSITION_IDS))


def _one_document(column: str) -> str:
    return (
        "Write one document a row, or packed rows as MDS with indices (format=packed_mds). Or leave the column unread: "
        f"ignore_fields=[{column}]."
    )


def _checked_mask(value: Any, column: str, num_tokens: int) -> Integers:
    mask = np.asarray(value)
    if mask.shape != (num_tokens,):
        rule = f"has a {column} of shape {list(mask.shape)} for {num_tokens} tokens."
        raise BadDocument("bad_mask", rule, _REMEDY)
    if mask.dtype == object or not np.isin(mask, (0, 1)).all():
        # Packers are known that write the ids of BOS and EOS into it.
        odd = next(entry for entry in mask.tolist() if entry not in (0, 1))
        raise BadDocument("bad_mask", f"has {odd} in its {column}, which is of 0 and 1.", _REMEDY)
    return mask.astype(np.uint8)


def _mask_of_labels(value: Any, ids: Integers) -> Integers:
    labels = np.asarray(value)
    if labels.shape != ids.shape or not np.issubdtype(labels.dtype, np.integer):
        rule = f"has labels of shape {list(labels.shape)} and type {labels.dtype} for {len(ids)} tokens."
        raise BadDocument("bad_mask", rule, _REMEDY)
    targets = labels != IGNORED_LABEL
    wrong = np.flatnonzero(targets & (labels != ids))
    if len(wrong):
        place = int(wrong[0])
        rule = f"has the label {labels[place]} at token {place}, which is {ids[place]}."
        remedy = f"Write labels that are the tokens themselves, not shifted, and {IGNORED_LABEL} on what is no target."
        raise BadDocument("bad_mask", rule, remedy)
    return np.asarray(targets, np.uint8)


def _without_padding(value: Any, num_tokens: int) -> slice:
    """Return the tokens between the padding on both sides."""
    if value is None:
        return slice(0, num_tokens)
    places = np.flatnonzero(_checked_mask(value, ATTENTION_MASK, num_tokens))
    if not len(places):
        raise BadDocument("empty_document", f"has no token but padding, by its {ATTENTION_MASK}.", "Remove it.")
    start, stop = int(places[0]), int(places[-1]) + 1
    if stop - start != len(places):
        rule = f"has tokens within it that its {ATTENTION_MASK} hides."
        raise BadDocument("bad_mask", rule, "Write the tokens without those.")
    return slice(start, stop)
