"""Say in the words of this project what Hydra or OmegaConf could not compose.

Hydra reports a misspelt group, file, key or experiment in different classes and formats, sometimes with the useful part
in ``__cause__``. Each becomes a ``ConfigError`` with what was typed, the rule, and what exists instead. The texts
matched here are Hydra 1.3's. ``tests/config`` provokes each of them, so that a change of wording is noticed.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import yaml
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf.errors import OmegaConfBaseException

from nemo_prolong.config.commands import typed
from nemo_prolong.config.experiments import EXPERIMENT_GROUP
from nemo_prolong.config.keys import location_of, nearest_name, unknown_key
from nemo_prolong.config.schema import Section
from nemo_prolong.errors import ConfigError

COMPOSITION_ERRORS = (HydraException, OmegaConfBaseException, yaml.YAMLError, ValueError)
"""What Hydra raises while it composes when the user, not the software, is wrong."""


def explain(error: Exception, schema: type[Section], overrides: Sequence[str], available: Sequence[str]) -> ConfigError:
    """Return ``error`` as a ``ConfigError``.

    Args:
        error: One of ``COMPOSITION_ERRORS``, raised by Hydra while composing.
        schema: Schema of the configuration, for the nearest key.
        overrides: What was typed on the command line.
        available: Names of the experiments for this script.
    """
    if isinstance(error, OverrideParseException):
        return _unreadable(error)
    if isinstance(error, MissingConfigException):
        return _missing_file(error, schema, overrides, available)
    if isinstance(error, yaml.MarkedYAMLError):
        return _bad_yaml(error)
    text = str(error).strip()
    known = _wrong_choice(text, schema, overrides, available) or _wrong_form(text, overrides)
    return known or _anything_else(error, overrides)


def _wrong_choice(
    text: str, schema: type[Section], overrides: Sequence[str], available: Sequence[str]
) -> ConfigError | None:
    """Explain a choice or key that is missing, unknown or given twice; None if ``text`` says something else."""
    if match := re.search(r"You must specify '(.+?)'", text):
        return _missing_choice(match[1], text, overrides, available)
    if match := re.search(r"Could not override '(.+?)'\.", text):
        return _no_such_key(match[1], text, schema, overrides, available)
    if match := re.search(r"Multiple values for (\w+)", text):
        typed = [override for override in overrides if override.lstrip("+").startswith(f"{match[1]}=")]
        return ConfigError(" ".join(typed), f"only one {match[1]} can be chosen.", f"Keep one, e.g. {typed[0]}.")
    if match := re.search(r"An item is already at '(.+?)'", text):
        typed = [override.lstrip("+") for override in overrides if _key(override) == match[1]]
        return ConfigError(f"+{typed[0]}", "is set already; the plus adds what is not there.", f"Type {typed[0]}.")
    return None


def _wrong_form(text: str, overrides: Sequence[str]) -> ConfigError | None:
    """Explain a value written in a wrong form; None if ``text`` says something else."""
    if "Config group override must be a string" in text:
        numbers = [override for override in overrides if re.fullmatch(r"\+?\w+=([\d.]+|true|false|null)", override)]
        return ConfigError(" ".join(numbers or overrides), "a group is chosen by the name of a file.", _see_help())
    if match := re.search(r"(?:argument|Sweep parameters) '(\+*)(.+?)=(.*?)'", text):
        fix = f"{match[1]}{match[2]}=[{match[3]}]"
        return ConfigError(f"{match[2]}={match[3]}", "a list is written in brackets.", f"Type '{fix}'.")
    return None


def _unreadable(error: OverrideParseException) -> ConfigError:
    reason = str(error.message).splitlines()[0].rstrip(".")
    key, equals, value = error.override.partition("=")
    fix = f"quote it: {typed(key, value)}" if equals else f"write {key}=VALUE"
    return ConfigError(error.override, f"is not an override Hydra can read ({reason}).", f"To set it, {fix}.")


def _missing_file(
    error: MissingConfigException, schema: type[Section], overrides: Sequence[str], available: Sequence[str]
) -> ConfigError:
    """Explain a group option or an experiment that has no file."""
    wanted = error.missing_cfg_file or ""
    group, _, name = wanted.rpartition("/")
    where = re.match(r"In '(.+?)'", str(error))
    if wanted.split("/")[0] == EXPERIMENT_GROUP:
        return _no_such_experiment(wanted.partition("/")[2], available)
    if not group:
        rule = str(error).strip().splitlines()[0].rstrip(".")
        return ConfigError(f"--config-name {name}" if name else "--config-path", f"{rule}.", _see_help())
    available = sorted(error.options or [])
    nearest = nearest_name(name, available)
    remedy = f"Did you mean {group}={nearest}? " if nearest else ""
    typed = any(override.lstrip("+") == f"{group}={name}" for override in overrides)
    place = f" (in conf/{where[1]}.yaml)" if where and not typed else ""
    return ConfigError(
        f"{group}={name}{place}",
        f"no such file in the group {group}.",
        f"{remedy}Available: {', '.join(available) or 'none'}.",
    )


def _no_such_experiment(name: str, available: Sequence[str]) -> ConfigError:
    nearest = nearest_name(name, available)
    remedy = f"Did you mean +exp={nearest}? " if nearest else ""
    return ConfigError(f"+exp={name}", "no such experiment.", f"{remedy}Available: {', '.join(available)}.")


def _missing_choice(group: str, text: str, overrides: Sequence[str], available: Sequence[str]) -> ConfigError:
    """Explain a group without a choice: as a rule nobody chose an experiment, or not in the right words."""
    if not any(override.startswith("+exp=") for override in overrides):
        for override in overrides:
            key, _, value = override.lstrip("+").partition("=")
            if key.split("/")[0] == EXPERIMENT_GROUP:
                return _experiment_without_plus(key, value, available)
            if value in available:
                return ConfigError(override, f"no such group as {key}.", f"Did you mean +exp={value}?")
        names = ", ".join(available)
        return ConfigError("+exp=???", "an experiment must be chosen.", f"Type +exp=NAME, one of: {names}.")
    options = ", ".join(line.strip() for line in text.partition("options:")[2].splitlines() if line.strip())
    return ConfigError(
        f"{group}=???", "the experiment does not choose it, and it has no default.", f"Type {group}= one of: {options}."
    )


def _no_such_key(
    key: str, text: str, schema: type[Section], overrides: Sequence[str], available: Sequence[str]
) -> ConfigError:
    """Explain ``key=value`` where no such key or group can be overridden."""
    value = next((o.partition("=")[2] for o in overrides if o.partition("=")[0] == key), None)
    if key.split("/")[0] == EXPERIMENT_GROUP and value is not None:
        return _experiment_without_plus(key, value, available)
    error = unknown_key(schema, location_of(key), value)
    if where := re.match(r"In '(.+?)'", text):
        return ConfigError(f"{error.what} (in conf/{where[1]}.yaml)", error.rule, error.remedy)
    return error


def _experiment_without_plus(key: str, value: str, available: Sequence[str]) -> ConfigError:
    """Explain ``exp=stage2``, and ``exp/mini=stage1`` with or without a plus."""
    name = "/".join([*key.split("/")[1:], value])
    if name not in available:
        return _no_such_experiment(name, available)
    rule = "an experiment is added to the configuration, which takes a plus sign."
    return ConfigError(f"{key}={value}", rule, f"Type +exp={name}.")


def _bad_yaml(error: yaml.MarkedYAMLError) -> ConfigError:
    mark = error.problem_mark
    place = f"{mark.name}:{mark.line + 1}" if mark else "a YAML file"
    return ConfigError(place, f"is not valid YAML: {error.problem}.", "Correct that line.")


def _anything_else(error: Exception, overrides: Sequence[str]) -> ConfigError:
    """Keep Hydra's own words; those of the cause are the better ones where there is a cause."""
    text = str(error).strip()
    reason = str(error.__cause__ or error).strip().splitlines()[0].rstrip(".")
    mentioned = [o for o in overrides if re.search(rf"(?<![\w.]){re.escape(_key(o))}(?![\w.])", text)]
    what = " ".join(mentioned or overrides) or "configuration"
    return ConfigError(what, f"{reason}.", _see_help())


def _key(override: str) -> str:
    """Return the key of an override without its prefix: ``seed`` of ``+seed=1`` and of ``~seed``."""
    return override.lstrip("+~").partition("=")[0]


def _see_help() -> str:
    return "Run the script with --help to see all groups and keys."
