"""Every field of every schema refuses what could only be a mistake; what is accepted is listed with its reason."""

from __future__ import annotations

import json
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from nemo_prolong.config.compose import compose
from nemo_prolong.config.defaults import ENTRY_POINTS
from nemo_prolong.config.schema import MlflowConfig, RunConfig, Section, WandbConfig
from nemo_prolong.config.schema.base import Section as Base
from nemo_prolong.errors import ConfigError

PROBES: dict[type, list[Any]] = {
    str: ["", "a\nb", "a\x00b", "\x1b[31m", "x" * 5000, True, 1.5],
    int: [-1, 10**18, 2**64, True, 1.5, ""],
    float: [float("nan"), float("inf"), -1.0, 1e30, 1e300, True, ""],
    bool: [0, 1, "true", ""],
}
"""What a field of a kind is tried with, as it comes from JSON."""

ACCEPTED: dict[str, str] = {
    "SourceConfig.domain=''": "a rule says what a domain is",
    "SourceConfig.path=''": "an installation lies nowhere; a rule asks the others for a path",
    "ModelConfig.license=''": "the licence is not known",
    **dict.fromkeys(
        (f"{section}.seed={10**18}" for section in ("RunConfig", "PrepareConfig", "EvaluateConfig")),
        "a seed is any number of 63 bits",
    ),
    **dict.fromkeys(
        (
            f"TokenizerConfig.{name}_token={text!r}"
            for name in ("bos", "eos")
            for text in ("a\nb", "a\x00b", "\x1b[31m")
        ),
        "a token may be any characters",
    ),
    **dict.fromkeys(
        (f"ModelConfig.{name}={text!r}" for name in ("name", "license") for text in ("a\nb", "a\x00b", "\x1b[31m")),
        "it is in the manifests of runs, and escaped wherever it is shown",
    ),
}
"""What is no mistake, and why. Sizes of bytes and tokens reach 2**60, which is above 10**18."""

SIZES = ("max_bytes", "train_bytes", "max_shard_bytes", "tokens")


def sections() -> list[type[Section]]:
    """Return every section that can be in a configuration."""
    found: dict[str, type[Section]] = {}

    def visit(section: type[Section]) -> None:
        if section.__name__ in found:
            return
        found[section.__name__] = section
        for field in section.model_fields.values():
            for kind in kinds(field.annotation):
                if isinstance(kind, type) and issubclass(kind, Base):
                    visit(kind)

    for schema in (*ENTRY_POINTS.values(), WandbConfig, MlflowConfig):
        visit(schema)
    return list(found.values())


def kinds(annotation: Any) -> Iterator[Any]:
    """Yield the types that an annotation is made of, those in lists and dicts too."""
    if typing.get_origin(annotation) is typing.Annotated:
        yield from kinds(typing.get_args(annotation)[0])
    elif typing.get_origin(annotation) in (typing.Union, types.UnionType, list, dict):
        for member in typing.get_args(annotation):
            yield from kinds(member)
    else:
        yield annotation


def probes() -> Iterator[tuple[type[Section], str, Any]]:
    for section in sections():
        for name, field in section.model_fields.items():
            is_list = any(
                typing.get_origin(kind) is list for kind in (field.annotation, *typing.get_args(field.annotation))
            )
            for kind in set(kinds(field.annotation)) & set(PROBES):
                for value in PROBES[kind]:
                    yield section, name, [value] if is_list else value


def is_accepted(section: type[Section], name: str, value: Any) -> bool:
    """Return whether a field takes a value, whatever else its section lacks."""
    try:
        section.model_validate_json(json.dumps({name: value}), strict=True)
    except ValidationError as error:
        return not any(detail["loc"][0] == name for detail in error.errors())
    return True


@pytest.mark.parametrize("section", sections(), ids=lambda section: section.__name__)
def test_a_field_refuses_what_could_only_be_a_mistake(section: type[Section]) -> None:
    taken = [
        f"{section.__name__}.{name}={value!r}"
        for owner, name, value in probes()
        if owner is section and is_accepted(section, name, value) and not (name in SIZES and value == 10**18)
    ]
    assert [item for item in taken if item not in ACCEPTED] == []


def test_the_list_of_what_is_accepted_is_no_longer_than_it_must_be() -> None:
    taken = {
        f"{section.__name__}.{name}={value!r}" for section, name, value in probes() if is_accepted(section, name, value)
    }
    assert sorted(set(ACCEPTED) - taken) == []
    assert all(len(reason) > 10 for reason in ACCEPTED.values())


def test_every_section_is_tried() -> None:
    names = {section.__name__ for section in sections()}
    assert {
        "RunConfig",
        "MixtureEntry",
        "RopeScaling",
        "MlflowConfig",
        "RowSet",
        "RecipeStage",
        "ReportConfig",
    } <= names
    tried = {(section.__name__, name) for section, name, _ in probes()}
    untried = {
        f"{section.__name__}.{name}"
        for section in sections()
        for name, field in section.model_fields.items()
        if (section.__name__, name) not in tried
        # Sections, and texts of which a few are allowed.
        and not all(
            kind is type(None) or typing.get_origin(kind) is typing.Literal or isinstance(kind, type)
            for kind in kinds(field.annotation)
        )
    }
    assert untried == set()


MESSAGES = {
    "optim.lr=1e30": "optim.lr=1e+30: must be at most 1.0. Set optim.lr=1.0 (peak learning rate).",
    "model.nemo_config=zzz": "model.nemo_config=zzz: must be one of LlamaConfig, Llama3Config8B. "
    "Set model.nemo_config=LlamaConfig (class of nemo.collections.llm that supplies everything not set here).",
    "data.root=''": "data.root=: must not be empty. "
    "Set data.root=TEXT (directory or s3:// address that holds the packed directories and the tokenizer).",
    "data.cache=''": "data.cache=: must not be empty. Set data.cache=null (local directory for copies of remote and "
    "compressed shards; null takes one in $TMPDIR).",
    "runs_dir=''": "runs_dir=: must not be empty. Set runs_dir=runs (directory that holds the runs).",
    'name="a\nb"': r"name=a\nb: has characters that end a line or control a terminal (use visible ones). "
    "Set name=a-b (directory of the run below runs_dir).",
    "data.validation=[a,b,a]": 'data.validation=["a", "b", "a"]: names \'a\' more than once (name each once). '
    "Set data.validation=[a,b] (directories of packed rows for the validation loss, relative to data.root).",
    "cluster.partition='a b'": "cluster.partition=a b: does not have the right form. "
    "Set cluster.partition=TEXT (slurm partition; null leaves it to the cluster).",
    "cluster.time_limit=43200": "cluster.time_limit=43200: does not have the right form. "
    "Set cluster.time_limit=04:00:00 (wall time of one job, HH:MM:SS or D-HH:MM:SS; the stage goes on in the next "
    "job).",
    "faults.hang_seconds=1e-9": "faults.hang_seconds=1e-09: must be at least 1.0. Set faults.hang_seconds=1.0 (time "
    "without the end of a step, a validation or a save after which a rank ends itself; null follows from the longest "
    "step).",
    "model.rotary_base=nan": "model.rotary_base=NaN: must be a finite number. "
    "Set model.rotary_base=X (roPE base (Hugging Face: rope_theta)).",
    "seed=18446744073709551616": "seed=18446744073709551616: must be less than 9223372036854775808. "
    "Set seed=9223372036854775807 (seed of initial weights and data order).",
    "seq_length=4T": "seq_length=4T: must be at most 1073741824. Set seq_length=1073741824 (tokens in one packed row).",
    "optim.adam_beta1=1.0": "optim.adam_beta1=1.0: must be less than 1.0. Set optim.adam_beta1=0.9.",
}


@pytest.mark.parametrize("override", MESSAGES)
def test_a_mistake_is_refused_with_a_value_that_would_do(override: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        compose(RunConfig, "train", ["+exp=mini/base", override])
    assert str(refusal.value) == MESSAGES[override]


NAMES = ["12345", "0123", "1e5", "1_000", "true", "1.10", "+5", "2026-01-01", "0x10", "nan"]


@pytest.mark.parametrize("text", NAMES)
def test_a_name_that_looks_like_a_number_stays_as_it_was_typed(text: str) -> None:
    overrides = ["+exp=mini/base", f"name={text}", f"data.validation=[{text}, x]", f"model.license='{text}'"]
    cfg = compose(RunConfig, "train", overrides)
    assert (cfg.name, cfg.data.validation, cfg.model.license) == (text, [text, "x"], text)


def test_a_file_takes_whole_numbers_for_names_and_asks_for_quotes(tmp_path: Path) -> None:
    experiment = tmp_path / "exp" / "mine.yaml"
    experiment.parent.mkdir()
    head = "# @package _global_\ndefaults: [mini/base]\n"
    arguments = ["--config-dir", str(tmp_path), "+exp=mine"]
    experiment.write_text(f"{head}cluster: {{account: 12345, time_limit: 04:00:00}}\n")
    assert compose(RunConfig, "train", arguments).cluster.account == "12345"
    experiment.write_text(f"{head}cluster: {{account: 1e5}}\n")
    with pytest.raises(ConfigError) as refusal:
        compose(RunConfig, "train", arguments)
    assert str(refusal.value) == (
        "cluster.account=100000.0: must be text, and a name that looks like a number goes in quotes. "
        'Set cluster.account="TEXT" (slurm account to charge; null leaves it to the cluster).'
    )
    experiment.write_text(f"{head}cluster: {{time_limit: 12:00:00}}\n")
    with pytest.raises(ConfigError) as refusal:
        compose(RunConfig, "train", arguments)
    assert "cluster.time_limit=43200: does not have the right form" in str(refusal.value)
