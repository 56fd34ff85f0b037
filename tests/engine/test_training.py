"""Training, resume and transition through NeMo and Megatron, seen from what they write."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.support.launches import TWO_RANK_LAYOUTS, run_module
from tests.support.saved_state import MASTERS, read_tensors
from tests.support.tiny import DOCUMENT_LENGTHS, SEQ_LENGTH, read_metrics

SCORE_PROGRAM = "tests.engine.score_program"


def checkpoint(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step_{step:08d}" / "weights"


def adam_groups(directory: Path) -> list[dict[str, Any]]:
    common = torch.load(directory / "common.pt", weights_only=False)
    return common["optimizer"][0]["optimizer"]["param_groups"]


def test_the_loss_of_a_random_walk_falls(one_rank_runs: Path) -> None:
    losses = [record["loss"] for record in read_metrics(one_rank_runs / "whole")]
    assert len(losses) == 8
    assert losses[0] == pytest.approx(6.24, abs=0.2)  # ln(512): nothing is known yet
    assert losses[-1] < losses[0] - 0.3


def test_every_step_has_the_learning_rate_of_the_recipe(one_rank_runs: Path) -> None:
    peak, floor, warmup, train_iters = 1e-2, 0.1, 1, 8
    expected = []
    for done in range(train_iters):
        cosine = 0.5 * (1 + math.cos(math.pi * (done - warmup) / (train_iters - warmup)))
        expected.append(peak * (done / warmup if done < warmup else floor + (1 - floor) * cosine))
    assert expected[:2] == [0.0, peak]
    # The record of step n holds the rate that step was taken with: n - 1 steps were done before it.
    records = read_metrics(one_rank_runs / "whole")
    assert [record["step"] for record in records] == list(range(1, train_iters + 1))
    assert [record["learning_rate"] for record in records] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("run", ["whole", "bf16"])
def test_a_resumed_run_repeats_to_the_last_bit(one_rank_runs: Path, run: str) -> None:
    keys = ("step", "loss", "grad_norm", "learning_rate", "target_tokens", "real_tokens", "consumed_train_tokens")
    resumed_run = {"whole": "resumed", "bf16": "bf16_resumed"}[run]
    whole, resumed = (
        [{key: record[key] for key in keys} for record in read_metrics(one_rank_runs / name)]
        for name in (run, resumed_run)
    )
    assert resumed == whole[4:]
    for part in ("module", "optimizer.state.exp_avg_sq"):
        expected = read_tensors(checkpoint(one_rank_runs / run, 8), part)
        actual = read_tensors(checkpoint(one_rank_runs / resumed_run, 8), part)
        assert expected.keys() == actual.keys() and len(expected) > 5
        assert all(torch.equal(expected[key], actual[key]) for key in expected)


def test_bf16_trains_as_fp32_and_keeps_fp32_weights_and_moments(one_rank_runs: Path) -> None:
    losses, expected = ([r["loss"] for r in read_metrics(one_rank_runs / name)] for name in ("bf16", "whole"))
    assert losses != expected
    # bf16 keeps 8 bits of every number; a loss is a mean over 200 tokens.
    assert losses == pytest.approx(expected, rel=2**-8)
    weights = read_tensors(checkpoint(one_rank_runs / "bf16", 8), "module")
    masters = read_tensors(checkpoint(one_rank_runs / "bf16", 8), MASTERS)
    moments = read_tensors(checkpoint(one_rank_runs / "bf16", 8), "optimizer.state.exp_avg_sq")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    assert {tensor.dtype for tensor in (*masters.values(), *moments.values())} == {torch.float32}
    assert len(masters) == len(weights) > 5
    for name, master in masters.items():
        assert torch.equal(weights[name], master.to(torch.bfloat16))


def test_a_bf16_transition_takes_the_fp32_weights(one_rank_runs: Path) -> None:
    parent = read_tensors(checkpoint(one_rank_runs / "bf16", 8), MASTERS)
    child = read_tensors(checkpoint(one_rank_runs / "bf16_carried", 1), MASTERS)
    assert parent.keys() == child.keys() and len(parent) > 5
    # The child's one step has the learning rate zero.
    assert all(torch.equal(parent[key], child[key]) for key in parent)
    assert not all(torch.equal(tensor, tensor.to(torch.bfloat16).float()) for tensor in parent.values())


@pytest.mark.parametrize("run", ["carried", "fresh"])
def test_a_transition_takes_every_weight_of_the_parent(one_rank_runs: Path, run: str) -> None:
    parent = read_tensors(checkpoint(one_rank_runs / "whole", 8), "module")
    child = read_tensors(checkpoint(one_rank_runs / run, 1), "module")
    assert parent.keys() == child.keys() and len(parent) > 5
    assert all(torch.equal(parent[key], child[key]) for key in parent)


def test_optimizer_state_is_carried_over_with_new_hyperparameters(one_rank_runs: Path) -> None:
    decayed, undecayed = adam_groups(checkpoint(one_rank_runs / "carried", 1))
    assert decayed["step"] == 8 + 1
    assert decayed["weight_decay"] == 0.05 and undecayed["weight_decay"] == 0.0
    assert decayed["max_lr"] == decayed["initial_lr"] == 1e-3
    parent = read_tensors(checkpoint(one_rank_runs / "whole", 8), "optimizer.state.exp_avg_sq")
    child = read_tensors(checkpoint(one_rank_runs / "carried", 1), "optimizer.state.exp_avg_sq")
    # v' = 0.95 v + 0.05 g**2, so no element can fall below 0.95 v.
    assert all((child[key] >= 0.95 * parent[key] * (1 - 1e-6)).all() for key in parent)
    assert all(parent[key].abs().sum() > 0 for key in parent)


def test_weights_only_starts_the_optimizer_anew(one_rank_runs: Path) -> None:
    assert adam_groups(checkpoint(one_rank_runs / "fresh", 1))[0]["step"] == 1
    carried = read_tensors(checkpoint(one_rank_runs / "carried", 1), "optimizer.state.exp_avg_sq")
    fresh = read_tensors(checkpoint(one_rank_runs / "fresh", 1), "optimizer.state.exp_avg_sq")
    assert sum(fresh[key].sum() for key in fresh) < sum(carried[key].sum() for key in carried)


def test_a_stage_trains_with_its_own_rotary_base(one_rank_runs: Path) -> None:
    same_rows_same_weights = (
        read_metrics(one_rank_runs / "carried")[0]["loss"],
        read_metrics(one_rank_runs / "fresh")[0]["loss"],
    )
    assert same_rows_same_weights[0] == same_rows_same_weights[1]
    model = json.loads((checkpoint(one_rank_runs / "carried", 1).parent / "model.json").read_text())
    assert model["model"]["rotary_base"] == 80000.0


def test_the_loss_of_a_packed_step_is_that_of_documents_alone(one_rank_runs: Path, tmp_path: Path) -> None:
    output = tmp_path / "scores.json"
    run_module(SCORE_PROGRAM, str(one_rank_runs), "one_step", str(output))
    scores = json.loads(output.read_text())
    (record,) = read_metrics(one_rank_runs / "one_step")
    assert record["target_tokens"] == scores["target_tokens"]
    assert record["loss"] == pytest.approx(scores["loss_sum"] / scores["target_tokens"], rel=1e-6)
    for name, sums in record["loss_by_position"].items():
        first, last = map(int, name.split("-"))
        expected = sum(scores["loss_by_position"][first : last + 1])
        assert sums["loss_sum"] == pytest.approx(expected, rel=1e-6), name
    by_domain = {name or "unnamed": expected for name, expected in scores["loss_by_domain"].items()}
    assert {name: sums["loss_sum"] for name, sums in record["loss_by_domain"].items()} == pytest.approx(by_domain)
    assert scores["losses_agree_with_logits_within"] < 1e-5


def test_real_tokens_exclude_padding_and_targets_the_first_token(one_rank_runs: Path) -> None:
    record = read_metrics(one_rank_runs / "whole")[0]
    row_lengths = [sum(lengths) for lengths in DOCUMENT_LENGTHS]
    assert record["row_tokens"] == 4 * SEQ_LENGTH
    assert 4 * min(row_lengths) <= record["real_tokens"] <= record["row_tokens"]
    # Four rows hold between 4 and 20 documents, and each loses one target: its first token.
    assert 4 <= record["real_tokens"] - record["target_tokens"] <= 20


def test_tensorboard_holds_the_figures_of_the_metrics_file(one_rank_runs: Path) -> None:
    (record,) = read_metrics(one_rank_runs / "one_step")
    events = EventAccumulator(str(one_rank_runs / "one_step" / "tensorboard"))
    events.Reload()
    (loss,) = events.Scalars("train/loss")
    assert loss.step == 1
    assert loss.value == pytest.approx(record["loss"], rel=1e-6)
    assert not (one_rank_runs / "whole" / "tensorboard").exists()


@pytest.mark.distributed
@pytest.mark.parametrize("name", TWO_RANK_LAYOUTS)
def test_two_ranks_continue_a_run_of_one_with_its_losses(two_rank_runs: Path, name: str) -> None:
    one, two = read_metrics(two_rank_runs / "whole")[4:], read_metrics(two_rank_runs / name)
    for key in ("step", "target_tokens", "real_tokens", "consumed_train_tokens"):
        assert [record[key] for record in two] == [record[key] for record in one]
    for key in ("loss", "grad_norm"):
        assert [record[key] for record in two] == pytest.approx([record[key] for record in one], rel=1e-5)
