"""Which messages are trained on, as data sets say it: a weight of 0 or 1 beside a message, or beside all of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nemo_prolong.data.sources.rejection import BadDocument

WEIGHT_KEYS = ("weight", "train", "training", "loss", "loss_weight", "trainable", "train_on_turn")
"""Keys that say 1 for what is trained on and 0 for what is not. ``weight`` is that of OpenAI, Together and Mistral,
``train``, ``training`` and ``train_on_turn`` are of axolotl's data, ``loss`` of ms-swift and XTuner, ``loss_weight`` of
LLaMA-Factory, ``trainable`` of Tinker."""
UNCLEAR_KEYS = frozenset(
    {"mask", "masked", "masks", "loss_mask", "loss_scale", "train_detail", "training_detail", "labels"}
)
"""Keys that say it for parts of a message, or of which 1 means this to one tool and that to another."""


def weight_of(holder: Mapping[str, Any], what: str) -> bool | None:
    """Return whether a message or a record is to be trained on; None where it does not say.

    Args:
        holder: The message or the record; null says nothing.
        what: What it is, for messages.

    Raises:
        BadDocument: If a weight is another value than 0 and 1, or two of them contradict each other.
    """
    found = {key: _checked(holder[key], key, what) for key in WEIGHT_KEYS if holder.get(key) is not None}
    if len(set(found.values())) > 1:
        said = " and ".join(f"{key}={holder[key]!r}" for key in found)
        raise BadDocument("contradiction", f"has {said} in {what}.", "Keep one of them.")
    return next(iter(found.values()), None)


def _checked(value: Any, key: str, what: str) -> bool:
    if not isinstance(value, bool | int | float) or value not in (0, 1):
        raise BadDocument(
            "bad_weight",
            f"has {key}={value!r:.40} in {what}, and the loss is a sum over whole tokens.",
            "Write 0 or 1, or false or true.",
        )
    return bool(value)
