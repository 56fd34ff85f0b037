"""Every (TP, PP, CP, DP) layout computes what one rank computes, and what Hugging Face computes on each document alone.

``pytest -m layouts`` runs all of ``LAYOUTS``; the ordinary suite runs the three that between them have every kind of
parallelism and every exchange.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nemo_prolong.data.dataset import PackedRowDataset, ValidationRowDataset
from tests.support import oracle
from tests.support.layouts import (
    LAYOUTS,
    ONE_RANK,
    PERTURBED_DOCUMENT,
    RECOMPUTED,
    STEPS,
    VALIDATION_DOCUMENTS,
    stage_config,
)
from tests.support.saved_state import read_tensors

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(180 * (len(LAYOUTS) + 1))]

ORDINARY = ("tp2_cp2_p2p_sp", "cp2_dp2_all_gather", "pp2_cp2_a2a")
layouts = pytest.mark.parametrize(
    "layout", [pytest.param(name, marks=[] if name in ORDINARY else pytest.mark.layouts) for name in LAYOUTS]
)

GRADIENT = "optimizer.state.exp_avg"
_ADAM_KEEPS = 0.1
"""First moment after one step: (1 - beta1) times the gradient."""


@cache
def tensors(checkpoint: Path, part: str) -> dict[str, torch.Tensor]:
    """Return the gathered tensors of a part of a checkpoint: module, optimizer.state.exp_avg, ..., by model name."""
    return read_tensors(checkpoint / "weights", part)


def records(run: Path, key: str) -> list[float]:
    """Return one figure of every record that has it."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line[key] for line in lines if key in line]


def distance(ours: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the largest difference relative to the largest element."""
    return float((ours.double() - expected.double()).abs().max() / expected.double().abs().max())


@pytest.fixture(scope="session")
def first_rows(layout_runs: Any) -> list[list[torch.Tensor]]:
    """The documents of each row of the first step."""
    cfg = stage_config(layout_runs.directory / "data", layout_runs.directory, "unused")
    rows = PackedRowDataset(cfg.data.root, cfg.data.mixture, cfg.seq_length, cfg.seed, num_rows=4)
    return [
        oracle.documents_of(row.tokens, row.cu_seqlens, row.real_tokens) for row in (rows[index] for index in range(4))
    ]


@pytest.fixture(scope="session")
def first_batch(layout_runs: Any, first_rows: list[list[torch.Tensor]]) -> oracle.Scored:
    """The rows of the first step, scored document by document in float64."""
    model = stage_config(layout_runs.directory / "data", layout_runs.directory, "unused").model
    return oracle.score(
        tensors(layout_runs.start, "module"), model, [document for row in first_rows for document in row]
    )


@pytest.fixture(scope="session")
def validation_losses(layout_runs: Any) -> dict[str, list[torch.Tensor]]:
    """Token losses of the validation rows by name, one tensor per document, in float64."""
    cfg = stage_config(layout_runs.directory / "data", layout_runs.directory, "unused")
    rows = ValidationRowDataset(cfg.data.root, cfg.data.validation, cfg.seq_length, False, cfg.model.vocab_size, None)
    weights = tensors(layout_runs.start, "module")
    return {
        row.domain: oracle.score(
            weights, cfg.model, oracle.documents_of(row.tokens, row.cu_seqlens, row.real_tokens)
        ).token_losses
        for row in (rows[index] for index in range(len(rows)))
        if row.real_tokens > 1
    }


def recorded(run: Path, row: str) -> list[dict[str, np.ndarray]]:
    """Return what every rank with a loss recorded of a validation row."""
    return [dict(np.load(path)) for path in sorted((run / "validation").glob(f"{row}.rank*.npz"))]


@pytest.mark.parametrize("layout", [ONE_RANK, *layouts.args[1]])
def test_the_first_loss_and_gradients_are_those_of_documents_alone(
    layout_runs: Any, first_batch: oracle.Scored, layout: str
) -> None:
    expected = torch.cat(first_batch.token_losses).mean()
    assert records(layout_runs.directory / layout, "loss")[0] == pytest.approx(float(expected), rel=1e-6)
    ours = tensors(layout_runs.checkpoint(layout, 1), GRADIENT)
    assert ours.keys() == first_batch.gradients.keys()
    for key, gradient in first_batch.gradients.items():
        whole = ours[key] / _ADAM_KEEPS
        without_padding = whole[: len(gradient)] if whole.shape[1:] == gradient.shape[1:] else whole
        assert distance(without_padding, gradient) < 1e-5, key
        assert not whole[len(gradient) :].any(), f"{key}: rows of padding have a gradient"


@layouts
def test_the_first_loss_and_gradients_are_those_of_one_rank(layout_runs: Any, layout: str) -> None:
    one, many = layout_runs.directory / ONE_RANK, layout_runs.directory / layout
    assert records(many, "loss")[0] == pytest.approx(records(one, "loss")[0], rel=1e-6)
    expected = tensors(layout_runs.checkpoint(ONE_RANK, 1), GRADIENT)
    ours = tensors(layout_runs.checkpoint(layout, 1), GRADIENT)
    assert {key: distance(ours[key], expected[key]) for key in expected} == {
        key: pytest.approx(0, abs=1e-5) for key in expected
    }


@layouts
def test_twenty_steps_stay_with_those_of_one_rank(layout_runs: Any, layout: str) -> None:
    one, many = layout_runs.directory / ONE_RANK, layout_runs.directory / layout
    for key in ("step", "target_tokens", "real_tokens", "consumed_train_tokens"):
        assert records(many, key) == records(one, key)
    for key in ("loss", "val_loss", "grad_norm"):
        assert records(many, key) == pytest.approx(records(one, key), rel=1e-4)
    assert len(records(many, "loss")) == STEPS
    expected, ours = (tensors(layout_runs.checkpoint(name), "module") for name in (ONE_RANK, layout))
    assert all(distance(ours[key], expected[key]) < 1e-4 for key in expected)


@layouts
def test_every_token_loss_is_that_of_its_document_alone(
    layout_runs: Any, validation_losses: dict[str, list[torch.Tensor]], layout: str
) -> None:
    for row, documents in validation_losses.items():
        scored = 0
        for rank in recorded(layout_runs.directory / layout, row):
            for index, expected in enumerate(documents):
                here = (rank["documents"] == index) & (rank["positions"] < len(expected))
                ours = torch.from_numpy(rank["losses"][here]).double()
                assert torch.allclose(ours, expected[rank["positions"][here]], rtol=0, atol=1e-5)
                scored += int(here.sum())
        tensor_parallel_ranks = LAYOUTS[layout]["parallelism"]["tensor_model_parallel_size"]
        assert scored == tensor_parallel_ranks * sum(len(document) for document in documents)


@layouts
def test_another_document_changes_no_loss_by_a_single_bit(layout_runs: Any, layout: str) -> None:
    run, changed, compared = layout_runs.directory / layout, 0, 0
    pairs = zip(recorded(run, "original"), recorded(run, "perturbed"), strict=True)
    for before, after in pairs:
        assert np.array_equal(before["documents"], after["documents"])
        others = before["documents"] != PERTURBED_DOCUMENT
        assert np.array_equal(before["losses"][others], after["losses"][others])
        compared += int(others.sum())
        changed += int((before["losses"] != after["losses"]).sum())
    tensor_parallel_ranks = LAYOUTS[layout]["parallelism"]["tensor_model_parallel_size"]
    # All tokens of the other document but its last, which has no loss, are other tokens now.
    assert changed == tensor_parallel_ranks * (VALIDATION_DOCUMENTS["original"][PERTURBED_DOCUMENT] - 1)
    assert compared > 0


@layouts
def test_a_checkpoint_of_another_layout_loads_to_the_last_bit(layout_runs: Any, layout: str) -> None:
    saved = layout_runs.checkpoint(layout_runs.reloaded_from(layout))
    loaded = layout_runs.checkpoint(f"{layout}_reloads")
    # In fp32 the weights are their own master copy.
    for part in ("module", "optimizer.state.exp_avg", "optimizer.state.exp_avg_sq"):
        expected, ours = tensors(saved, part), tensors(loaded, part)
        assert expected.keys() == ours.keys() and len(expected) > 5, part
        assert all(torch.equal(expected[key], ours[key]) for key in expected), part


def test_the_average_per_device_is_a_mean_of_means(
    layout_runs: Any, first_rows: list[list[torch.Tensor]], first_batch: oracle.Scored
) -> None:
    model = stage_config(layout_runs.directory / "data", layout_runs.directory, "unused").model
    weights = tensors(layout_runs.start, "module")
    by_row = [oracle.score(weights, model, row).gradients for row in first_rows if max(map(len, row)) > 1]
    ours = tensors(layout_runs.checkpoint("per_device", 1), GRADIENT)
    for key in by_row[0]:
        expected = torch.stack([row[key] for row in by_row]).mean(dim=0)
        gradient = ours[key][: len(expected)] if ours[key].shape[1:] == expected.shape[1:] else ours[key]
        assert distance(gradient / _ADAM_KEEPS, expected) < 1e-5, key
        assert distance(expected, first_batch.gradients[key]) > 1e-3, "the two averages cannot be told apart here"
    # What is reported is the mean over all targets either way.
    assert records(layout_runs.directory / "per_device", "loss")[0] == pytest.approx(
        records(layout_runs.directory / ONE_RANK, "loss")[0], rel=1e-6
    )


@pytest.mark.parametrize("policy", RECOMPUTED)
def test_recomputation_changes_no_bit(layout_runs: Any, policy: str) -> None:
    kept, recomputed = layout_runs.directory / ONE_RANK, layout_runs.directory / policy
    for key in ("loss", "grad_norm"):
        assert records(recomputed, key) == records(kept, key)
    expected, ours = (tensors(layout_runs.checkpoint(name), "module") for name in (ONE_RANK, policy))
    assert all(torch.equal(ours[key], expected[key]) for key in expected)
