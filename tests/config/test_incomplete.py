"""A configuration that lacks values is checked as far as it goes."""

from __future__ import annotations

import pytest
from omegaconf import OmegaConf

from nemo_prolong.config.findings import NothingGivenError
from nemo_prolong.config.incomplete import load_incomplete
from nemo_prolong.config.rules import check, findings
from nemo_prolong.config.schema import RunConfig
from nemo_prolong.config.schema.base import MissingValueError
from nemo_prolong.config.schema.prepare import PrepareConfig
from nemo_prolong.errors import ConfigError


@pytest.fixture
def load_lacking(compose_config):
    """A function from overrides of ``scripts/train.py`` to the typed configuration without what is ``???``."""
    return lambda *overrides: load_incomplete(compose_config("train", *overrides), RunConfig)


def test_a_complete_configuration_is_what_the_loader_makes_of_it(load_lacking, load_run):
    cfg = load_lacking("+exp=mini/stage2")
    assert type(cfg) is RunConfig and cfg == load_run("+exp=mini/stage2")


def test_what_is_given_is_typed_and_what_is_missing_cannot_be_read(load_lacking):
    cfg = load_lacking("+exp=stage1", "optim.lr=???", "train.train_iters=???")
    assert isinstance(cfg, RunConfig) and (cfg.seq_length, cfg.optim.min_lr) == (65_536, 1e-6)
    for read in (lambda: cfg.parent, lambda: cfg.optim.lr, lambda: cfg.train.train_iters):
        with pytest.raises(MissingValueError):
            read()
    with pytest.raises(AttributeError):
        _ = cfg.no_such_key


def test_a_list_with_an_incomplete_entry_counts_as_missing(load_lacking):
    cfg = load_lacking("+exp=mini/base", "data.mixture=[{path: code_by_repo-512, proportion: ???}]")
    with pytest.raises(MissingValueError, match="mixture"):
        _ = cfg.data.mixture
    assert cfg.data.validation == ["validation-512"]


def test_only_rules_that_need_a_missing_value_are_left_out(load_lacking):
    check(load_lacking("+exp=stage1", "optim.lr=???"))
    cfg = load_lacking("+exp=stage1", "optim.lr=???", "seq_length=65540", "train.micro_batch_size=2")
    assert [error.what for error in findings(cfg)] == ["train.micro_batch_size=2", "seq_length=65540"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("+optim.lrr=1", "optim.lrr=1: no such key in optim. Did you mean optim.lr=1?"),
        ("seed=-1", "seed=-1: must be at least 0. Set seed=0 (seed of initial weights and data order)."),
    ],
)
def test_a_wrong_value_is_refused_although_another_one_is_missing(override, message, load_lacking):
    with pytest.raises(ConfigError) as refusal:
        load_lacking("+exp=stage1", override)
    assert str(refusal.value) == message


def test_an_empty_preparation_lacks_a_tokenizer_only(compose_config):
    cfg = load_incomplete(compose_config("prepare_data"), PrepareConfig)
    assert [type(error) for error in findings(cfg)] == [NothingGivenError]


def test_a_section_that_is_not_there_at_all_is_missing(compose_config):
    composed = OmegaConf.to_container(compose_config("train", "+exp=mini/base"))
    del composed["optim"], composed["model"]["hidden_size"]
    cfg = load_incomplete(OmegaConf.create(composed), RunConfig)
    assert cfg.model.num_layers == 2
    for read in (lambda: cfg.optim, lambda: cfg.model.hidden_size):
        with pytest.raises(MissingValueError):
            read()
