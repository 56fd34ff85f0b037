"""The figures of ``metrics.jsonl``: exact sums, the same on one rank and on two, and what follows from them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nemo_prolong.config.schema import MixtureEntry
from nemo_prolong.data.batch import PackedRow
from nemo_prolong.data.dataset import PackedRowDataset
from nemo_prolong.plan.flops import training_flops
from tests.support.launches import TWO_RANK_LAYOUTS
from tests.support.tiny import DOMAINS, SEQ_LENGTH, read_metrics

GROUPINGS = ("loss_by_position", "loss_by_domain")
BUCKETS = ["0-7", "8-15", "16-31", "32-63"]


def rows_of_step(workspace: Path, step: int) -> list[PackedRow]:
    rows = PackedRowDataset(workspace / "data", [MixtureEntry(path="rows", proportion=1.0)], SEQ_LENGTH, 42, 32)
    return [rows[4 * (step - 1) + number] for number in range(4)]


def assert_groups_make_up_the_loss(records: list[dict[str, Any]]) -> None:
    for record in records:
        for key in GROUPINGS:
            groups = record[key].values()
            # A float64 holds the sum of this few float32 losses to the last bit, in whatever order they are added.
            total = math.fsum(group["loss_sum"] for group in groups)
            assert sum(group["target_tokens"] for group in groups) == record["target_tokens"]
            assert total / record["target_tokens"] == record["loss"]


def test_losses_by_position_and_domain_sum_up_exactly(one_rank_runs: Path) -> None:
    records = read_metrics(one_rank_runs / "whole")
    assert_groups_make_up_the_loss(records)
    assert all(list(record["loss_by_position"]) == BUCKETS for record in records)
    seen = {name for record in records for name in record["loss_by_domain"]}
    assert seen == {name or "unnamed" for name in DOMAINS}


def test_target_tokens_of_every_group_are_those_of_the_rows(one_rank_runs: Path) -> None:
    for record in read_metrics(one_rank_runs / "whole"):
        rows = rows_of_step(one_rank_runs, record["step"])
        predicted = np.concatenate([row.position_ids[row.loss_mask != 0] + 1 for row in rows])
        for name, group in record["loss_by_position"].items():
            first, last = map(int, name.split("-"))
            assert group["target_tokens"] == np.sum((predicted >= first) & (predicted <= last)), name
        expected: dict[str, int] = {}
        for row in rows:
            name = row.domain or "unnamed"
            expected[name] = expected.get(name, 0) + int(row.loss_mask.sum())
        assert {name: group["target_tokens"] for name, group in record["loss_by_domain"].items()} == expected


def test_model_flops_are_those_of_the_documents_of_the_step(one_rank_runs: Path, make_config: Any) -> None:
    model = make_config(name="unused").model
    for record in read_metrics(one_rank_runs / "whole"):
        lengths: list[int] = []
        for row in rows_of_step(one_rank_runs, record["step"]):
            ends = [end for end in row.cu_seqlens.tolist() if end <= row.real_tokens]
            lengths += np.diff(ends).tolist()
        assert sum(lengths) == record["real_tokens"]
        assert record["model_flops"] == training_flops(model, lengths)
        rate = record["model_flops"] / record["step_seconds"]
        assert record["model_flops_per_second"] == pytest.approx(rate, rel=1e-2)
        assert "mfu" not in record, "a CPU has no MFU"


def test_waiting_for_rows_is_part_of_a_step_and_for_saves_not(one_rank_runs: Path) -> None:
    records = read_metrics(one_rank_runs / "whole")
    for record in records:
        assert 0 < record["data_wait_seconds"] < record["step_seconds"]
    # The run saves after steps 4 and 8; the next record tells how long that took.
    saved = [record["step"] for record in records if record["checkpoint_seconds"] > 0.01]
    assert saved == [5]


def test_goodput_counts_from_one_moment_before_the_first_step(one_rank_runs: Path) -> None:
    records = read_metrics(one_rank_runs / "whole")
    useful, begins = 0.0, []
    for record in records:
        useful += record["step_seconds"]
        assert 0 < record["goodput"] <= 1
        begins.append(record["time"] - useful / record["goodput"])
    # Goodput is rounded to 1e-4, and its share of the time since is what a begin is uncertain by.
    wall = records[-1]["time"] - begins[-1]
    assert begins == pytest.approx([begins[-1]] * len(records), abs=2e-3 * wall / records[-1]["goodput"])
    assert begins[-1] <= records[0]["time"] - records[0]["step_seconds"] + 2e-3 * wall


@pytest.mark.distributed
@pytest.mark.parametrize("name", TWO_RANK_LAYOUTS)
def test_two_ranks_report_the_groups_of_one(two_rank_runs: Path, name: str) -> None:
    one, two = read_metrics(two_rank_runs / "whole")[4:], read_metrics(two_rank_runs / name)
    assert_groups_make_up_the_loss(two)
    for expected, actual in zip(one, two, strict=True):
        assert actual["model_flops"] == expected["model_flops"]
        for key in GROUPINGS:
            assert actual[key].keys() == expected[key].keys()
            for group, sums in expected[key].items():
                assert actual[key][group]["target_tokens"] == sums["target_tokens"]
                assert actual[key][group]["loss_sum"] == pytest.approx(sums["loss_sum"], rel=1e-5), (key, group)
        assert actual["tokens_per_second_per_rank"] == pytest.approx(actual["tokens_per_second"] / 2, rel=1e-2)
