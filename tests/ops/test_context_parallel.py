"""Context-parallel attention on 2 and 4 gloo ranks against document attention on one.

One launch per number of ranks runs everything in ``context_parallel_program.py``; the tests judge what it found.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest
import torch

from nemo_prolong.errors import ConfigError
from nemo_prolong.ops.attention import document_attention
from nemo_prolong.ops.context_parallel import DocumentPartition, context_parallel_attention
from tests.support.attention_tools import boundaries, random_inputs
from tests.support.turns import turn

PROGRAM = "tests.ops.context_parallel_program"
TOLERANCES = {"float64": 1e-12, "float32": 1e-5}

Findings = list[dict[str, Any]]


@pytest.fixture(scope="module", params=[2, 4], ids=lambda ranks: f"{ranks} ranks")
def findings(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Findings:
    """What each rank found."""
    output = tmp_path_factory.mktemp("context_parallel") / "findings.json"
    with turn():
        result = subprocess.run(
            [sys.executable, "-m", PROGRAM, str(request.param), str(output)],
            capture_output=True,
            text=True,
            timeout=120,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdin=subprocess.DEVNULL,
        )
    assert result.returncode == 0, f"{result.stdout[-3000:]}\n{result.stderr[-6000:]}"
    return json.loads(output.read_text())


@pytest.mark.distributed
def test_outputs_and_gradients_are_those_of_one_rank(findings: Findings) -> None:
    ranks = len(findings)
    # 8 rows and 2 dtypes by 3 exchanges with 4 key heads, and by those that 2 key heads allow.
    assert len(findings[0]["exactness"]) == 16 * (6 if ranks == 2 else 5)
    for number, found in enumerate(findings):
        wrong = {k: v for k, v in found["exactness"].items() if not v <= TOLERANCES[k.split(",")[0]]}
        assert not wrong, f"rank {number} of {ranks}: relative difference from one rank"


@pytest.mark.distributed
def test_other_documents_and_padding_change_no_bit(findings: Findings) -> None:
    for found in findings:
        assert len(found["independence"]) == 9
        assert all(found["independence"].values()), found["independence"]


@pytest.mark.distributed
def test_the_ring_holds_a_few_shards_whatever_the_ranks(findings: Findings) -> None:
    for found in findings:
        memory = found["memory"]
        assert memory["largest tensor of the ring, in shards of queries"] <= 1, memory
        assert memory["shards alive in the ring forward"] == 2, memory
        assert memory["shards alive in the ring backward"] <= 5, "two of keys and values, three of their gradients"


@pytest.mark.distributed
def test_a2a_with_too_few_heads_is_an_error_with_numbers(findings: Findings) -> None:
    for found in findings:
        message = found["refusals"]["a2a with one key head"]
        assert message.startswith("parallelism.cp_comm_type=a2a")
        assert "4 query heads and 1 key-value heads" in message and f"context_parallel_size={len(findings)}" in message
        assert "parallelism.cp_comm_type=p2p" in message


@pytest.mark.distributed
def test_groups_whose_ranks_are_not_those_of_the_world_work(findings: Findings) -> None:
    for found in findings:
        assert len(found["subgroups"]) == (3 if len(findings) == 4 else 0)
        assert all(v <= 1e-12 for v in found["subgroups"].values()), found["subgroups"]


@pytest.mark.distributed
def test_bfloat16_is_no_less_exact_than_on_one_rank(findings: Findings) -> None:
    for found in findings:
        assert all(v <= 1.5 for v in found["rounding"].values()), found["rounding"]


def test_one_rank_needs_no_process_group() -> None:
    lengths = [6, 2, 10]
    partition = DocumentPartition.of_row(boundaries(lengths), 1, 0)
    inputs = random_inputs(sum(lengths), 2)
    expected = document_attention(*inputs, boundaries(lengths))
    assert torch.equal(context_parallel_attention(*inputs, partition), expected)


def test_an_unknown_exchange_is_an_error_that_names_the_known() -> None:
    partition = DocumentPartition.of_row(boundaries([4]), 1, 0)
    with pytest.raises(ConfigError) as caught:
        context_parallel_attention(*random_inputs(4, 2), partition, None, "a2a+p2p")
    assert str(caught.value) == (
        "parallelism.cp_comm_type=a2a+p2p: the exchanges of the torch backend are p2p, all_gather, a2a. "
        "Set parallelism.cp_comm_type=p2p."
    )
