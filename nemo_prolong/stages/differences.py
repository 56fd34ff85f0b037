"""What may differ between the start of a run and its continuation, and what of that must be named."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic_core import to_jsonable_python

from nemo_prolong.config.keys import section_at
from nemo_prolong.config.schema import RunConfig, Section
from nemo_prolong.errors import ConfigError
from nemo_prolong.records.stage_manifest import SettingChange

_FREE = ("runs_dir", "parallelism", "tracker", "checkpoint", "cluster", "launch", "resume")
_FREE_WITHIN = {
    "data": ("num_workers", "cache"),
    "precision": ("recompute",),
    "train": ("log_every_n_steps", "val_check_interval", "limit_val_batches"),
    "faults": ("max_skipped_in_a_row", "max_steps_without_targets", "hang_seconds", "planned_step_seconds"),
}
"""What has no part in which rows are trained on, nor in what they do to the weights."""

_ORDER = "it decides which rows come at which step, and rows were trained on already"
_TENSORS = "the tensors of the checkpoints have the shapes and formats that it decides"
_IDENTITY = "it says which run this is"
_FIXED = {
    **dict.fromkeys(("stage", "name", "transition"), _IDENTITY),
    **dict.fromkeys(("seed", "seq_length", "data.mixture", "data.apply_instruct_masks"), _ORDER),
    **dict.fromkeys(("train.global_batch_size", "train.micro_batch_size"), _ORDER),
    **dict.fromkeys(("precision.compute", "optim.use_distributed_optimizer"), _TENSORS),
    "model": _TENSORS,
}
_NOT_FIXED = (
    "model.name",
    "model.license",
    "model.rotary_base",
    "model.rope_scaling",
    "model.layernorm_epsilon",
    "model.init_method_std",
)


def differences(stored: dict[str, Any], cfg: dict[str, Any], step: int) -> list[SettingChange]:
    """Return what decides the training and is not as it was.

    Args:
        stored: Configuration of the run in plain JSON types, perhaps of a version that had fewer keys.
        cfg: Configuration of its continuation.
        step: Optimizer steps done.
    """
    old, new = _decisive(with_defaults(stored, RunConfig)), _decisive(cfg)
    return [SettingChange(step=step, key=key, before=old, after=new) for key, old, new in differing(old, new)]


def with_defaults(stored: dict[str, Any], section: type[Section]) -> dict[str, Any]:
    """Return a stored section with the defaults of keys that were added to the schema since it was stored.

    Args:
        stored: The section in plain JSON types.
        section: Its schema.
    """
    filled = dict(stored)
    for name, field in section.model_fields.items():
        if name not in stored:
            if not field.is_required():
                filled[name] = to_jsonable_python(field.get_default(call_default_factory=True))
            continue
        inner, value = section_at(section, (name,)), stored[name]
        if inner is not None and isinstance(value, dict):
            filled[name] = with_defaults(value, inner)
        elif inner is not None and isinstance(value, list):
            filled[name] = [with_defaults(entry, inner) if isinstance(entry, dict) else entry for entry in value]
    return filled


def differing(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[tuple[str, Any, Any]]:
    """Return the dotted keys whose values differ, with both values."""
    found: list[tuple[str, Any, Any]] = []
    for key in sorted(old.keys() | new.keys()):
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            found += differing(before, after, f"{prefix}{key}.")
        elif before != after:
            found.append((f"{prefix}{key}", before, after))
    return found


def not_allowed(changes: Sequence[SettingChange], allow: Sequence[str]) -> list[SettingChange]:
    """Return the changes that are not named in ``resume.allow``, by their key or by a section around it."""
    return [change for change in changes if not any(is_within(change.key, name) for name in allow)]


def check_changeable(changes: Sequence[SettingChange]) -> None:
    """Refuse changes that a run cannot be continued with once it has a checkpoint, whoever names them.

    Raises:
        ConfigError: With the key and the reason.
    """
    for change in unchangeable(changes):
        raise ConfigError(
            f"resume.allow=[{change.key}]",
            f"{change} cannot be allowed: {_reason_against(change.key)}.",
            "Keep the old value, or start a new stage from a complete run with parent=....",
        )


def unchangeable(changes: Sequence[SettingChange]) -> list[SettingChange]:
    """Return the changes that a run with a checkpoint cannot be continued with."""
    return [change for change in changes if _reason_against(change.key) is not None]


def is_within(key: str, section: str) -> bool:
    """Return whether a dotted key is a section or lies in it."""
    return key == section or key.startswith(f"{section}.")


def _reason_against(key: str) -> str | None:
    if any(is_within(key, free) for free in _NOT_FIXED):
        return None
    return next((reason for fixed, reason in _FIXED.items() if is_within(key, fixed)), None)


def _decisive(config: dict[str, Any]) -> dict[str, Any]:
    """Return the configuration without what may always differ."""
    kept = {key: value for key, value in config.items() if key not in _FREE}
    for section, keys in _FREE_WITHIN.items():
        kept[section] = {key: value for key, value in kept[section].items() if key not in keys}
    return kept
