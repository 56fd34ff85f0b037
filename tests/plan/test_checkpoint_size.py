"""The room that checkpoints take, from the configuration alone."""

import pytest

from nemo_prolong.config.compose import compose
from nemo_prolong.config.schema import RunConfig
from nemo_prolong.plan.checkpoint_size import checkpoint_bytes, kept_checkpoints
from nemo_prolong.plan.model_size import model_size


def stage(name, *overrides):
    return compose(RunConfig, "train", [f"+exp={name}", *overrides])


def test_a_parameter_takes_14_bytes_in_bf16():
    cfg = stage("stage2")
    # Two of the weight, and twelve of the optimizer's fp32 copy and its two moments.
    assert checkpoint_bytes(cfg) == 14 * model_size(cfg.model).total
    assert checkpoint_bytes(cfg) / 1e9 == pytest.approx(112.4, abs=0.1)


def test_fp8_is_no_format_of_weights():
    assert checkpoint_bytes(stage("stage2", "precision=fp8")) == checkpoint_bytes(stage("stage2"))


def test_the_miniature_takes_what_its_checkpoint_takes_on_disk():
    # Two checkpoints of a run of this experiment had 25,341,819 and 25,341,883 bytes.
    assert checkpoint_bytes(stage("mini/base")) == pytest.approx(25_341_819, rel=0.01)


@pytest.mark.parametrize(
    ("overrides", "count"),
    [
        ([], 3),
        (["checkpoint.keep_last=5"], 6),
        (["checkpoint.keep_every_steps=500"], 8),
        (["checkpoint.save_interval_minutes=null", "checkpoint.save_interval_steps=2500"], 1),
        (["checkpoint.save_interval_minutes=null", "checkpoint.save_interval_steps=2499"], 2),
    ],
)
def test_the_one_being_written_counts_and_no_more_than_are_saved(overrides, count):
    assert kept_checkpoints(stage("stage2", *overrides)) == count
