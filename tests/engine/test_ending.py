"""An error of one rank, or of a process that it started, ends all ranks alike: same message, same code, no hang."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nemo_prolong.data.mds import MdsWriter
from nemo_prolong.errors import CheckpointError, DataError, ProlongError
from tests.support.launches import run_module
from tests.support.tiny import SEQ_LENGTH, VOCAB_SIZE, write_plain_tokenizer

TIMEOUT_SECONDS = 600
pytestmark = [pytest.mark.distributed, pytest.mark.timeout(TIMEOUT_SECONDS)]


def write_row_beyond_vocabulary(root: Path) -> None:
    """Write rows of which one, not the first, has a token id that the model does not have."""
    write_plain_tokenizer(root / "tokenizer")
    with MdsWriter(root / "rows", {"input_ids": "ndarray:uint32"}) as writer:
        for row in range(20):
            writer.write({"input_ids": np.full(SEQ_LENGTH, VOCAB_SIZE if row == 7 else row, np.uint32)})


@pytest.fixture(scope="module")
def statuses(workspace: Path, make_config: Callable[..., Any]) -> dict[str, list[int]]:
    """Exit statuses of both ranks of every case."""
    write_row_beyond_vocabulary(workspace / "bad_data")

    def case(name: str, fault: dict[str, Any] | None, **changes: Any) -> dict[str, Any]:
        config = make_config(name=f"ending_{name}", train={"train_iters": 6}, **changes)
        return {"name": name, "config": config.model_dump(mode="json"), "fault": fault}

    loaders = {"num_workers": 1}
    cases = [
        case("bad_row", None, data={"root": str(workspace / "bad_data"), **loaders}),
        case("bad_row_here", None, data={"root": str(workspace / "bad_data")}),
        case("killed_loader", {"kind": "kill_loader", "rank": 1, "step": 3}, data=loaders),
        case("refused_on_1", {"kind": "refuse", "rank": 1, "step": 3}),
        case("refused_on_0", {"kind": "refuse", "rank": 0, "step": 3}),
        case("by_system", {"kind": "refuse", "rank": 1, "step": 3, "by_system": True}),
        case("refused_early", {"kind": "refuse", "rank": 1, "step": 0}),
        case("stuck", {"kind": "refuse", "rank": 1, "other_rank": 0, "step": 3, "stuck": 0}),
    ]
    cases += [
        case(
            f"killed_writer_{background}",
            {"kind": "kill_writer", "rank": 1, "step": 2},
            checkpoint={"save_interval_steps": 2, "max_failed_saves": 1, "async_save": background},
        )
        for background in (False, True)
    ]
    path, output = workspace / "ending_cases.json", workspace / "ending_statuses.json"
    path.write_text(json.dumps(cases))
    run_module("tests.engine.fault_program", str(path), str(output), timeout_seconds=TIMEOUT_SECONDS)
    return json.loads(output.read_text())


def ends_alike(statuses: Any, workspace: Path, name: str, message: str, kind: type[ProlongError] = DataError) -> None:
    """Both ranks of a case ended as errors of a kind do, and say the same."""
    assert statuses[name] == [kind.exit_code] * 2
    for rank in range(2):
        console = (workspace / f"{name}.rank{rank}.log").read_text()
        # A rank that was in a call that no exception reaches logs it.
        assert console.splitlines()[-1].endswith(message)
        assert "Traceback" not in console


@pytest.mark.parametrize("name", ["bad_row", "bad_row_here"])
def test_a_row_beyond_the_vocabulary_ends_all_ranks_alike(statuses: Any, workspace: Path, name: str) -> None:
    rule = f"has token ids from {VOCAB_SIZE} to {VOCAB_SIZE}, model.vocab_size is {VOCAB_SIZE}."
    remedy = "Use the tokenizer of the model to prepare the data."
    ends_alike(statuses, workspace, name, f"{workspace}/bad_data/rows row 7: {rule} {remedy}")


def test_a_killed_loader_process_ends_all_ranks_alike(statuses: Any, workspace: Path) -> None:
    message = (
        "data.num_workers: a loader process was killed, most likely because memory or shared memory ran out. Lower "
        "data.num_workers, ask for more memory, or give /dev/shm more room, such as --shm-size=8g of a container. The "
        "same command continues."
    )
    ends_alike(statuses, workspace, "killed_loader", message)


@pytest.mark.parametrize("name", ["refused_on_1", "refused_on_0", "refused_early"])
def test_an_error_of_one_rank_is_that_of_all(statuses: Any, workspace: Path, name: str) -> None:
    ends_alike(statuses, workspace, name, "rows row 7: is refused on one rank. Prepare it again.")


@pytest.mark.parametrize("background", [False, True])
def test_a_killed_checkpoint_writer_ends_all_ranks(statuses: Any, workspace: Path, background: bool) -> None:
    name = f"killed_writer_{background}"
    final = workspace / f"ending_{name}" / "checkpoints" / "step_00000002"
    message = (
        f"{final}: it could not be saved, 1 in a row: rank 1: Worker failure: a writing process was killed, most "
        "likely because memory ran out. Make room or repair the file system, then repeat the command: it continues "
        "from the newest good one."
    )
    ends_alike(statuses, workspace, name, message, CheckpointError)
    assert not final.exists()


def test_what_the_system_refuses_on_one_rank_ends_all(statuses: Any, workspace: Path) -> None:
    message = "scratch: read-only file system. Name a place that can be written to."
    ends_alike(statuses, workspace, "by_system", message, CheckpointError)


def test_a_rank_that_is_stuck_ends_with_the_others_error(statuses: Any, workspace: Path) -> None:
    assert statuses["stuck"] == [DataError.exit_code] * 2
    console = (workspace / "stuck.rank0.log").read_text()
    assert console.splitlines()[-1].endswith("rows row 7: is refused on one rank. Prepare it again.")
